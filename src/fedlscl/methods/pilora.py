"""PILoRA (Guo et al., ECCV 2024, arXiv 2401.02094): one small LoRA per task and a prototype classifier.

Deviations from the released code:
- training and evaluation use the sum of all tasks' modules (the released evaluation leaves out all but the first);
- class means come from one pass in evaluation mode after local training, not from the training steps;
- prototypes of a class are re-weighted among the clients that have it (``head_aggregation: average``: among all);
- prototypes of classes that the client has not met do not compete: the released code has them as random negatives;
- equal closeness gives uniform weights (0 / 0 there), and a class that no client has keeps its prototype;
- fresh Adam, no cosine schedule over rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.data.loader import Batch
from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import Method, MethodCard, Progress, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.aggregation import weighted_average
from fedlscl.functional.objectives import cross_entropy
from fedlscl.modules import Learner
from fedlscl.nets.lora_vit import LoraViT
from fedlscl.nets.net import Net
from fedlscl.nets.vit import FoundationConfig, foundation
from fedlscl.options import Count, NonNegative, Positive, Whole


class PrototypeHead(nn.Module):
    """Logits (B, num_classes) = -distance / temperature, where d_c(x) = sqrt(||f(x) - mu_c||^2 / width).

    Prototypes mu (num_classes, width) are initialised as 0.1 N(0, 1).
    """

    def __init__(self, width: int, num_classes: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(0.1 * torch.randn(num_classes, width))

    @override
    def forward(self, features: Tensor) -> Tensor:
        return -prototype_distances(features, self.weight) / self.temperature


def prototype_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Root mean squared differences (B, num_classes) of features (B, width) and prototypes, in float32 at least.

    Example:
        >>> prototype_distances(torch.zeros(1, 4), torch.ones(2, 4) * torch.tensor([[1.0], [2.0]]))
        tensor([[1., 2.]])
    """
    with torch.autocast(features.device.type, enabled=False):
        x, y = features.to(prototypes.dtype), prototypes
        squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT
        # The root has an infinite slope at zero, and rounding can bring the sum below it.
        return (squared / x.shape[1]).clamp(min=1e-12).sqrt()


