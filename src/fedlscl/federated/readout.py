"""Readouts: the same closed-form classifiers on the features of every method, beside its own head.

Own heads differ in what they are: one method's trained rows and another's discriminant do not compare features. A
readout does: after the last download of a task each client sums up second moments of its features (``MomentSums``), the
server adds the sums of all clients and tasks, solves the heads, and every client evaluates them. Sums over all data at
once follow from sums of disjoint parts, so a readout forgets nothing but what the features forget. All of it is ours;
the family is described at `fedlscl.methods.training_free`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.data import Batch
from fedlscl.federated.client import Client
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.metrics import MASKS
from fedlscl.federated.payload import Payload, Upload, num_bytes, outgoing
from fedlscl.functional import analytic
from fedlscl.functional.analytic import MomentSums
from fedlscl.nets.net import Net
from fedlscl.options import Interval, Positive, Whole, check_options

logger = logging.getLogger(__name__)
ReadoutHead = Literal["lda", "ridge", "ncm"]
FeatureView = Literal["adapted", "frozen", "small", "frozen+small"]


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """Which classifiers are solved on which features; none by default."""

    heads: Sequence[ReadoutHead] = ()
    """lda: linear discriminant analysis with equal priors; ridge: regression on one-hot labels; ncm: nearest class mean
    by cosine."""
    features: Sequence[FeatureView] = ("adapted",)
    """adapted: the input of the net's own head; frozen: the features of the frozen ViT without adaptation; small: the
    pooled features of the small model; frozen+small: both, each scaled to unit norm. Nets without a part leave its
    features out."""
    random_features: Whole = 0
    """Width of a fixed random projection with ReLU before the heads (RanPAC, arXiv 2307.02251); 0 for none."""
    shrinkage: Annotated[float, Interval("(0, 1]")] = 0.2
    """Shrinkage of the covariance of lda, in (0, 1]."""
    ridge: Positive = 0.01
    """Regularisation of ridge, relative to the mean eigenvalue of the Gram matrix."""

    def __post_init__(self) -> None:
        check_options(self, "readouts.")
        for name in ("heads", "features"):
            values = list(getattr(self, name))
            if len(set(values)) < len(values):
                raise ValueError(f"readouts.{name} must be different ones, got {values}.")
        if self.heads and not self.features:
            raise ValueError("readouts.features must name features for the heads, got none.")

    def widths(self, net: Net) -> dict[str, int]:
        """Widths of the features that a net has, by name in the order of ``features``; none without heads or a ViT."""
        if not self.heads or net.foundation is None:
            return {}
        frozen = net.foundation.width
        found = {"adapted": frozen, "frozen": frozen}
        if (small := getattr(net, "small", None)) is not None:
            found |= {"small": small.width, "frozen+small": frozen + small.width}
        return {name: self.random_features or found[name] for name in self.features if name in found}

    def views(self, net: Net, batch: Batch) -> dict[str, Tensor]:
        """Features (B, width) of a prepared batch, by name."""
        names, found = self.widths(net).keys(), {}
        if "adapted" in names:
            found["adapted"] = net(batch.images, batch.prefix).head_input
        if names & {"frozen", "frozen+small"}:
            assert net.foundation is not None
            prefix = net.frozen_prefix(batch.images) if batch.prefix is None else batch.prefix.float()
            found["frozen"] = net.foundation.to(batch.images.device).features(prefix, net.entry)
        if names & {"small", "frozen+small"}:
            found["small"] = net.small(batch.images)
        if "frozen+small" in names:
            found["frozen+small"] = torch.cat([F.normalize(found[part].float()) for part in ("frozen", "small")], 1)
        return {name: analytic.random_features(found[name], self.random_features) for name in names}

    def solve(self, sums: MomentSums) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight (num_classes, width) and bias (num_classes,) of every head, on unit features."""
        solutions = {
            "lda": lambda: analytic.discriminant_solution(sums, self.shrinkage),
            "ridge": lambda: analytic.ridge_solution(sums, self.ridge),
            "ncm": lambda: analytic.ncm_solution(sums),
        }
        return {head: solutions[head]() for head in self.heads}


