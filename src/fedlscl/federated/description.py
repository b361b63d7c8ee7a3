"""What a run is made of, in plain values: its method, its data, its nets."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedlscl.nets.small import SmallModel

if TYPE_CHECKING:
    from fedlscl.federated.trainer import FederatedTrainer


def parameter_counts(trainer: "FederatedTrainer") -> dict[str, Any]:
    """Parameters of each client's net, the shared foundation included in ``total``, by client."""
    nets = [client.net for client in trainer.clients]
    foundation = nets[0].foundation
    shared = 0 if foundation is None else sum(p.numel() for p in foundation.vit.parameters())
    return {
        "foundation": shared,
        "trainable": [sum(p.numel() for p in net.parameters() if p.requires_grad) for net in nets],
        "total": [shared + sum(p.numel() for p in net.parameters()) for net in nets],
    }


def describe_foundation(trainer: "FederatedTrainer") -> dict[str, Any] | None:
    """The frozen ViT's name, SHA-256 of its weights, and mean and std of its input; None where the method has none."""
    foundation = trainer.clients[0].net.foundation
    if foundation is None:
        return None
    named = {"name": foundation.config.name, "fingerprint": foundation.fingerprint}
    return named | normalisation(foundation.mean, foundation.std)


def describe_small_models(trainer: "FederatedTrainer") -> list[dict[str, Any]]:
    """Name, mean and std of every small model, without repetition."""
    models = [part for client in trainer.clients for part in client.net.modules() if isinstance(part, SmallModel)]
    found = [{"name": model.name, **model.normalisation} for model in models]
    return [model for place, model in enumerate(found) if model not in found[:place]]


def normalisation(mean: Tensor, std: Tensor) -> dict[str, list[float]]:
    """Mean and std (3,) of images in 0..1, to six decimals: without float32's rounding."""
    return {"mean": [round(x, 6) for x in mean.tolist()], "std": [round(x, 6) for x in std.tolist()]}


def describe_data(trainer: "FederatedTrainer") -> dict[str, Any]:
    """The data set and who gets what of it: client x task."""
    data = trainer.datamodule
    tasks, streams = range(trainer.num_tasks), [data.stream(client) for client in range(data.num_clients)]
    return {
        "dataset": data.dataset,
        "fingerprint": data.data.fingerprint,
        "num_classes": data.num_classes,
        "num_clients": data.num_clients,
        "num_tasks": trainer.num_tasks,
        "classes": [[stream.classes(task).tolist() for task in tasks] for stream in streams],
        "train_samples": [[len(stream.train_ids(task)) for task in tasks] for stream in streams],
        "test_samples": [[len(stream.test_ids(task)) for task in tasks] for stream in streams],
    }


def plain(value: Any) -> Any:
    """Fields of dataclasses by name, and what JSON can say as it is; NaN becomes None.

    Example:
        >>> plain({"a": (1, float("nan"))})
        {'a': [1, None]}
    """
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if isinstance(value, int | str | None) else str(value)
