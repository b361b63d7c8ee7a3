"""``fedlscl doctor``: whether this machine has what a run needs, one line per item, with the fix."""

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from fedlscl.callbacks.formatting import in_bytes
from fedlscl.cli import PACKAGE, Parser, explain
from fedlscl.data import ImageData, load_images
from fedlscl.data.images import contents, imagenet_r_folder, list_folder, part_meant
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
SIDES = {"cpu": 512, "cuda": 4096}
"""Rows of the matrices that are multiplied, by device; on a GPU small ones would show how fast work is launched."""
PRODUCTS = {"cpu": 1, "cuda": 10}
"""Products that are timed together."""


class Finding(NamedTuple):
    """One line of the output."""

    name: str
    text: str
    is_well: bool = True


def doctor(arguments: list[str]) -> None:
    """Print the findings; the exit status is 1 if something that was asked for does not work."""
    usage = "fedlscl doctor [--data_root DIR] [--config FILE ...]"
    parser = Parser(usage=usage, description="Check this machine.", allow_abbrev=False)
    parser.add_argument("--data_root", metavar="DIR", type=Path, help="folder of data sets and weights to try.")
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="configuration whose data set and nets are tried."
    )
    given = parser.parse_args(arguments)
    is_well = True
    for finding in findings(given.data_root, given.config):
        print(f"{'ok' if finding.is_well else 'FAILS':<7}{finding.name:<12}{finding.text}", flush=True)
        is_well &= finding.is_well
    if not is_well:
        raise SystemExit(1)