class PrototypeModule(Learner):
    """Distance-based cross-entropy and prototype loss, orthogonality to earlier modules and sparsity of this one.

    ``net`` has a PrototypeHead; ``classes`` are the columns of the cross-entropy, ``trained`` the classes whose
    prototypes get a gradient; all if None.
    """

    def __init__(
        self, net: LoraViT, task: int, options: "PILoRA", classes: Tensor | None = None, trained: Tensor | None = None
    ) -> None:
        super().__init__(net, options.lr, {"lora": options.lora_lr})
        self.task, self.options = task, options
        self.register_buffer("classes", classes, persistent=False)
        labels = torch.arange(len(net.head.weight))
        is_trained = torch.isin(labels, labels if trained is None else trained)[:, None]
        self.register_buffer("is_trained", is_trained, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """DCE, lambda_pl mean d_y, gamma_ort sum_{s<t} ||A_s A_t^T||_1, and lambda_1 ||A_t||_1; norms entry-wise."""
        options, weight = self.options, self.net.head.weight
        prototypes = torch.where(self.is_trained, weight, weight.detach())
        distances = prototype_distances(self.net(batch.images, batch.prefix).features, prototypes)
        own = distances.gather(1, batch.labels[:, None]).mean()
        overlaps = [overlap(layer.down[self.task], list(layer.down)[: self.task]) for layer in self.net.lora]
        sizes = [layer.down[self.task].abs().sum() for layer in self.net.lora]
        return {
            "cross_entropy": cross_entropy(-distances / self.net.head.temperature, batch.labels, self.classes),
            "prototype": options.lambda_prototype * own,
            "orthogonality": options.gamma_orthogonal * torch.stack(overlaps).sum(),
            "sparsity": options.lambda_sparse * torch.stack(sizes).sum(),
        }


def overlap(current: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """sum_s ||A_s A_t^T||_1, entry-wise, of down-projections A (rank, in_features); A_s get no gradient.

    Example:
        >>> overlap(torch.tensor([[1.0, 0.0]]), [torch.tensor([[0.0, 5.0]]), torch.tensor([[-2.0, 1.0]])])
        tensor(2.)
    """
    with torch.autocast(current.device.type, enabled=False):
        return (torch.cat([current[:0], *earlier]).detach() @ current.mT).abs().sum()


def prototype_weights(prototypes: Tensor, means: Tensor, temperature: float) -> Tensor:
    """Weights (n,) of n clients' prototypes (n, width) of a class by closeness to clients' class means (m, width).

    With rho_i = 1 / sum_j ||mu_i - mean_j||, scaled to 0..1, they are softmax(rho / temperature); uniform if all are
    equally close.

    Example:
        >>> prototype_weights(torch.tensor([[1.0], [9.0]]), torch.tensor([[0.0]]), 0.2).round(decimals=4)
        tensor([0.9933, 0.0067], dtype=torch.float64)
    """
    distances = (prototypes.double()[:, None] - means.double()[None]).norm(dim=2).sum(1)
    closeness = 1 / (distances + 1e-10)
    above = closeness - closeness.min()
    return (above / above.max().clamp(min=1e-12) / temperature).softmax(0)


@dataclass(kw_only=True)
class PILoRA(Method):
    """Clients train a task's LoRA and prototypes; the server averages the LoRA and re-weights the prototypes."""

    card: ClassVar = MethodCard(
        "ECCV 2024", "2401.02094", "a LoRA per task, prototypes; frozen ViT", "the task's LoRA, prototypes, class means"
    )
    batch_size: Count = 16
    """Images per step (64 in the released code)."""
    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT (self-supervised DINO in the paper)."""
    rank: Count = 4
    """LoRA rank."""
    blocks: Sequence[Whole] = (0,)
    """Adapted blocks, counted from 0."""
    targets: Sequence[str] = ("attn.q", "attn.v")
    """Adapted linear layers of a block."""
    lora_lr: Positive = 1e-4
    """Learning rate of LoRA (1e-5 in the released code); ``lr`` is that of the prototypes (2e-3 there)."""
    competing: Literal["seen", "task"] = "seen"
    """Prototypes in the cross-entropy: of all classes that the client has met so far (the released code: of all classes
    of the data set), or of its current task alone. Only those of the task are trained."""
    lambda_prototype: NonNegative = 1e-3
    """Weight of the prototype loss, the mean distance to the prototype of the label."""
    gamma_orthogonal: NonNegative = 0.5
    """Weight of the overlap with A of earlier tasks."""
    lambda_sparse: NonNegative = 0.01
    """Weight of the 1-norm of the task's A."""
    temperature: Positive = 1.0
    """tau_d: distances are divided by it in the cross-entropy."""
    server_temperature: Positive = 0.2
    """Temperature of the prototype weights at the server."""

    def build_net(self, client: int, stream: StreamShape) -> LoraViT:
        """A LoRA of each task on the frozen ViT, and prototypes."""
        head = PrototypeHead(foundation(self.foundation).width, stream.num_classes, self.temperature)
        shape = {"rank": self.rank, "blocks": self.blocks, "targets": self.targets, "num_tasks": stream.num_tasks}
        return LoraViT(self.foundation, head, **shape)

    @override
    def objective(self, client: Client) -> Learner:
        client.net.set_trainable(client.task)
        competing = client.seen if self.competing == "seen" else client.classes
        return PrototypeModule(client.net, client.task, self, competing, client.classes)

    def upload(self, client: Client) -> Payload:
        """A_t and B_t; class means and prototypes, one row for each class with samples."""
        classes, means = class_means(client, client.train_ids, unit=False)
        lora = task_lora(client.net, client.task)
        # A client's prototype of a class that it lacks is the server's; only the released rule needs it.
        rows = slice(None) if self.head_aggregation == "average" else classes
        return outgoing({**lora, "prototypes": client.net.head.weight[rows], "means": means})

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        classes, (num_classes, width) = int((upload.class_counts > 0).sum()), net.head.weight.shape
        rows = {"prototypes": num_classes if self.head_aggregation == "average" else classes, "means": classes}
        return task_lora(net, upload.task) | {n: torch.empty(rows[n], width, device="meta") for n in rows}

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Average A and B by samples, and re-weight the prototypes of every class that a client has."""
        states = [{n: v for n, v in upload.payload.items() if n.startswith("lora.")} for upload in uploads]
        merged = weighted_average(states, [upload.num_samples for upload in uploads])
        means, prototypes = (torch.cat([u.payload[name] for u in uploads]) for name in ("means", "prototypes"))
        label_of_mean = label_of_prototype = torch.cat([u.class_counts.nonzero().flatten() for u in uploads])
        if self.head_aggregation == "average":
            label_of_prototype = torch.arange(len(uploads[0].class_counts)).repeat(len(uploads))
        merged["classes"], rows = label_of_mean.unique(), []
        for label in merged["classes"]:
            candidates = prototypes[label_of_prototype == label]
            weights = prototype_weights(candidates, means[label_of_mean == label], self.server_temperature)
            rows.append((weights[:, None] * candidates.double()).sum(0).to(candidates.dtype))
        return [{**merged, "prototypes": torch.stack(rows)}] * len(uploads)

    @override
    def download(self, client: Client, payload: Payload) -> None:
        prototypes = client.net.head.weight.detach().cpu().clone()
        prototypes[payload["classes"]] = payload["prototypes"]
        lora = {name: value for name, value in payload.items() if name.startswith("lora.")}
        client.net.load_state_dict({**client.net.state_dict(), **lora, "head.weight": prototypes})


def task_lora(net: Net, task: int) -> dict[str, Tensor]:
    """A and B of one task by their names in the state dict."""
    return {name: p for name, p in net.named_parameters() if name.startswith("lora.") and name.endswith(f".{task}")}
