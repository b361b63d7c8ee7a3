"""LightningModules, one local objective each: cross-entropy, FedProx, EWC, LwF, and both stages of Fed-LSCL."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from fedlscl.data.loader import Batch
from fedlscl.functional.objectives import consistency, consolidation, cross_entropy, knowledge_distillation, proximal
from fedlscl.nets.collaborator import Collaborator, CollaboratorConfig
from fedlscl.nets.net import Frozen, Net, SmallMapPrecision, freeze_batch_norm, single_value_norms
from fedlscl.nets.vit import FoundationConfig

LR = 1e-3
"""Adam's learning rate (Sec. 5.1.3)."""


class Learner(L.LightningModule, ABC):
    """One objective on one net, trained by Adam; both `FederatedTrainer` and ``lightning.Trainer`` run it.

    Batches are ``Batch`` or any sequence that begins with images (B, 3, h, w) and labels (B,).
    """

    if TYPE_CHECKING:  # as in Net

        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self, net: Net, lr: float = LR, lr_of: Mapping[str, float] | None = None, freeze_norm: bool = False,
        max_norm: float | None = None,
    ) -> None:  # fmt: skip
        """``lr_of`` are learning rates of parts of the net, by prefix of their names; ``max_norm`` clips gradients."""
        super().__init__()
        self.net, self.freeze_norm, self.max_norm = net, freeze_norm, max_norm
        self.lr, self.lr_of = lr, dict(lr_of or {})
        self.accuracy = MulticlassAccuracy(len(net.head.weight), average="micro")

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named terms of the objective, weights included; their sum is minimised."""

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes)."""
        return self.net(images, prefix).logits

    @override
    def train(self, mode: bool = True) -> "Learner":
        """Set the mode; with ``freeze_norm`` BatchNorm stays in eval mode."""
        super().train(mode)
        if mode and self.freeze_norm:
            freeze_batch_norm(self.net)
        return self

    def on_fit_start(self) -> None:
        """Enter training mode, as `FederatedTrainer` does; ``lightning.Trainer`` keeps the mode of every part."""
        self.train()

    def training_step(self, batch: Sequence[Any], batch_idx: int = 0) -> dict[str, Tensor]:
        """The sum of all terms as ``loss``, and each term detached under its name."""
        with single_value_norms(self), SmallMapPrecision() if torch.is_autocast_enabled("cpu") else nullcontext():
            terms = self.loss(as_batch(batch))
        return {"loss": torch.stack(list(terms.values())).sum(), **{name: t.detach() for name, t in terms.items()}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the terms; `FederatedTrainer` logs them itself and does not call this hook."""
        terms = {f"train/{name}": value for name, value in outputs.items()}
        self.log_dict(terms, batch_size=len(as_batch(batch).labels))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient's norm to ``max_norm``; both trainers call this hook.

        In 16-mixed ``lightning.Trainer`` leaves gradients of a fused optimizer scaled, so they are unscaled here.
        """
        if self.max_norm is not None:
            scaler = None if self._trainer is None else getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.max_norm)

    @override
    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        self._measure("val", batch)

    @override
    def test_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        self._measure("test", batch)

    def _measure(self, name: str, batch: Sequence[Any]) -> None:
        batch = as_batch(batch)
        self.accuracy(self(batch.images, batch.prefix), batch.labels)
        self.log(f"{name}/accuracy", self.accuracy, prog_bar=True, batch_size=len(batch.labels))

    def predict_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Class probabilities (B, num_classes)."""
        return self(as_batch(batch).images).softmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A fresh Adam over the trainable parameters."""
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in trainable(self.net).items():
            starts = [start for start in self.lr_of if name.startswith(start)]
            lr = self.lr_of[max(starts, key=len)] if starts else self.lr
            groups.setdefault(lr, []).append(parameter)
        return torch.optim.Adam([{"params": params, "lr": lr} for lr, params in groups.items()], fused=True)


def as_batch(batch: Sequence[Any]) -> Batch:
    """A ``Batch`` from a loader's batch; images and labels alone get ids of -1."""
    return Batch(*batch) if len(batch) > 2 else Batch(batch[0], batch[1], torch.full_like(batch[1], -1))


