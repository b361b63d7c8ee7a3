"""``fedlscl doctor``: whether this machine has what a run needs, one line per item, with the fix."""

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from timeit import Timer

import torch

from fedlscl.callbacks.formatting import in_bytes
from fedlscl.cli import PACKAGE, Parser, explain
from fedlscl.data import ImageData, load_images
from fedlscl.data.images import Files, contents, imagenet_r_folder, list_folder, part_meant
from fedlscl.federated.engine import chosen_precision
from fedlscl.federated.method import StreamShape
from fedlscl.nets.vit import Foundation, FoundationConfig

PACKAGES = ("fedlscl", "torch", "torchvision", "lightning", "timm", "tensorboard")
EXTRAS = {
    "digits": ("scikit-learn", "the demo's data set"),
    "secure": ("cryptography", "secure sums"),
    "noise": ("dp-accounting", "differential privacy"),
    "flower": ("flwr", "federations over a network"),
}
"""By extra: the package in it, and what for."""
SIDES = {"cpu": 512, "cuda": 8192}
"""Rows of the matrices that are multiplied, by device; on a GPU small ones would show how fast work is launched."""
Check = tuple[str, Callable[[], str]]
"""A name, and a function that returns what it finds or raises a user error."""


def doctor(arguments: list[str]) -> None:
    """Print the findings; the exit status is 1 if something that was asked for does not work."""
    usage = "fedlscl doctor [--data_root DIR] [--config FILE ...]"
    parser = Parser(usage=usage, description="Check this machine.", allow_abbrev=False)
    parser.add_argument("--data_root", metavar="DIR", type=Path, help="folder of data sets and weights to try.")
    about = "configuration whose data set and nets are tried."
    parser.add_argument("--config", metavar="FILE", action="append", default=[], help=about)
    given = parser.parse_args(arguments)
    are_well = []
    for name, check in checks(given.data_root, given.config):
        text, is_well = finding(check)
        print(f"{'ok' if is_well else 'FAILS':<7}{name:<12}{text}", flush=True)
        are_well.append(is_well)
    if not all(are_well):
        raise SystemExit(1)


