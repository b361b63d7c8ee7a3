"""LoRM (Salami et al., ICLR 2025, arXiv 2410.17961): LoRA modules merged in closed form over clients and over tasks.

Rounds alternate: in rounds 0, 2, ... of a task only the up-projections B are trained and merged, in the others only
the down-projections A, so that every merge has one solution. Deviations from the released code:
- merges keep the clients' mean for inputs that are zero at all clients (``regression_mean``); the pseudo-inverse
  deletes it;
- Grams are of the inputs of the net just trained (``gram_model: prediction`` is the released one);
- tasks are merged by the Grams' diagonals after every round, with those of the last round (released: the mean until
  the task's end, then one more pass with the merged weights, and one more upload);
- a head row is merged among the clients that have its class (``head_aggregation: average``: among all);
- only the trained factor, the head and Grams are sent; in B rounds the Gram is A G A^T, computed by the client.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, MethodCard, Progress, StreamShape, federated_average
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional.analytic import is_semidefinite, pack_symmetric, packed_size, unpack_symmetric
from fedlscl.modules import ClassificationModule, Learner
from fedlscl.nets.lora_vit import LoraViT, OneTask
from fedlscl.nets.net import Net, make_head
from fedlscl.nets.vit import FoundationConfig, foundation
from fedlscl.options import Count, Interval, Whole

# RegMean (Jin et al., ICLR 2023, arXiv 2212.09849). A Gram G = X X^T is a matrix (d, d), or its diagonal (d,) alone.

EPSILON = 1e-6
"""Ridge of the merge, relative to the mean eigenvalue of the summed Grams (ours); float32 sums are not more precise."""


def regression_mean(weights: Sequence[Tensor], grams: Sequence[Tensor], epsilon: float = EPSILON) -> Tensor:
    """The map W that minimises ``sum_i ||(W - W_i) X_i||^2`` for maps W_i (out, d), with G_i = X_i X_i^T.

    Solved in float64 around the plain mean M: W = M + (sum_i (W_i - M) G_i) (sum_i G_i + e I)^-1, so that directions
    without inputs keep the mean; the pseudo-inverse would delete what all clients agree on there.

    Example:
        >>> regression_mean([torch.tensor([[1.0, 1.0]]), torch.tensor([[5.0, 3.0]])],
        ...                 [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])], epsilon=1e-9)
        tensor([[2., 2.]])
    """
    maps, inputs = torch.stack([*weights]).double(), torch.stack([*grams]).double()
    mean, total = maps.mean(0), inputs.sum(0)
    ridge = epsilon * diagonal(total).mean() + torch.finfo(torch.float64).tiny
    if total.dim() == 1:
        step = ((maps - mean) * inputs[:, None]).sum(0) / (total + ridge)
    else:
        lifted = total + ridge * torch.eye(len(total), dtype=total.dtype)
        step = torch.linalg.solve(lifted, ((maps - mean) @ inputs).sum(0), left=False)
    return (mean + step).to(weights[0].dtype)


def shares(grams: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Weights (n, d) of n maps, input by input, in their regression mean with diagonal Grams (n, d).

    ``sum_i W_i * shares[i]`` is ``regression_mean``; each column sums to one.

    Example:
        >>> shares(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        tensor([[0.7500, 0.5000],
                [0.2500, 0.5000]])
    """
    double = grams.double()
    ridge = epsilon * double.sum(0).mean() + torch.finfo(torch.float64).tiny
    return ((double + ridge / len(double)) / (double.sum(0) + ridge)).to(grams.dtype)


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """Shrink a Gram (d, d) to alpha G + (1 - alpha) diag(G); a diagonal is returned unchanged."""
    return gram if gram.dim() == 1 else alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())


def project(gram: Tensor, down: Tensor) -> Tensor:
    """A G A^T (rank, rank): the Gram of the outputs of a down-projection A (rank, d)."""
    factor, inputs = down.double(), gram.double()
    projected = (factor * inputs if gram.dim() == 1 else factor @ inputs) @ factor.mT
    return ((projected + projected.mT) / 2).to(gram.dtype)


