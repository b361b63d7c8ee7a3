"""Closed-form methods on a frozen ViT: a fixed map of its feature, sums over samples, and a linear solve.

Sums over clients and tasks are those over all data at once, so these methods are exact for any split and forget
nothing; each client sends a task's sums once, in its first round. They differ in map, message and solution only:

=========  =====================  =======================  =========================  ======
method     map of the feature f   message                  solution                   score
=========  =====================  =======================  =========================  ======
FedNCM     f / |f|                class sums               class means                cosine
FedRidge   [f / |f|; 1]           Gram, products           ridge, relative            linear
FrozenLDA  [f / |f|; 1]           Gram, products           discriminant               linear
AFCL       f                      Gram, products           ridge, absolute            linear
STSA       relu(f W)              Gram, products           ridge, relative            cosine
STSA-E     relu(f W)              sums of groups           ridge, on estimated Gram   cosine
FedRAN     relu(f W)              low-rank Gram, products  ridge in the low rank      linear
=========  =====================  =======================  =========================  ======

The functions are those of `fedlscl.functional.analytic`. Related: RanPAC (McDonnell et al., NeurIPS 2023, arXiv
2307.02251) and AFL (He et al., CVPR 2025, arXiv 2405.16240).
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.federated.client import Client, class_means
from fedlscl.federated.method import Method, MethodCard, Progress, Stage, StreamShape
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.functional import analytic
from fedlscl.functional.analytic import MomentSums
from fedlscl.nets.net import Net
from fedlscl.nets.vit import FoundationClassifier, FoundationConfig
from fedlscl.options import Count, Interval, Positive, Whole

TOLERANCE = 1 + 1e-4
"""Of norms in messages, which are rounded to float32."""


@dataclass(kw_only=True)
class _Statistics(Method):
    """Statistics of the frozen ViT's features, sent once per task; a client without samples sends nothing."""

    head: ClassVar[str] = "unit"
    """The net's head, which the server solves."""
    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT."""
    sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """The server's state by name."""

    @abstractmethod
    def statistics(self, client: Client) -> Payload:
        """The client's message for its task."""

    @abstractmethod
    def statistics_spec(self, upload: Upload, net: Net) -> Payload:
        """Names, shapes and dtypes of the message; new tensors are on the meta device."""

    @abstractmethod
    def statistics_error(self, upload: Upload) -> str:
        """Why a message cannot be of unit features and of the announced samples, or ''."""

    @abstractmethod
    def absorb(self, upload: Upload) -> None:
        """Add a client's message to ``sums``."""

    @abstractmethod
    def solve(self) -> Payload:
        """The head that follows from ``sums``."""

    @override
    def build_net(self, client: int, stream: StreamShape) -> Net:
        return FoundationClassifier(self.foundation, stream.num_classes, self.head)

    @override
    def stages(self, client: Client) -> Iterator[Stage]:
        return iter(())

    @override
    def upload(self, client: Client) -> Payload:
        is_first = client.num_synced_rounds == 0 and len(client.train_ids) > 0
        return outgoing(self.statistics(client)) if is_first else {}

    @override
    def upload_spec(self, upload: Upload, net: Net) -> Payload | None:
        with torch.device("meta"):
            return self.statistics_spec(upload, net) if upload.payload else {}

    @override
    def check_upload(self, upload: Upload) -> str:
        return self.statistics_error(upload) if upload.payload else ""

    @override
    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        for upload in uploads:
            if upload.payload:
                self.absorb(upload)
        return [self.solve()] * len(uploads)

    def add(self, **values: Tensor) -> None:
        """Add to the sums by name."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value


@dataclass(kw_only=True)
class FedNCM(_Statistics):
    """Nearest class mean: cosine to the mean of each class's normalised features."""

    card: ClassVar = MethodCard("baseline", trains="nothing: class means on the frozen ViT", uploads="sums of features")
    head: ClassVar[str] = "cosine"

    @override
    def statistics(self, client: Client) -> Payload:
        """Counts times class means of the task's classes, (classes, width)."""
        classes, means = class_means(client, client.train_ids)
        return {"means": means * client.data.class_counts(client.task)[classes, None]}

    @override
    def statistics_spec(self, upload: Upload, net: Net) -> Payload:
        return {"means": net.head.weight[own_classes(upload)]}

    @override
    def statistics_error(self, upload: Upload) -> str:
        is_longer = upload.payload["means"].norm(dim=1) > TOLERANCE * upload.class_counts[own_classes(upload)]
        return "means are larger than those of unit features" if is_longer.any() else ""

    @override
    def absorb(self, upload: Upload) -> None:
        means = upload.payload["means"].double()
        empty = means.new_zeros(len(upload.class_counts), means.shape[1])
        self.add(means=empty.index_copy(0, own_classes(upload), means))

    @override
    def solve(self) -> Payload:
        """Unit directions; zero for classes without samples."""
        return {"head.weight": F.normalize(self.sums["means"]).float()}


