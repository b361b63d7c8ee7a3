"""``fedlscl doctor``: what works on this machine."""

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from fedlscl.callbacks.formatting import in_bytes
from fedlscl.cli.errors import PACKAGE, explain
from fedlscl.cli.report import Parser
from fedlscl.data import load_images
from fedlscl.data.folders import contents, imagenet_r_folder, list_folder, part_meant
from fedlscl.data.images import ImageData
from fedlscl.federated.engine import chosen_precision
from fedlscl.federated.method import StreamShape
from fedlscl.nets.vit import Foundation, FoundationConfig

# Data sets and weights: what lies in a folder, what a configuration needs, and whether it loads.

KNOWN = "cifar-100-python, imagenet-r, .npz files, folders of classes with images, .safetensors files"


class Finding(NamedTuple):
    """One thing that was looked for."""

    name: str
    text: str
    is_well: bool = True


def found_in(root: Path) -> Iterator[Finding]:
    """Everything in a folder that `fedlscl` can use, loaded."""
    if not root.is_dir():
        yield Finding("data", f"{root} is no folder: give the one that holds data sets or weights", False)
        return
    found = list(_tried(root))
    yield from found or [Finding("data", f"nothing known lies in {root}: put there one of {KNOWN}", False)]


def needed_by(config: str, root: Path | None) -> Iterator[Finding]:
    """Data set, split and nets of a configuration, made as ``fit`` would make them."""
    from fedlscl.cli.app import FederatedCLI, check_config

    class Configured(FederatedCLI):
        """Made, not run."""

        def _run_subcommand(self, subcommand: str) -> None: ...

    words = ["fit", "--config", config, *([] if root is None else ["--data.root", str(root)])]
    made: list[Configured] = []

    def read() -> str:
        check_config(config)
        made.append(Configured(words))
        return f"{config} is understood: {type(made[0].model).__name__} on {made[0].datamodule.dataset}"

    yield _attempt("config", read)
    if not made:
        return
    method, data, seed = made[0].model, made[0].datamodule, made[0].trainer.seed

    def load() -> str:
        data.run_seed = seed
        data.setup()
        return f"{_described(data.data)}; {data.num_clients} clients x {data.num_tasks} tasks"

    def build() -> str:
        num_classes = data.num_classes if loaded.is_well else 1000
        net = method.build_net(0, StreamShape(num_classes, data.num_clients, data.num_tasks))
        vit = net.foundation
        frozen = "no frozen ViT" if vit is None else f"{vit.config.name}, weights {vit.fingerprint[:12]}"
        return f"{type(net).__name__} of {sum(p.numel() for p in net.parameters()):,} parameters; {frozen}"

    loaded = _attempt("data", load)
    yield loaded
    yield _attempt("nets", build)


def _tried(root: Path) -> Iterator[Finding]:
    if (root / "cifar-100-python").is_dir():
        yield _attempt("data", lambda: f"cifar100: {_described(load_images('cifar100', str(root)))}")
    if (root / "imagenet-r").is_dir():
        yield _attempt("data", lambda: _folder("imagenet-r", root))
    for file in sorted(root.glob("*.npz")):
        yield _attempt("data", lambda file=file: f"{file.name}: {_described(load_images(file.name, str(root)))}")
    known = ("cifar-100-python", "imagenet-r")
    places = [place for place in contents(root).folders if place.name not in known]
    # Images in a folder, or one level deeper if that is a part of a data set, well named or not.
    deeper = [found for place in places if part_meant(place.name) for found in contents(place).folders]
    if any(contents(place).images for place in [*places, *deeper]):
        yield _attempt("data", lambda: _folder("folder", root))
    for file in sorted(root.glob("*.safetensors")):
        yield _attempt("weights", lambda file=file: _weights(file))


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
    told = [str(warning.message) for warning in caught if warning.filename.startswith(PACKAGE)]
    return Finding(name, " ".join("; ".join([text, *told]).split()), is_well)


def _described(data: ImageData) -> str:
    """Images and classes of a loaded data set, and how many test images are also in train."""
    side = "x".join(str(pixels) for pixels in data.train_images.shape[2:])
    shared = _shared(*((image.numpy().tobytes() for image in part) for part in (data.train_images, data.test_images)))
    return f"{_size(data)} of {side}, {data.num_classes} classes{shared}"


def _size(data: ImageData) -> str:
    return f"{len(data.train_labels):,} + {len(data.test_labels):,} images"


def _folder(dataset: str, root: Path) -> str:
    """An image folder loaded as ``fit`` loads it, though small, and equal files in train and test."""
    with tempfile.TemporaryDirectory() as cache:
        data = load_images(dataset, str(root), image_size=8, cache_dir=cache)
    with warnings.catch_warnings(action="ignore"):
        place = imagenet_r_folder(root) if dataset == "imagenet-r" else root
        _, train, test = list_folder(place, seed=0)
    shared = _shared(*((file.read_bytes() for file, _ in part) for part in (train, test)))
    return f"{dataset}: {_size(data)}, {data.num_classes} classes{shared}"


def _shared(train: Iterable[bytes], test: Iterable[bytes]) -> str:
    known = {hashlib.sha256(content).digest() for content in train}
    count = sum(hashlib.sha256(content).digest() in known for content in test)
    return f"; test images also in train: {count:,} (remove them from one part)" if count else ""