def check_readouts(config: ReadoutConfig, method: Method) -> None:
    """Raise a ValueError where sums of a method's features would break its privacy, or do not add up."""
    if not config.heads:
        return
    if method.adds_noise:
        raise ValueError(
            f"readouts.heads must be empty for a method that adds noise, got {', '.join(config.heads)}: the sums of "
            "readouts would be sent without it."
        )
    small = [name for name in config.features if "small" in name]
    if small and not method.has_equal_small_models:
        raise ValueError(
            "readouts.features must leave out small models that differ between clients, whose features do not add up, "
            f"got {', '.join(small)}: name others, or give all clients one small model and shared_initialisation."
        )


def check_widths(config: ReadoutConfig, nets: Sequence[Net]) -> dict[str, int]:
    """Widths of the features of all clients' nets; raises a ValueError if they differ, since sums would not add up."""
    widths = [config.widths(net) for net in nets]
    if missing := [name for name in config.features if config.heads and name not in widths[0]]:
        logger.warning(
            f"readouts.features: the method's nets have no features {', '.join(missing)}, and so no readouts of them"
        )
    for name in widths[0]:
        if len(found := {each.get(name) for each in widths}) > 1:
            raise ValueError(
                f"readouts.features must be features of one width on all clients, got {name} of widths "
                f"{', '.join(str(width) for width in sorted(found, key=str))}: leave {name} out, or give all clients "
                "the same small model."
            )
    return widths[0]


def client_sums(client: Client, config: ReadoutConfig, whole: bool = False) -> Payload:
    """A client's message after a task: the packed sums of each of its feature views over the task's training samples.

    Args:
        client: its net computes the features.
        config: which features.
        whole: send the Gram matrix itself and the columns of all classes, in float64, and zeros without samples: masked
            summands must have equal shapes and add up.
    """
    num_classes, counts = client.data.data.num_classes, client.data.class_counts(client.task)
    widths = config.widths(client.net) if whole or counts.any() else {}
    none = torch.zeros(0, dtype=torch.int64)
    total = {name: analytic.moment_sums(torch.zeros(0, width), none, num_classes) for name, width in widths.items()}
    for batch, views in client.engine.infer(
        client.net, client.data, client.train_ids, views=lambda batch: config.views(client.net, batch)
    ):
        for name, features in views.items():
            part = analytic.moment_sums(features.cpu(), batch.labels.cpu(), num_classes)
            total[name] = analytic.added(total[name], part)
    payload: Payload = {}
    for name, sums in total.items():
        gram, products = sums if whole else analytic.pack_sums(sums, counts)
        payload |= {f"{name}.gram": analytic.pack_symmetric(gram) if whole else gram, f"{name}.products": products}
    return outgoing(payload)


