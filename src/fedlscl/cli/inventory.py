"""Data sets and weights: what lies in a folder, what a configuration needs, and whether it loads."""

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fedlscl.cli.errors import PACKAGE, explain
from fedlscl.data.datasets import load_images
from fedlscl.data.folder import contents, imagenet_r_folder, list_folder, part_meant
from fedlscl.data.images import ImageData
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
        return f"{_described(data.data)}; {data.num_clients} clients x {data.num_tasks} tasks"

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
