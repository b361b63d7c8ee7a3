"""Classes of image files by one client's trained net; needs the run directory, not the data set."""

import csv
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlscl.cli.identity import identify, learned_part
from fedlscl.cli.runs import MANIFEST
from fedlscl.data.decode import centre_crop, covering, read_image
from fedlscl.data.folder import ENDINGS, find_images
from fedlscl.data.manifest import preparation, read_manifest
from fedlscl.federated.checkpoint import load_last_good, write_atomically
from fedlscl.federated.device import connect
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.trainer import FederatedTrainer

logger = logging.getLogger(__name__)

CHUNK = 64
"""Images per forward pass."""


class Prediction(NamedTuple):
    """A line of the CSV."""

    image: str
    rank: int
    """From 1, the most probable class."""
    label: str
    probability: float
    """Among the classes that the client has seen."""


class Predictor:
    """One client's net as a checkpoint holds it.

    Args:
        trainer: gives device and precision.
        method: builds the net.
        config: the resolved configuration.
        checkpoint: file of a run, with manifest.json beside it.
        client: which client's net.

    Raises:
        ValueError: if the checkpoint belongs to another configuration, or has no such client.
    """

    def __init__(
        self, trainer: FederatedTrainer, method: Method, config: dict[str, Any], checkpoint: Path, client: int
    ) -> None:
        manifest = read_manifest(checkpoint.with_name(MANIFEST))
        if not 0 <= client < len(manifest.splits):
            raise ValueError(f"client={client} does not exist: choose 0 to {len(manifest.splits) - 1}.")
        # Before the identity, which can only say that something differs: building says which file is missing.
        net = method.build_net(client, len(manifest.class_names))
        identity = learned_part(identify(config, manifest.fingerprint, manifest.splits))
        state = load_last_good(checkpoint, identity)
        learned = Progress(*state["progress"]).learned + 1
        classes = sorted(label for task in manifest.splits[client].classes[:learned] for label in task)
        self.prepared = preparation(manifest)
        self.num_reshaped = 0
        self.names = [manifest.class_names[label] for label in classes]
        self.fabric = connect(trainer.accelerator, trainer.devices, trainer.precision)
        net.load_state_dict(state["clients"][client]["net"])
        self.net = self.fabric.to_device(net).eval()
        self.classes = torch.tensor(classes, device=self.fabric.device)
        self.unreadable: list[str] = []
        """One line for each file that could not be read."""

    def predict(self, files: list[Path], top: int) -> Iterator[Prediction]:
        """The ``top`` classes of each file, best first; what cannot be read is left to ``unreadable``."""
        for start in range(0, len(files), CHUNK):
            chunk, images = [], []
            for file in files[start : start + CHUNK]:
                try:
                    images.append(self.read(file))
                    chunk.append(file)
                except ValueError as error:
                    self.unreadable.append(str(error))
            if not chunk:
                continue
            values, ranked = self.probabilities(torch.from_numpy(np.stack(images))).topk(min(top, len(self.names)))
            for file, row, labels in zip(chunk, values.tolist(), ranked.tolist(), strict=True):
                for rank, (probability, label) in enumerate(zip(row, labels, strict=True), start=1):
                    yield Prediction(str(file), rank, self.names[label], probability)
        if self.num_reshaped:
            logger.warning(
                f"{self.num_reshaped} of {len(files)} images do not have the data set's aspect ratio, width x height = "
                f"{self.prepared.width} x {self.prepared.height}: only their centre was used"
            )

    def read(self, file: Path) -> np.ndarray:
        """An image (3, h, w) uint8, prepared like those of the data set."""
        image, (height, width, is_cropped) = read_image(file), self.prepared
        self.num_reshaped += not is_cropped and covering(image, height, width) != (width, height)
        return centre_crop(image, height, width)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities (B, classes seen) of stored images (B, 3, h, w), uint8."""
        with self.fabric.autocast():
            logits = self.net(self.fabric.to_device(images)).logits
        return logits[:, self.classes].float().softmax(1).cpu()


def image_files(path: Path) -> list[Path]:
    """A file under any name, or all images below a folder in order, by the rules of `find_images`.

    Raises:
        ValueError: if there is none.
    """
    if path.is_file():
        return [path]
    files = find_images(path) if path.is_dir() else []
    if not files:
        what = "a folder without images" if path.is_dir() else "a path that does not exist"
        raise ValueError(f"images {str(path)!r} must be an image file or a folder of images ({ENDINGS}), got {what}.")
    return files


def write_csv(predictions: list[Prediction], out: Path | None) -> None:
    """Write a CSV file whole or not at all, or print it where none is named."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "rank", "class", "probability"))
    writer.writerows((*row[:3], f"{row.probability:.6f}") for row in predictions)
    if out is None:
        sys.stdout.write(text.getvalue())
    else:
        write_atomically(out, text.getvalue().encode())