@dataclass(kw_only=True)
class _Moments(_Statistics):
    """Sums of x x^T and x onehot(y)^T, sent as a packed Gram matrix and the columns of the client's own classes."""

    unit: ClassVar[bool] = True
    """Whether x is scaled to unit norm."""
    bias: ClassVar[bool] = True
    """Whether x has a constant."""

    def map(self, features: Tensor) -> Tensor:
        """The map of the ViT's features (B, width) to x before scaling and constant, (B, width of x)."""
        return features

    @override
    def statistics(self, client: Client) -> Payload:
        num_classes, kind = client.data.data.num_classes, (self.unit, self.bias)
        parts = (
            analytic.moment_sums(self.map(output.features).cpu(), batch.labels.cpu(), num_classes, *kind)
            for batch, output in client.infer(client.train_ids)
        )
        return analytic.pack_sums(reduce(analytic.added, parts), client.data.class_counts(client.task))._asdict()

    @override
    def statistics_spec(self, upload: Upload, net: Net) -> Payload:
        size = net.head.weight.shape[1] + self.bias
        gram = torch.empty(analytic.packed_size(size))
        return {"gram": gram, "products": torch.empty(size, len(own_classes(upload)))}

    @override
    def statistics_error(self, upload: Upload) -> str:
        return analytic.sums_error(unpacked(upload), upload.class_counts, self.unit, self.bias)

    @override
    def absorb(self, upload: Upload) -> None:
        self.add(**unpacked(upload)._asdict())


@dataclass(kw_only=True)
class FedRidge(_Moments):
    """Ridge regression from features to one-hot labels, in closed form over all data of all clients and tasks."""

    card: ClassVar = MethodCard(
        "baseline", trains="nothing: ridge regression on the frozen ViT", uploads="Gram matrix, products with labels"
    )
    ridge: Positive = 0.01
    """Regularisation relative to the mean eigenvalue of the Gram matrix (ours)."""

    @override
    def solve(self) -> Payload:
        weight, bias = analytic.ridge_solution(MomentSums(**self.sums), self.ridge)
        return {"head.weight": weight, "head.bias": bias}


@dataclass(kw_only=True)
class FrozenLDA(_Moments):
    """Linear discriminant analysis with equal priors from FedRidge's sums, to compare adapted features with (ours)."""

    card: ClassVar = MethodCard(
        "baseline", trains="nothing: a discriminant on the frozen ViT", uploads="Gram matrix, products with labels"
    )
    shrinkage: Annotated[float, Interval("(0, 1]")] = 0.2
    """Shrinkage of the covariance within classes, in (0, 1]; 1 is nearest class mean (ours)."""

    @override
    def solve(self) -> Payload:
        weight, bias = analytic.discriminant_solution(MomentSums(**self.sums), self.shrinkage)
        return {"head.weight": weight, "head.bias": bias}


@dataclass(kw_only=True)
class AFCL(_Moments):
    """AFCL (Tang et al., arXiv 2505.12245): ridge regression on raw features, without a constant.

    Its recursive and pairwise updates equal the sums' solution, which this class uses (ours). ``gamma`` is that of the
    whole regression: the released code of AFL, its predecessor, adds one per message and removes them at the end.
    """

    head: ClassVar[str] = "linear"
    unit: ClassVar[bool] = False
    bias: ClassVar[bool] = False
    card: ClassVar = MethodCard(
        "arXiv 2025", "2505.12245", "nothing: ridge regression on the frozen ViT", "Gram matrix, products with labels"
    )
    gamma: Positive = 1.0
    """Absolute regularisation (ours; the paper's value is not known to us)."""

    @override
    def solve(self) -> Payload:
        weight, bias = analytic.ridge_solution(MomentSums(**self.sums), self.gamma, relative=False, bias=False)
        return {"head.weight": weight, "head.bias": bias}