def finding(check: Callable[[], str]) -> tuple[str, bool]:
    """What a check finds, or its error, with this package's warnings; and whether all is well."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            text, is_well = check(), True
        except Exception as error:
            if (message := explain(error)) is None:
                raise
            text, is_well = message, False
    warned = [str(warning.message) for warning in caught if warning.filename.startswith(PACKAGE)]
    parts = [part.removesuffix(".") for part in (text, *warned)] if warned else [text]
    return " ".join("; ".join(parts).split()), is_well


def checks(data_root: Path | None, configs: Sequence[str]) -> Iterator[Check]:
    """Everything about this machine, and what was asked for."""
    yield "python", lambda: f"{platform.python_version()} in {sys.prefix}"
    yield "versions", lambda: ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    for extra in EXTRAS:
        yield f"[{extra}]", partial(_extra, extra)
    yield "devices", _devices
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield "precision", partial(_precision, device)
    yield "memory", _memory
    here = shutil.disk_usage(".")
    yield "disk", lambda: f"{in_bytes(here.free)} free of {in_bytes(here.total)} here, where runs go"
    if configs:
        yield from _of_configuration(configs, data_root)
    elif data_root is not None:
        yield from _of_folder(data_root)


def _extra(extra: str) -> str:
    package, use = EXTRAS[extra]
    try:
        return f"{package} {version(package)}: {use}"
    except PackageNotFoundError:  # optional: no failure
        return f"{package} is absent: for {use}, pip install 'fedlscl[{extra}]'"


def _devices() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"cpu ({platform.machine()}, {cores} cores, {torch.get_num_threads()} threads)"
    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    gpus += ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join([cpu, *gpus]) if gpus else f"{cpu}; no GPU: use the presets for a CPU, digits or cifar100_small"


def _precision(device: str) -> str:
    """Speed of a matrix product in both precisions, and which to choose."""
    fp32, bf16 = _product(device, torch.float32), _product(device, torch.bfloat16)
    fp32_rate, bf16_rate = (2e-9 * SIDES[device] ** 3 / seconds for seconds in (fp32, bf16))
    rates = f"{device}: fp32 {fp32_rate:,.1f} and bf16 {bf16_rate:,.1f} GFLOP/s"
    ratio, best = max(bf16, fp32) / min(bf16, fp32), "32-true" if bf16 >= fp32 else "bf16-mixed"
    if ratio < 1.2:
        return f"{rates}; bf16 is as fast as fp32: use --trainer.precision 32-true"
    times = f"{ratio:.{0 if ratio >= 10 else 1}f} times {'slower' if bf16 > fp32 else 'faster'}"
    auto = ", or auto" if chosen_precision("auto", device) == best else ""
    return f"{rates}; bf16 is {times} than fp32: use --trainer.precision {best}{auto}"


def _product(device: str, dtype: torch.dtype) -> float:
    """Seconds of a matrix product."""
    left, right = (torch.rand(SIDES[device], SIDES[device], device=device).to(dtype) for _ in range(2))
    timer = Timer(lambda: (left @ right).sum().item())  # waits for the device
    timer.timeit(1)  # the first product takes longer
    count, seconds = timer.autorange()
    return seconds / count


def _memory() -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    # macOS does not tell how much is free.
    free = f"{in_bytes(page * os.sysconf('SC_AVPHYS_PAGES'))} free of " if "SC_AVPHYS_PAGES" in os.sysconf_names else ""
    cuda = [f"cuda:{i} {in_bytes(torch.cuda.mem_get_info(i)[0])} free" for i in range(torch.cuda.device_count())]
    return ", ".join([f"{free}{in_bytes(page * os.sysconf('SC_PHYS_PAGES'))}", *cuda])


def _of_configuration(configs: Sequence[str], root: Path | None) -> Iterator[Check]:
    """Data set, split and nets of a configuration in one or more files, made as ``fit`` makes them."""
    from fedlscl.cli.app import Experiment, build

    made: list[Experiment] = []

    def read() -> str:
        files = [word for config in configs for word in ("--config", config)]
        made.append(build([*files, *([] if root is None else ["--data.root", str(root)])]))
        return f"{' + '.join(configs)} is valid: {type(made[0].method).__name__} on {made[0].datamodule.dataset}"

    yield "config", read
    if not made:
        return
    method, data = made[0].method, made[0].datamodule
    data.run_seed = made[0].config["seed_everything"]

    def load() -> str:
        data.setup()
        return f"{_described(data.data)}; {data.num_clients} clients x {data.num_tasks} tasks"

    def make_net() -> str:
        try:
            num_classes = data.num_classes
        except (ValueError, OSError):  # that of the line above
            num_classes = 1000
        net = method.build_net(0, StreamShape(num_classes, data.num_clients, data.num_tasks))
        vit = net.foundation
        frozen = "no frozen ViT" if vit is None else f"{vit.config.name}, weights {vit.fingerprint[:12]}"
        return f"{type(net).__name__} of {sum(p.numel() for p in net.parameters()):,} parameters; {frozen}"

    yield "data", load
    yield "nets", make_net


def _of_folder(root: Path) -> Iterator[Check]:
    """Every data set and weights file in a folder, loaded."""
    known = {"cifar-100-python": partial(_stored, "cifar100", root), "imagenet-r": partial(_folder, "imagenet-r", root)}
    found: list[Check] = [("data", load) for name, load in known.items() if (root / name).is_dir()]
    found += [("data", partial(_stored, file.name, root)) for file in sorted(root.glob("*.npz"))]
    folders = [folder for folder in contents(root).folders if folder.name not in known] if root.is_dir() else []
    # Images in a folder, or one level deeper if that is a part of a data set, well named or not.
    deeper = [found for folder in folders if part_meant(folder.name) for found in contents(folder).folders]
    if any(contents(folder).images for folder in [*folders, *deeper]):
        found.append(("data", partial(_folder, "folder", root)))
    found += [("weights", partial(_weights, file)) for file in sorted(root.glob("*.safetensors"))]

    def nothing() -> str:
        kinds = "cifar-100-python, imagenet-r, .npz files, folders of classes with images or .safetensors files"
        state = "none of them in" if root.is_dir() else "no folder"
        raise ValueError(f"data_root must be a folder with {kinds}, got {state} {root}")

    yield from found or [("data", nothing)]


def _stored(dataset: str, root: Path) -> str:
    return f"{dataset}: {_described(load_images(dataset, str(root)))}"


def _folder(dataset: str, root: Path) -> str:
    """An image folder loaded as ``fit`` loads it, though small, and equal files in train and test."""
    with tempfile.TemporaryDirectory() as cache:
        data = load_images(dataset, str(root), image_size=8, cache_dir=cache)
    with warnings.catch_warnings(action="ignore"):
        _, *files = list_folder(imagenet_r_folder(root) if dataset == "imagenet-r" else root, seed=0)
    return f"{dataset}: {_described(data, files)}"


def _described(data: ImageData, files: Sequence[Files] | None = None) -> str:
    """Numbers of images and classes; test images also in train are counted by their files, if given, or pixels."""
    if files is None:
        size = " of " + "x".join(str(pixels) for pixels in data.train_images.shape[2:])
        train, test = ((image.numpy().tobytes() for image in part) for part in (data.train_images, data.test_images))
    else:
        size = ""
        train, test = ((file.read_bytes() for file, _ in part) for part in files)
    known = {hashlib.sha256(content).digest() for content in train}
    count = sum(hashlib.sha256(content).digest() in known for content in test)
    shared = f"; test images also in train: {count:,} (remove them from one part)" if count else ""
    return f"{len(data.train_labels):,} + {len(data.test_labels):,} images{size}, {data.num_classes} classes{shared}"


def _weights(file: Path) -> str:
    import timm

    if not timm.is_model(file.stem):
        raise ValueError(f"{file.name} must be named after a model of timm, such as vit_base_patch16_224.safetensors.")
    made = Foundation(FoundationConfig(name=file.stem, weights=str(file)))
    return f"{file.name}: {made.depth} blocks of width {made.width}, fingerprint {made.fingerprint[:12]}"
