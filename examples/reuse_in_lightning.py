"""Fed-LSCL's two local objectives in your project: a stock Trainer with your data, callback and logger.

Run it with ``python examples/reuse_in_lightning.py``; it takes seconds and needs no download.
"""

import logging
from copy import deepcopy

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from fedlscl import (
    CollaborativeModule,
    Collaborator,
    CollaboratorConfig,
    ContinualFineTuningModule,
    FoundationConfig,
)

CONFIG = CollaboratorConfig(
    foundation=FoundationConfig(name="vit_glyph_patch4_32", weights="bundled"),
    small_model="test_resnet",
    small_image_size=32,
    blocks=[9],
)
OLD, NEW = range(5), range(5, 10)


class Digits(L.LightningDataModule):
    """Your data: (image, label) with floats (3, 8, 8) in 0..1; ``old`` samples are replayed beside new ones."""

    def __init__(self, classes: range, old: Dataset | None = None, per_class: int = 20) -> None:
        super().__init__()
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
        self.everything = TensorDataset(images, torch.tensor(data.target))
        self.old = old
        self.places = [torch.tensor((data.target == label).nonzero()[0]) for label in classes]
        self.per_class = per_class

    def part(self, start: int, stop: int) -> Dataset:
        """Some samples of each class."""
        return Subset(self.everything, torch.cat([places[start:stop] for places in self.places]).tolist())

    def train_dataloader(self) -> DataLoader:
        """The classes of the task, and what is replayed."""
        now = self.part(0, self.per_class)
        return DataLoader(now if self.old is None else ConcatDataset([now, self.old]), batch_size=16, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        """Held-out samples."""
        return DataLoader(self.part(100, 120), batch_size=100)


class Losses(L.Callback):
    """Your callback: the cross-entropy of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: dict, *_: object) -> None:
        """Record the loss of a step."""
        self.values.append(float(outputs["cross_entropy"]))


def train(module: L.LightningModule, data: Digits, name: str) -> list[float]:
    """Train with a stock Trainer, a callback, checkpoints and a logger; returns the loss of each step."""
    losses = Losses()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[losses, ModelCheckpoint(monitor="train/cross_entropy")],
        logger=CSVLogger("lightning_logs", name=name),
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    return losses.values


@torch.no_grad()
def imprint(net: Collaborator, data: Digits) -> None:
    """Start the rows of new classes at their mean features."""
    images, labels = map(torch.cat, zip(*DataLoader(data.part(0, 20), batch_size=100), strict=True))
    tokens = torch.nn.functional.normalize(net.eval()(images).tokens)
    classes = labels.unique()
    net.head.imprint(classes, torch.stack([tokens[labels == label].mean(0) for label in classes]))


def accuracy(module: L.LightningModule, classes: range) -> float:
    """Accuracy on held-out images, all ten classes competing."""
    tester = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    return tester.test(module, Digits(classes), verbose=False)[0]["test/accuracy"]


def main() -> dict[str, float]:
    """Two tasks of five digits; the second with and without Stage 2."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(42, verbose=False)
    net = Collaborator(CONFIG, num_classes=10)
    found = {}

    # Task 1, Eq. 3.
    first = Digits(OLD)
    imprint(net, first)
    losses = train(CollaborativeModule(net, freeze_norm=True), first, "task1")
    found["loss, first step"], found["loss, last step"] = losses[0], losses[-1]
    found["old after task 1"] = accuracy(CollaborativeModule(net), OLD)
    previous = deepcopy(net)  # theta^{n-1}, phi^{n-1}; the frozen ViT is shared, not copied

    # Task 2, Eq. 3 again; then Eq. 4 on a small buffer and as many of the new samples.
    second = Digits(NEW)
    imprint(net, second)
    train(CollaborativeModule(net, freeze_norm=True), second, "task2")
    found["old after Stage 1 of task 2"] = accuracy(CollaborativeModule(net), OLD)
    stage_two = ContinualFineTuningModule(net, previous, old_classes=torch.tensor(OLD))
    train(stage_two, Digits(NEW, old=first.part(0, 10), per_class=10), "task2_stage2")
    found["old after Stage 2 of task 2"] = accuracy(stage_two, OLD)
    found["new after Stage 2 of task 2"] = accuracy(stage_two, NEW)
    return found


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:28} {value:.3f}")