class Readouts:
    """The server's part: sums over all clients and tasks, and what the clients measured with the heads."""

    def __init__(self, config: ReadoutConfig, method: Method, num_clients: int, num_tasks: int) -> None:
        self.config, self.method = config, method
        self.widths: dict[str, int] = {}
        """Of the features that the clients have, by name; empty before their nets are known."""
        self.sums: dict[str, MomentSums] = {}
        """By feature view."""
        self.values: dict[str, Tensor] = {}
        """Accuracies (masks, clients, tasks, tasks) by readout, such as 'adapted/lda'; NaN where not measured."""
        self.traffic = {way: torch.zeros(num_clients, num_tasks, dtype=torch.int64) for way in ("up", "down")}
        """Bytes, (clients, tasks) each."""

    @property
    def names(self) -> list[str]:
        """Names of the readouts, feature view before head."""
        return [f"{view}/{head}" for view in self.widths for head in self.config.heads]

    def upload_spec(self, upload: Upload, net: Net) -> Payload:
        """Expected names, shapes and dtypes of ``client_sums``; without samples a client sends nothing."""
        is_masked = self.method.masks_sums
        columns = len(upload.class_counts) if is_masked else int((upload.class_counts > 0).sum())
        dtype = torch.int64 if is_masked else torch.float32
        spec: Payload = {}
        for name, width in self.widths.items() if columns else ():
            spec[f"{name}.gram"] = torch.empty(analytic.packed_size(width + 1), dtype=dtype, device="meta")
            spec[f"{name}.products"] = torch.empty(width + 1, columns, dtype=dtype, device="meta")
        return spec

    def check_upload(self, upload: Upload) -> str:
        """Whether sums are of as many samples of each class as announced; masked ones cannot be checked."""
        for name in self.widths if upload.payload and not self.method.masks_sums else ():
            sums = analytic.unpack_sums(_named(name, upload.payload), upload.class_counts)
            if error := analytic.sums_error(sums, upload.class_counts):
                return f"{name}.{error}"
        return ""

    def add(self, uploads: list[Upload], progress: Progress) -> Payload:
        """Add the clients' sums and solve all heads: ``VIEW/HEAD.weight`` and ``.bias`` for all clients."""
        for upload in uploads:
            self.traffic["up"][upload.client, progress.task] += num_bytes(upload.payload)
        for name in self.widths:
            for sums in self._summands(name, uploads):
                self.sums[name] = analytic.added(self.sums.get(name), sums)
        answer: Payload = {}
        for name, sums in self.sums.items():
            for head, (weight, bias) in self.config.solve(sums).items():
                answer |= {f"{name}/{head}.weight": weight, f"{name}/{head}.bias": bias}
        return answer

    def _summands(self, name: str, uploads: list[Upload]) -> list[MomentSums]:
        if not self.method.masks_sums:
            return [analytic.unpack_sums(_named(name, u.payload), u.class_counts) for u in uploads if u.payload]
        parts = (f"{name}.gram", f"{name}.products")
        masked = {upload.client: {part: upload.payload[part] for part in parts} for upload in uploads}
        gram, products = (self.method.unmask_sums(masked)[part] for part in parts)
        return [MomentSums(analytic.unpack_symmetric(gram, len(products)), products)]

    def record(self, name: str, client: int, after_task: int, rows: Tensor) -> None:
        """Set accuracies (masks, tasks so far) of one client's readout."""
        clients, tasks = self.traffic["up"].shape
        empty = torch.full((len(MASKS), clients, tasks, tasks), torch.nan, dtype=torch.float64)
        self.values.setdefault(name, empty)[:, client, after_task, : rows.shape[1]] = rows.double()

    def state_dict(self) -> dict[str, Any]:
        """Sums, accuracies and bytes."""
        sums = {name: list(sums) for name, sums in self.sums.items()}
        return {"sums": sums, "values": self.values, "traffic": self.traffic}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state_dict``."""
        self.sums = {name: MomentSums(*sums) for name, sums in state["sums"].items()}
        self.values, self.traffic = state["values"], state["traffic"]


def _named(name: str, payload: Payload) -> MomentSums:
    return MomentSums(payload[f"{name}.gram"], payload[f"{name}.products"])


def heads_of(answer: Payload) -> dict[str, dict[str, Tensor]]:
    """Weight and bias of each readout, from the server's response."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in answer.items():
        readout, _, part = name.rpartition(".")
        found.setdefault(readout, {})[part] = value
    return found


def readout_logits(views: Mapping[str, Tensor], heads: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Scores (B, num_classes) of each readout, from features (B, width) by view; float32."""
    units = {name: F.normalize(features.float()) for name, features in views.items()}
    return {name: F.linear(units[name.rpartition("/")[0]], **head) for name, head in heads.items()}