class RandomFeatureHead(nn.Linear):
    """A linear head on random features of the ViT's features; random features have unit norm."""

    def __init__(self, num_classes: int, width: int, seed: int) -> None:
        super().__init__(width, num_classes, bias=False)
        self.seed = seed

    @override
    def forward(self, features: Tensor) -> Tensor:
        return F.linear(analytic.random_features(features, self.in_features, self.seed), self.weight)


@dataclass(kw_only=True)
class _RandomFeatures(_Moments):
    """Moments of random features, without a constant."""

    bias: ClassVar[bool] = False
    width: Count = 1250
    """M: number of random features."""
    feature_seed: Whole = 0
    """Public seed of the random features, the same on all clients."""
    ridge: Positive = 0.01
    """Regularisation relative to the mean eigenvalue of the Gram matrix (ours; the released code of STSA adds 1e6 to
    that of features without scaling)."""

    @override
    def build_net(self, client: int, stream: StreamShape) -> Net:
        net = FoundationClassifier(self.foundation, stream.num_classes)
        net.head = RandomFeatureHead(stream.num_classes, self.width, self.feature_seed)
        return net

    @override
    def map(self, features: Tensor) -> Tensor:
        return analytic.random_features(features, self.width, self.feature_seed)

    def mapped(self, client: Client, ids: Tensor) -> Tensor:
        """Random features of some samples (n, width), in float64."""
        return torch.cat([self.map(output.features).cpu().double() for _, output in client.infer(ids)])


@dataclass(kw_only=True)
class STSA(_RandomFeatures):
    """STSA (Guan et al., WWW 2026, arXiv 2506.01327): sums of random features, and a ridge regression's cosine head.

    Deviations: the ViT is not adapted in the first task, so that the result does not depend on the split; random
    features have unit norm, and ``ridge`` is relative (all ours).
    """

    card: ClassVar = MethodCard(
        "WWW 2026", "2506.01327", "nothing: ridge regression on random features", "Gram matrix, products with labels"
    )

    @override
    def solve(self) -> Payload:
        weight, _ = analytic.ridge_solution(MomentSums(**self.sums), self.ridge, bias=False)
        return {"head.weight": F.normalize(weight)}


@dataclass(kw_only=True)
class STSAE(_RandomFeatures):
    """STSA-E (arXiv 2506.01327): STSA with a Gram matrix that the server estimates from sums over groups of samples.

    A client shuffles its samples and divides them into groups; it sends, for each of its classes, the sum and the
    number of samples in each group. Deviations: those of `STSA`; empty groups do not count, which makes the estimate
    unbiased; products follow from the sums and are not sent (all ours).
    """

    card: ClassVar = MethodCard(
        "WWW 2026", "2506.01327", "nothing: ridge regression on random features", "sums of groups of samples"
    )
    groups: Count = 5
    """S: groups of each client."""

    @override
    def statistics(self, client: Client) -> Payload:
        """Sums (classes, groups, width) and counts (classes, groups) of the client's own classes."""
        ids = client.train_ids[torch.randperm(len(client.train_ids))]
        classes, position = client.data.data.labels(ids).unique(return_inverse=True)
        row, shape = position * self.groups + torch.arange(len(ids)) % self.groups, (len(classes), self.groups)
        sums = torch.zeros(len(classes) * self.groups, self.width, dtype=torch.float64)
        sums.index_add_(0, row, self.mapped(client, ids))
        return {"sums": sums.view(*shape, -1).float(), "counts": row.bincount(minlength=len(sums)).view(shape)}

    @override
    def statistics_spec(self, upload: Upload, net: Net) -> Payload:
        shape = len(own_classes(upload)), self.groups
        return {"sums": torch.empty(*shape, self.width), "counts": torch.empty(shape, dtype=torch.int64)}

    @override
    def statistics_error(self, upload: Upload) -> str:
        sums, counts = upload.payload["sums"], upload.payload["counts"]
        if (counts < 0).any() or not counts.sum(1).equal(upload.class_counts[own_classes(upload)]):
            return "counts must be those of the announced samples of each class"
        return "sums are larger than those of unit features" if (sums.norm(dim=2) > TOLERANCE * counts).any() else ""

    @override
    def absorb(self, upload: Upload) -> None:
        """Keep the groups: their number in each class is known when all have arrived."""
        counts = upload.payload["counts"]
        new = upload.payload | {"labels": own_classes(upload)[:, None].expand_as(counts)}
        for name, value in new.items():
            value = value[counts > 0]
            self.sums[name] = torch.cat([self.sums.get(name, value[:0]), value])
        self.sums["num_classes"] = torch.tensor(len(upload.class_counts))

    @override
    def solve(self) -> Payload:
        sums, labels = self.sums["sums"].double(), self.sums["labels"]
        gram = analytic.gram_of_groups(sums, self.sums["counts"], labels)
        products = sums.mT @ F.one_hot(labels, int(self.sums["num_classes"])).double()
        weight, _ = analytic.ridge_solution(MomentSums(gram, products), self.ridge, bias=False)
        return {"head.weight": F.normalize(weight)}


