"""Learner: a LightningModule that is one whole local objective over one net."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from fedlscl.data.batch import Batch
from fedlscl.nets.net import Net, SmallMapPrecision, freeze_batch_norm, single_value_norms

LR = 1e-3
"""Adam's learning rate (Sec. 5.1.3)."""


class Learner(L.LightningModule, ABC):
    """One objective, trained by Adam: the federation's trainer and a stock ``lightning.Trainer`` run the same class.

    Batches are ``Batch`` or any sequence that begins with images (B, 3, h, w) and labels (B,).
    """

    if TYPE_CHECKING:
        # As in Net.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        net: Net,
        lr: float = LR,
        lr_of: Mapping[str, float] | None = None,
        freeze_norm: bool = False,
        max_norm: float | None = None,
    ) -> None:
        """``lr_of`` gives parts of the net (by the start of their names) a rate of their own; ``max_norm`` clips."""
        super().__init__()
        self.max_norm = max_norm
        self.net, self.lr, self.lr_of, self.freeze_norm = net, lr, dict(lr_of or {}), freeze_norm
        self.accuracy = MulticlassAccuracy(len(net.head.weight), average="micro")

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named terms of the objective, weights included; their sum is minimised."""

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes)."""
        return self.net(images, prefix).logits

    def train(self, mode: bool = True) -> "Learner":
        """Train, with BatchNorm's running statistics at rest where ``freeze_norm`` says so."""
        super().train(mode)
        if mode and self.freeze_norm:
            freeze_batch_norm(self.net)
        return self

    def on_fit_start(self) -> None:
        """Enter training mode, as our own trainer does; a stock Trainer leaves every part in the mode it finds."""
        self.train()

    def training_step(self, batch: Sequence[Any], batch_idx: int = 0) -> dict[str, Tensor]:
        """The sum of all terms as ``loss``, and each term detached under its name.

        BatchNorm uses running statistics where it gets one value per channel (ours).
        """
        with single_value_norms(self), SmallMapPrecision() if torch.is_autocast_enabled("cpu") else nullcontext():
            terms = self.loss(as_batch(batch))
        return {"loss": torch.stack(list(terms.values())).sum(), **{name: t.detach() for name, t in terms.items()}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the terms; only a stock Trainer calls this hook, our own trainer logs for itself."""
        terms = {f"train/{name}": value for name, value in outputs.items()}
        self.log_dict(terms, batch_size=len(as_batch(batch).labels))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient's norm where asked; both trainers call this hook."""
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.max_norm)

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Accuracy over all classes."""
        self._measure("val", as_batch(batch))

    def test_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Accuracy over all classes."""
        self._measure("test", as_batch(batch))

    def predict_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Class probabilities (B, num_classes)."""
        return self(as_batch(batch).images).softmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A fresh Adam over what the net trains."""
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad:
                starts = [start for start in self.lr_of if name.startswith(start)]
                lr = self.lr_of[max(starts, key=len)] if starts else self.lr
                groups.setdefault(lr, []).append(parameter)
        return torch.optim.Adam([{"params": params, "lr": lr} for lr, params in groups.items()], fused=True)

    def _measure(self, name: str, batch: Batch) -> None:
        self.accuracy(self(batch.images, batch.prefix), batch.labels)
        self.log(f"{name}/accuracy", self.accuracy, prog_bar=True, batch_size=len(batch.labels))


def as_batch(batch: Sequence[Any]) -> Batch:
    """A ``Batch`` from what a loader yields; images and labels alone get ids of -1."""
    return Batch(*batch) if len(batch) > 2 else Batch(batch[0], batch[1], torch.full_like(batch[1], -1))
