"""Data sets and weights: what lies in a folder, what a configuration needs, and whether it loads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fedlscl.cli.errors import explain
from fedlscl.data.datasets import load_cifar100
from fedlscl.data.decode import decode_one
from fedlscl.data.folder import SUFFIXES, imagenet_r_folder
from fedlscl.data.images import ImageData
from fedlscl.data.npz import load_npz
from fedlscl.nets.vit import Foundation, FoundationConfig

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
    from fedlscl.cli.app import FederatedCLI
    from fedlscl.cli.configuration import check_config

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
        return f"{_size(data.data)}; {data.num_clients} clients x {data.num_tasks} tasks"

    def build() -> str:
        net = method.build_net(0, data.num_classes if loaded.is_well else 1000)
        vit = net.foundation
        frozen = "no frozen ViT" if vit is None else f"{vit.config.name}, weights {vit.fingerprint[:12]}"
        return f"{type(net).__name__} of {sum(p.numel() for p in net.parameters()):,} parameters; {frozen}"

    loaded = _attempt("data", load)
    yield loaded
    yield _attempt("nets", build)


def _tried(root: Path) -> Iterator[Finding]:
    if (root / "cifar-100-python").is_dir():
        yield _attempt("data", lambda: f"cifar100: {_size(load_cifar100(root, download=False))}")
    if (root / "imagenet-r").is_dir():
        yield _attempt("data", lambda: f"imagenet-r: {_classes(imagenet_r_folder(root))}")
    for file in sorted(root.glob("*.npz")):
        yield _attempt("data", lambda file=file: f"{file.name}: {_size(load_npz(file))}")
    known = ("cifar-100-python", "imagenet-r", "train", "test", "val")
    if (root / "train").is_dir():
        yield _attempt("data", lambda: f"folder, train: {_classes(root / 'train')}")
    elif any(_images(path) for path in root.iterdir() if path.is_dir() and path.name not in known):
        yield _attempt("data", lambda: f"folder: {_classes(root)}")
    for file in sorted(root.glob("*.safetensors")):
        yield _attempt("weights", lambda file=file: _weights(file))


def _attempt(name: str, what: Callable[[], str]) -> Finding:
    try:
        return Finding(name, what())
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        return Finding(name, " ".join(message.split()), False)


def _size(data: ImageData) -> str:
    """Images and classes of a loaded data set."""
    side = "x".join(str(pixels) for pixels in data.train_images.shape[2:])
    return f"{len(data.train_labels):,} + {len(data.test_labels):,} images of {side}, {data.num_classes} classes"


def _classes(root: Path) -> str:
    """Images of class folders, the first of every class decoded."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    images = [_images(path) for path in folders]
    for path, of_class in zip(folders, images, strict=True):
        if not of_class:
            raise ValueError(f"{path} holds no image ({', '.join(sorted(SUFFIXES))}): add some, or remove the folder.")
        decode_one(of_class[0], 8)
    return f"{sum(map(len, images)):,} images, {len(folders)} classes"


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _weights(file: Path) -> str:
    import timm

    if not timm.is_model(file.stem):
        raise ValueError(f"{file.name} is named after no model of timm: name it so, such as vit_base_patch16_224.")
    made = Foundation(FoundationConfig(name=file.stem, weights=str(file)))
    return f"{file.name}: {made.depth} blocks of width {made.width}, fingerprint {made.fingerprint[:12]}"