@dataclass(kw_only=True)
class FedRAN(_RandomFeatures):
    """FedRAN (Arockiaraj et al., arXiv 2606.11480): STSA's sums with a Gram matrix of low rank.

    Each client sends the ``rank`` largest eigenpairs of its Gram matrix; the server merges them over clients and then
    over tasks by QR and SVD, and truncates again. The regularisation is ``ridge`` plus the mean of what was dropped,
    which the server knows, since the trace of the Gram of unit features is the number of samples (ours: products keep
    all directions, and those outside of the low rank are divided by the regularisation alone). The semi-supervised
    variant is not included.
    """

    card: ClassVar = MethodCard(
        "arXiv 2026", "2606.11480", "nothing: ridge regression on random features", "low-rank Gram, label products"
    )
    width: Count = 2048
    """M: number of random features."""
    rank: Count = 512
    """r: eigenpairs that are kept, of a client and at the server."""

    @override
    def statistics(self, client: Client) -> Payload:
        """F (width, at most rank) with F F^T near the Gram matrix, and the exact products of the client's classes."""
        x, labels = self.mapped(client, client.train_ids).mT, client.data.data.labels(client.train_ids)
        products = x @ (labels[:, None] == labels.unique()).double()
        return {"factor": analytic.low_rank(x, self.rank).float(), "products": products.float()}

    @override
    def statistics_spec(self, upload: Upload, net: Net) -> Payload:
        factor = torch.empty(self.width, min(self.rank, upload.num_samples, self.width))
        return {"factor": factor, "products": torch.empty(self.width, len(own_classes(upload)))}

    @override
    def statistics_error(self, upload: Upload) -> str:
        counts = upload.class_counts[own_classes(upload)]
        if (upload.payload["products"].norm(dim=0) > TOLERANCE * counts).any():
            return "products are larger than those of unit features"
        size = float(upload.payload["factor"].double().square().sum())
        return "factor is larger than that of unit features" if size > TOLERANCE * upload.num_samples else ""

    @override
    def aggregate(self, uploads: list[Upload], progress: Progress) -> list[Payload]:
        """Merge over clients first, then over tasks, as published."""
        factors = [upload.payload["factor"].double() for upload in uploads if upload.payload]
        if factors:
            merged = analytic.low_rank(torch.cat(factors, 1), self.rank)
            past = self.sums.get("factor", merged[:, :0])
            self.sums["factor"] = analytic.low_rank(torch.cat([past, merged], 1), self.rank)
        return super().aggregate(uploads, progress)

    @override
    def absorb(self, upload: Upload) -> None:
        products = torch.zeros(self.width, len(upload.class_counts), dtype=torch.float64)
        products[:, own_classes(upload)] = upload.payload["products"].double()
        self.add(products=products, samples=torch.tensor(upload.num_samples, dtype=torch.float64))

    @override
    def solve(self) -> Payload:
        factor, samples = self.sums["factor"], float(self.sums["samples"])
        dropped = max(samples - float(factor.square().sum()), 0.0)
        strength = (self.ridge * samples + dropped) / self.width
        return {"head.weight": analytic.low_rank_ridge(factor, self.sums["products"], strength).mT.float().contiguous()}


def own_classes(upload: Upload) -> Tensor:
    """Classes of which the sender has samples, (C,)."""
    return upload.class_counts.nonzero().flatten()


def unpacked(upload: Upload) -> MomentSums:
    """The sums over all classes in a message of `_Moments`."""
    return analytic.unpack_sums(MomentSums(**upload.payload), upload.class_counts)