def findings(data_root: Path | None, configs: Sequence[str]) -> Iterator[Finding]:
    """Everything about this machine, and what was asked for."""
    yield Finding("python", f"{platform.python_version()} in {sys.prefix}")
    yield Finding("versions", ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    for extra, (package, use) in EXTRAS.items():  # optional: never a failure
        try:
            text = f"{package} {version(package)}: {use}"
        except PackageNotFoundError:
            text = f"{package} is absent: for {use}, pip install 'fedlscl[{extra}]'"
        yield Finding(f"[{extra}]", text)
    yield Finding("devices", _devices())
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield Finding("precision", _precision(device))
    yield Finding("memory", _memory())
    here = shutil.disk_usage(".")
    yield Finding("disk", f"{in_bytes(here.free)} free of {in_bytes(here.total)} here, where runs go")
    if configs:
        yield from _configured(configs, data_root)
    elif data_root is not None:
        yield from _found(data_root)


def _devices() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"cpu ({platform.machine()}, {cores} cores, {torch.get_num_threads()} threads)"
    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    gpus += ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join([cpu, *gpus]) if gpus else f"{cpu}; no GPU: use the presets for a CPU, digits or cifar100_small"


def _precision(device: str) -> str:
    """Speed of a matrix product in both precisions, and which to choose."""
    float32, bf16 = _product(device, torch.float32), _product(device, torch.bfloat16)
    rates = " and ".join(
        f"{name} {2e-9 * SIDES[device] ** 3 / s:,.1f}" for name, s in (("fp32", float32), ("bf16", bf16))
    )
    ratio = max(bf16, float32) / min(bf16, float32)
    best = "32-true" if bf16 >= float32 else "bf16-mixed"
    if ratio < 1.2:
        return f"{device}: {rates} GFLOP/s; bf16 is as fast as fp32: use --trainer.precision 32-true"
    times = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
    auto = ", or auto" if chosen_precision("auto", device) == best else ""
    return (
        f"{device}: {rates} GFLOP/s; bf16 is {times} times {'slower' if bf16 > float32 else 'faster'} than fp32: "
        f"use --trainer.precision {best}{auto}"
    )


def _product(device: str, dtype: torch.dtype) -> float:
    """Seconds of a matrix product: the best of five, or the first if that takes more than two seconds."""
    side, count = SIDES[device], PRODUCTS[device]
    left, right = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        products = [left @ right for _ in range(count)]
        products[-1].sum().item()  # waits for all of them
        best = min(best, (time.perf_counter() - started) / count)
        if best > 2:
            break
    return best


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    page = os.sysconf("SC_PAGE_SIZE")
    free = f"{in_bytes(page * os.sysconf('SC_AVPHYS_PAGES'))} free of " if "SC_AVPHYS_PAGES" in os.sysconf_names else ""
    cuda = [f"cuda:{i} {in_bytes(torch.cuda.mem_get_info(i)[0])} free" for i in range(torch.cuda.device_count())]
    return ", ".join([f"{free}{in_bytes(page * os.sysconf('SC_PHYS_PAGES'))}", *cuda])


def _configured(configs: Sequence[str], root: Path | None) -> Iterator[Finding]:
    """Data set, split and nets of a configuration in one or more files, made as ``fit`` makes them."""
    from fedlscl.cli.app import Experiment, build

    made: list[Experiment] = []

    def read() -> str:
        files = [word for config in configs for word in ("--config", config)]
        made.append(build([*files, *([] if root is None else ["--data.root", str(root)])]))
        return f"{' + '.join(configs)} is valid: {type(made[0].method).__name__} on {made[0].datamodule.dataset}"

    yield _attempt("config", read)
    if not made:
        return
    method, data = made[0].method, made[0].datamodule

    def load() -> str:
        data.run_seed = made[0].config["seed_everything"]
        data.setup()
        return f"{_described(data.data)}; {data.num_clients} clients x {data.num_tasks} tasks"

    def make_net() -> str:
        num_classes = data.num_classes if loaded.is_well else 1000
        net = method.build_net(0, StreamShape(num_classes, data.num_clients, data.num_tasks))
        vit = net.foundation
        frozen = "no frozen ViT" if vit is None else f"{vit.config.name}, weights {vit.fingerprint[:12]}"
        return f"{type(net).__name__} of {sum(p.numel() for p in net.parameters()):,} parameters; {frozen}"

    loaded = _attempt("data", load)
    yield loaded
    yield _attempt("nets", make_net)


def _found(root: Path) -> Iterator[Finding]:
    """Every data set and weights file in a folder, loaded."""
    if not root.is_dir():
        yield Finding("data", f"data_root must be a folder of data sets or weights, got {root}", False)
        return
    tries: list[tuple[str, Callable[[], str]]] = []
    known = ("cifar-100-python", "imagenet-r")
    if (root / known[0]).is_dir():
        tries.append(("data", lambda: f"cifar100: {_described(load_images('cifar100', str(root)))}"))
    if (root / known[1]).is_dir():
        tries.append(("data", lambda: _folder("imagenet-r", root)))
    for file in sorted(root.glob("*.npz")):
        tries.append(("data", lambda file=file: f"{file.name}: {_described(load_images(file.name, str(root)))}"))
    folders = [folder for folder in contents(root).folders if folder.name not in known]
    # Images in a folder, or one level deeper if that is a part of a data set, well named or not.
    deeper = [found for folder in folders if part_meant(folder.name) for found in contents(folder).folders]
    if any(contents(folder).images for folder in [*folders, *deeper]):
        tries.append(("data", lambda: _folder("folder", root)))
    for file in sorted(root.glob("*.safetensors")):
        tries.append(("weights", lambda file=file: _weights(file)))
    for name, what in tries:
        yield _attempt(name, what)
    if not tries:
        kinds = "cifar-100-python, imagenet-r, .npz files, folders of classes with images or .safetensors files"
        yield Finding("data", f"data_root must hold {kinds}, got none of them in {root}", False)


def _attempt(name: str, what: Callable[[], str]) -> Finding:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            text, is_well = what(), True
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            text, is_well = message, False
    warned = [str(warning.message) for warning in caught if warning.filename.startswith(PACKAGE)]
    parts = [part.removesuffix(".") for part in (text, *warned)] if warned else [text]
    return Finding(name, " ".join("; ".join(parts).split()), is_well)


def _described(data: ImageData) -> str:
    side = "x".join(str(pixels) for pixels in data.train_images.shape[2:])
    shared = _shared(*((image.numpy().tobytes() for image in part) for part in (data.train_images, data.test_images)))
    return f"{_size(data)} of {side}, {data.num_classes} classes{shared}"


def _folder(dataset: str, root: Path) -> str:
    """An image folder loaded as ``fit`` loads it, though small, and equal files in train and test."""
    with tempfile.TemporaryDirectory() as cache:
        data = load_images(dataset, str(root), image_size=8, cache_dir=cache)
    with warnings.catch_warnings(action="ignore"):
        _, train, test = list_folder(imagenet_r_folder(root) if dataset == "imagenet-r" else root, seed=0)
    shared = _shared(*((file.read_bytes() for file, _ in part) for part in (train, test)))
    return f"{dataset}: {_size(data)}, {data.num_classes} classes{shared}"


def _size(data: ImageData) -> str:
    return f"{len(data.train_labels):,} + {len(data.test_labels):,} images"


def _shared(train: Iterable[bytes], test: Iterable[bytes]) -> str:
    known = {hashlib.sha256(content).digest() for content in train}
    count = sum(hashlib.sha256(content).digest() in known for content in test)
    return f"; test images also in train: {count:,} (remove them from one part)" if count else ""


def _weights(file: Path) -> str:
    import timm

    if not timm.is_model(file.stem):
        raise ValueError(f"{file.name} must be named after a model of timm, such as vit_base_patch16_224.safetensors.")
    made = Foundation(FoundationConfig(name=file.stem, weights=str(file)))
    return f"{file.name}: {made.depth} blocks of width {made.width}, fingerprint {made.fingerprint[:12]}"