def diagonal(gram: Tensor) -> Tensor:
    """The diagonal (d,) of a Gram in either form."""
    return gram if gram.dim() == 1 else gram.diagonal()


@contextmanager
def input_grams(layers: Mapping[str, Any], full: Collection[str] = ()) -> Iterator[dict[str, Tensor]]:
    """Sum x^T x over all rows that enter each layer while the context is open, in float32 in any precision.

    ``layers`` have a ``weight`` (out, d). Those named in ``full`` give a Gram (d, d), the others its diagonal (d,).
    """
    sums = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            width = layer.weight.shape[1]
            sums[name] = layer.weight.new_zeros((width, width) if name in full else width)

            def collect(layer: Any, inputs: Any, output: Any, name: str = name) -> None:
                rows = inputs[0].detach().flatten(0, -2).float()
                with torch.autocast(rows.device.type, enabled=False):
                    gram = rows.mT @ rows if name in full else rows.square().sum(0)
                sums[name] = sums[name].to(rows.device) + gram

            hooks.enter_context(layer.register_forward_hook(collect))
        yield sums


@dataclass(kw_only=True)
class LoRM(Method):
    """Clients train one factor of a task's LoRA and a head; the server merges both by regression mean."""

    card: ClassVar = MethodCard(
        "ICLR 2025", "2410.17961", "one LoRA factor per round, head; frozen ViT", "that factor, head, Gram statistics"
    )
    batch_size: Count = 16
    """Images per step."""
    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT."""
    rank: Count = 16
    """LoRA rank; the scale alpha / rank is one."""
    blocks: Sequence[Whole] | None = None
    """Adapted blocks, counted from 0; all if None."""
    targets: Sequence[str] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    """Adapted linear layers of a block."""
    alpha_backbone: Annotated[float, Interval("[0, 1]")] = 0.0
    """alpha_G of the ViT's layers: weight of a Gram's off-diagonal entries; if 0, only diagonals are kept and sent."""
    alpha_head: Annotated[float, Interval("[0, 1]")] = 0.5
    """alpha_G of the head."""
    gram_model: Literal["trained", "prediction"] = "trained"
    """Whose inputs the Grams are of: the net with the task's module alone, or the one that predicts (released code)."""
    energy: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Sum of all clients' diagonal Grams by layer, (num_tasks, in_features)."""
    num_modules: int = field(default=0, init=False, repr=False)
    """LoRA modules per layer of the nets: tasks of the stream."""

    def build_net(self, client: int, stream: StreamShape) -> LoraViT:
        """A LoRA of each task on every adapted layer, and a linear head."""
        self.num_modules = stream.num_tasks
        head = make_head("linear", foundation(self.foundation).width, stream.num_classes)
        shape = {"rank": self.rank, "blocks": self.blocks, "targets": self.targets, "num_tasks": stream.num_tasks}
        return LoraViT(self.foundation, head, **shape)

    def begin_task(self, client: Client) -> None:
        """Weigh all tasks' modules equally until the first download."""
        for layer in client.net.lora:
            layer.share.zero_()
            layer.share[: client.task + 1] = 1 / (client.task + 1)

    def objective(self, client: Client) -> Learner:
        """Train one factor of W_0 + B_t A_t, and the head."""
        client.net.set_trainable(client.task, (factor_of_round(client.round),))
        return ClassificationModule(OneTask(client.net, client.task), client.classes, lr=self.lr)

    def upload(self, client: Client) -> Payload:
        """The trained factor, the head, and Grams of the inputs of every adapted layer and of the head."""
        net, factor = client.net, factor_of_round(client.round)
        layers = {str(n): net.foundation.linear(layer.block, layer.target) for n, layer in enumerate(net.lora)}
        full = {"head", *(layers if self.alpha_backbone else ())}
        model = OneTask(net, client.task) if self.gram_model == "trained" else net
        with input_grams({**layers, "head": net.head}, full) as grams:
            for _ in client.engine.infer(model, client.data, client.train_ids):
                pass
        payload = net.head.state_dict(prefix="head.")
        payload["gram.head"] = pack_symmetric(shrink(grams["head"], self.alpha_head))
        for n, layer in enumerate(net.lora):
            gram = shrink(grams[str(n)], self.alpha_backbone)
            payload[f"lora.{n}.{factor}.{client.task}"] = getattr(layer, factor)[client.task]
            if factor == "up":
                payload[f"energy.{n}"] = diagonal(gram)
                gram = project(gram.cpu(), layer.down[client.task].detach().cpu())
            payload[f"gram.{n}"] = pack_symmetric(gram)
        return outgoing(payload)

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        factor = factor_of_round(upload.round)
        expected = net.head.state_dict(prefix="head.")
        with torch.device("meta"):
            expected["gram.head"] = torch.empty(packed_size(net.head.weight.shape[1]))
            for n, layer in enumerate(net.lora):
                expected[f"lora.{n}.{factor}.{upload.task}"] = getattr(layer, factor)[upload.task]
                rank, inputs = layer.down[upload.task].shape
                if factor == "up":
                    expected |= {f"energy.{n}": torch.empty(inputs), f"gram.{n}": torch.empty(packed_size(rank))}
                else:
                    expected[f"gram.{n}"] = torch.empty(packed_size(inputs) if self.alpha_backbone else inputs)
        return expected

    def check_upload(self, upload: Upload) -> str:
        """Reject Grams that are not positive semidefinite."""
        payload = upload.payload
        sizes = {name.split(".")[1]: value.shape[1] for name, value in payload.items() if name.startswith("lora.")}
        sizes["head"] = payload["head.weight"].shape[1]
        for name, value in payload.items():
            kind, layer = name.split(".")[:2]
            gram = unpack_symmetric(value, sizes[layer]) if kind == "gram" else value
            if kind in ("gram", "energy") and not is_semidefinite(gram):
                return f"{name} must be positive semidefinite"
        return ""

    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Merge the trained factors and the head among clients, and update the weights of the tasks."""
        merged, task = merge_head(uploads, self.head_aggregation), progress.task
        for name in [name for name in uploads[0].payload if name.startswith("lora.")]:
            layer = name.split(".")[1]
            factors = [upload.payload[name] for upload in uploads]
            grams = [unpack_symmetric(upload.payload[f"gram.{layer}"], factors[0].shape[1]) for upload in uploads]
            merged[name] = regression_mean(factors, grams)
            diagonals = [u.payload.get(f"energy.{layer}", diagonal(g)) for u, g in zip(uploads, grams, strict=True)]
            total = torch.stack(diagonals).double().sum(0)
            energy = self.energy.setdefault(layer, total.new_zeros(self.num_modules, len(total)))
            energy[task] = total
            merged[f"lora.{layer}.share"] = torch.zeros_like(energy, dtype=torch.float32)
            merged[f"lora.{layer}.share"][: task + 1] = shares(energy[: task + 1])
        return [merged] * len(uploads)

    @override
    def download(self, client: Client, payload: Payload) -> None:
        client.net.load_state_dict({**client.net.state_dict(), **payload})


def factor_of_round(round_: int) -> str:
    """The factor that is trained in a round: B in even rounds, A in odd ones."""
    return "down" if round_ % 2 else "up"


def merge_head(uploads: list[Upload], head_aggregation: str) -> Payload:
    """Regression mean of the head's rows, among all clients or, class by class, those with the class; bias by samples.

    A class that no client has is merged among all.
    """
    rows = [upload.payload["head.weight"] for upload in uploads]
    grams = [unpack_symmetric(upload.payload["gram.head"], rows[0].shape[1]) for upload in uploads]
    biases = [replace(upload, payload={"head.bias": upload.payload["head.bias"]}) for upload in uploads]
    holds = torch.stack([upload.class_counts > 0 for upload in uploads], 1)  # (num_classes, clients)
    holds[~holds.any(1) | (head_aggregation == "average")] = True
    merged = torch.empty_like(rows[0])
    for holders in holds.unique(dim=0):
        classes, chosen = (holds == holders).all(1), holders.nonzero().flatten().tolist()
        merged[classes] = regression_mean([rows[i][classes] for i in chosen], [grams[i] for i in chosen])
    return {"head.weight": merged, **federated_average(biases, head_aggregation)}