class ClassificationModule(Learner):
    """Cross-entropy over the columns ``classes`` (all if None)."""

    def __init__(
        self, net: Net, classes: Tensor | None = None, counts: Tensor | None = None, **optimisation: Any
    ) -> None:
        """``counts`` of samples by class balance the softmax; ``optimisation`` are Learner's other arguments."""
        super().__init__(net, **optimisation)
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("counts", counts, persistent=False)

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.net(batch.images, batch.prefix).logits
        return {"cross_entropy": cross_entropy(logits, batch.labels, self.classes, self.counts)}


class ProximalModule(ClassificationModule):
    """FedProx: cross-entropy and ``mu / 2 ||w - w_g||^2``; w_g are the net's weights at construction."""

    def __init__(self, net: Net, mu: float, classes: Tensor | None = None, **optimisation: Any) -> None:
        super().__init__(net, classes, **optimisation)
        self.mu = mu
        self.anchor = nn.ParameterList(p.detach().clone() for p in trainable(net).values()).requires_grad_(False)

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        term = self.mu * proximal(trainable(self.net).values(), self.anchor)
        return {**super().loss(batch), "proximal": term}


class ConsolidationModule(ClassificationModule):
    """EWC: cross-entropy and ``strength / 2 sum F (w - w*)^2`` (Kirkpatrick et al., arXiv 1612.00796)."""

    def __init__(
        self, net: Net, anchor: Mapping[str, Tensor], fisher: Mapping[str, Tensor], strength: float,
        classes: Tensor | None = None, **optimisation: Any,
    ) -> None:  # fmt: skip
        """``anchor`` and ``fisher`` are by parameter name; parameters without an entry are not penalised."""
        super().__init__(net, classes, **optimisation)
        self.strength, self.names = strength, sorted(fisher)
        self.anchor = nn.ParameterList(anchor[name].detach() for name in self.names).requires_grad_(False)
        self.fisher = nn.ParameterList(fisher[name].detach() for name in self.names).requires_grad_(False)

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        weights = trainable(self.net)
        penalty = consolidation([weights[name] for name in self.names], self.anchor, self.fisher)
        return {**super().loss(batch), "consolidation": self.strength * penalty}


class DistillationModule(ClassificationModule):
    """LwF: cross-entropy, and distillation of the previous net's logits of old classes (arXiv 1606.09282)."""

    def __init__(
        self, net: Net, previous: Net, old_classes: Tensor, alpha: float, temperature: float,
        classes: Tensor | None = None, **optimisation: Any,
    ) -> None:  # fmt: skip
        """``old_classes`` are the distilled logit columns, ``alpha`` the weight of the distillation."""
        super().__init__(net, classes, **optimisation)
        self.previous, self.alpha, self.temperature = Frozen(previous), alpha, temperature
        self.register_buffer("old_classes", old_classes, persistent=False)

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.net(batch.images, batch.prefix).logits
        target = self.previous(batch.images, batch.prefix).logits[:, self.old_classes]
        term = knowledge_distillation(logits[:, self.old_classes], target, self.temperature)
        return {
            "cross_entropy": cross_entropy(logits, batch.labels, self.classes, self.counts),
            "distillation": self.alpha * term,
        }