def _weights(file: Path) -> str:
    import timm

    if not timm.is_model(file.stem):
        raise ValueError(f"{file.name} is named after no model of timm: name it so, such as vit_base_patch16_224.")
    made = Foundation(FoundationConfig(name=file.stem, weights=str(file)))
    return f"{file.name}: {made.depth} blocks of width {made.width}, fingerprint {made.fingerprint[:12]}"


# ``fedlscl doctor``: whether this machine has what a run needs, in one line for each thing, with the remedy.

PACKAGES = ("fedlscl", "torch", "torchvision", "lightning", "timm", "tensorboard")
EXTRAS = {
    "digits": ("scikit-learn", "the demo's data set"),
    "secure": ("cryptography", "secure sums"),
    "noise": ("dp-accounting", "differential privacy"),
    "flower": ("flwr", "federations over a network"),
}
"""By extra: the package in it, and what for."""
SIDE = 512
"""Rows of the matrices that are multiplied."""
PATIENCE = 2.0
"""Seconds after which a product counts as slow, and is not repeated."""
MUCH = 1.2
"""Ratio from which one precision is called faster than the other."""


def doctor(arguments: list[str]) -> None:
    """Print the findings; the exit status is 1 if something that was asked for does not work."""
    usage = "fedlscl doctor [--data_root DIR] [--config FILE]"
    parser = Parser(usage=usage, description="Say what works on this machine.", allow_abbrev=False)
    parser.add_argument("--data_root", metavar="DIR", type=Path, help="folder of data sets and weights to try.")
    parser.add_argument("--config", metavar="FILE", help="configuration whose data set and nets are tried.")
    given = parser.parse_args(arguments)
    is_well = True
    for finding in findings(given.data_root, given.config):
        print(f"{'ok' if finding.is_well else 'FAILS':<7}{finding.name:<12}{finding.text}", flush=True)
        is_well &= finding.is_well
    if not is_well:
        raise SystemExit(1)


def findings(data_root: Path | None, config: str | None) -> Iterator[Finding]:
    """Everything about this machine, and what was asked for."""
    yield Finding("python", f"{platform.python_version()} in {sys.prefix}")
    yield Finding("versions", ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    for extra, (package, use) in EXTRAS.items():
        yield Finding(f"[{extra}]", _extra(extra, package, use))  # optional, so that its absence is no fault
    yield Finding("devices", _devices())
    for device in ("cpu", "cuda"):
        if device == "cpu" or torch.cuda.is_available():
            yield Finding("precision", _precision(device))
    yield Finding("memory", _memory())
    here = shutil.disk_usage(".")
    yield Finding("disk", f"{in_bytes(here.free)} free of {in_bytes(here.total)} here, where runs go")
    if config is not None:
        yield from needed_by(config, data_root)
    elif data_root is not None:
        yield from found_in(data_root)


def precision_advice(float32: float, bf16: float, is_chosen: bool) -> str:
    """Which precision to take, from seconds of the same product in both.

    Example:
        >>> precision_advice(0.01, 2.0, is_chosen=False)
        'bf16 is 200 times slower than fp32: take --trainer.precision 32-true'
        >>> precision_advice(0.4, 0.1, is_chosen=True)
        'bf16 is 4.0 times faster than fp32: take --trainer.precision bf16-mixed, or auto'
    """
    slower, ratio = bf16 > float32, max(bf16, float32) / min(bf16, float32)
    if ratio < MUCH:
        return "bf16 is as fast as fp32: take --trainer.precision 32-true"
    times = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
    best = "32-true" if slower else "bf16-mixed"
    auto = ", or auto" if is_chosen else ""
    return f"bf16 is {times} times {'slower' if slower else 'faster'} than fp32: take --trainer.precision {best}{auto}"


def _extra(extra: str, package: str, use: str) -> str:
    try:
        return f"{package} {version(package)}: {use}"
    except PackageNotFoundError:
        return f"{package} is absent: for {use}, pip install 'fedlscl[{extra}]'"


def _devices() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [f"cpu ({platform.machine()}, {cores} cores, {torch.get_num_threads()} threads)"]
    words += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    words += ["mps"] if torch.backends.mps.is_available() else []
    return (
        ", ".join(words)
        if len(words) > 1
        else f"{words[0]}; no GPU: take the presets for a CPU, digits or cifar100_small"
    )


def _precision(device: str) -> str:
    seconds = {dtype: _product(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = "32-true" if seconds[torch.bfloat16] >= seconds[torch.float32] else "bf16-mixed"
    is_chosen = chosen_precision("auto", device) == best
    rates = [
        f"{name} {2e-9 * SIDE**3 / seconds[dtype]:,.1f}"
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    advice = precision_advice(seconds[torch.float32], seconds[torch.bfloat16], is_chosen)
    return f"{device}: {' and '.join(rates)} GFLOP/s; {advice}"


def _product(device: str, dtype: torch.dtype) -> float:
    """Seconds of a matrix product: the best of five, or the first where that takes long."""
    left, right = (torch.rand(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - started)
        if best > PATIENCE:
            break
    return best


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = f"{in_bytes(page * os.sysconf('SC_AVPHYS_PAGES'))} free of " if "SC_AVPHYS_PAGES" in os.sysconf_names else ""
    cuda = [f"cuda:{i} {in_bytes(torch.cuda.mem_get_info(i)[0])} free" for i in range(torch.cuda.device_count())]
    return ", ".join([f"{free}{in_bytes(total)}", *cuda])