def trainable(net: nn.Module) -> dict[str, Tensor]:
    """The net's trainable parameters by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


GENERATOR_LR, BIAS_LR, HEAD_LR = 3e-4, 1e-2, 2e-4
"""Learning rates of Phi, of b, the generator's part that all images share, and of the head: small, since its rows are
imprinted, and rows of few samples overfit (ours; the paper has one rate for all)."""
CONSISTENCY = 0.01
"""Weight of both consistency terms (not in the paper): 1 and more slow down an adapter that still improves."""


class CollaborativeModule(ClassificationModule):
    """Minimise the cross-entropy of H(Theta + phi(theta(x))) over the CNN, the generator and the head.

    Example::

        net = Collaborator(CollaboratorConfig(small_model="resnet18"), num_classes=10)
        lightning.Trainer(max_epochs=5).fit(CollaborativeModule(net), datamodule=my_data)
    """

    def __init__(
        self, net: Collaborator | Mapping[str, Any], classes: Tensor | None = None, counts: Tensor | None = None,
        lr: float = LR, generator_lr: float = GENERATOR_LR, bias_lr: float = BIAS_LR, head_lr: float = HEAD_LR,
        freeze_norm: bool = False,
    ) -> None:  # fmt: skip
        """``net`` is a collaborator, or its description in a checkpoint."""
        net = as_collaborator(net)
        parts = part_rates(generator_lr, bias_lr, head_lr)
        super().__init__(net, classes, counts, lr=lr, lr_of=parts, freeze_norm=freeze_norm)
        self.save_hyperparameters(ignore=["net", "previous", "classes", "old_classes", "counts", "kept"])
        self.save_hyperparameters({"net": describe(net)})


class ContinualFineTuningModule(CollaborativeModule):
    """Cross-entropy on replayed samples, lambda_E ||E - E'||^2 and lambda_W ||W - W'||^2 (Eq. 4).

    E' and W' are of the frozen predecessor (theta^{n-1}, phi^{n-1}). Samples of classes outside ``old_classes`` enter
    the cross-entropy only (ours: the paper replays the buffer alone, where all samples are old).
    """

    def __init__(
        self, net: Collaborator | Mapping[str, Any], previous: Collaborator | Mapping[str, Any],
        classes: Tensor | None = None, old_classes: Tensor | None = None, counts: Tensor | None = None,
        lambda_features: float = CONSISTENCY, lambda_lora: float = CONSISTENCY, consistent_bias: bool = True,
        kept: tuple[Tensor, Tensor] | None = None, freeze_norm: bool = True, **rates: float,
    ) -> None:  # fmt: skip
        """Without ``consistent_bias``, W and W' lack b: lambda_W ||Phi^T E - Phi'^T E'||^2 (ours).

        ``classes`` are the columns of the cross-entropy; None is all, for ``old_classes`` too. ``kept`` are ids (n,) of
        samples and the predecessor's features E' of them (n, feature_dim), which need not be computed at every step;
        all samples of old classes must be among them. ``rates`` are CollaborativeModule's learning rates.
        """
        super().__init__(net, classes, counts, freeze_norm=freeze_norm, **rates)
        previous = as_collaborator(previous)
        self.save_hyperparameters({"previous": describe(previous)})
        self.previous = Frozen(previous)
        self.lambda_features, self.lambda_lora = lambda_features, lambda_lora
        self.consistent_bias = consistent_bias
        self.register_buffer("old_classes", old_classes, persistent=False)
        ids, features = kept or (torch.empty(0, dtype=torch.int64), torch.empty(0, previous.feature_dim))
        order = ids.argsort()
        self.register_buffer("kept_ids", ids[order], persistent=False)
        self.register_buffer("kept_features", features[order], persistent=False)

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        now = self.net(batch.images, batch.prefix)
        old = torch.ones_like(batch.labels) if self.old_classes is None else torch.isin(batch.labels, self.old_classes)
        features, before = self._predecessor(batch)
        lora = now.lora
        if not self.consistent_bias and lora.shape[1]:
            lora, before = lora - self.net.generator.bias, before - self.previous.net.generator.bias
        return {
            "cross_entropy": cross_entropy(now.logits, batch.labels, self.classes, self.counts),
            "features": self.lambda_features * consistency(now.features, features, old),
            "lora": self.lambda_lora * consistency(lora, before, old),
        }

    @torch.no_grad()
    def _predecessor(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """E' and W' of a batch; from kept features, where rows of samples that are not kept mean nothing."""
        net = self.previous.net
        if not len(self.kept_ids) or batch.augmented:
            return net.generate(batch.images)
        index = torch.searchsorted(self.kept_ids, batch.ids).clamp_max(len(self.kept_ids) - 1)
        features = self.kept_features[index]
        return features, net.generator(features)


def part_rates(generator_lr: float, bias_lr: float, head_lr: float) -> dict[str, float]:
    """Learning rates of a collaborator's parts other than the CNN, as `Learner` takes them."""
    return {"generator": generator_lr, "generator.bias": bias_lr, "head": head_lr}


def describe(net: Collaborator) -> dict[str, Any]:
    """Plain values from which ``as_collaborator`` builds a net of the same shapes."""
    return {"num_classes": net.num_classes, "config": asdict(net.config)}


def as_collaborator(net: Collaborator | Mapping[str, Any]) -> Collaborator:
    """The collaborator itself, or a new one from its description."""
    if isinstance(net, Collaborator):
        return net
    config = {**net["config"], "foundation": FoundationConfig(**net["config"]["foundation"])}
    return Collaborator(CollaboratorConfig(**config), net["num_classes"])
