"""Who has which images and which nets: an attacker, a client, and people like the client's."""

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.data.loader import ImageData
from fedlscl.federated.method import StreamShape
from fedlscl.federated.pool import Turn, seed_turn
from fedlscl.methods import FedLSCL
from fedlscl.nets.collaborator import Collaborator, CollaboratorConfig
from fedlscl.nets.vit import FoundationClassifier, FoundationConfig
from fedlscl.testing import Recorded

KNOWLEDGE = {
    "untrained": ("start", "start"),
    "public start": ("trained", "start"),
    "imitation": ("trained", "imitated"),
    "client's net": ("trained", "trained"),
}
"""By what the attacker has: the net whose features the client sends, and the net that the attacker computes with."""
SEED = 42
VIT = FoundationConfig(name="vit_glyph_patch4_32", weights="bundled")
"""The frozen ViT, which everybody knows."""


class Pool(NamedTuple):
    """Images with labels."""

    images: Tensor
    """(n, 3, height, width) uint8."""
    labels: Tensor
    """(n,)."""

    def first(self, number: int) -> "Pool":
        """The first so many."""
        return Pool(self.images[:number], self.labels[:number])


@dataclass
class World:
    """Pools of images that share none, and what three nets make of them."""

    pools: dict[str, Pool]
    """'shadow' is the attacker's, 'own' the client's training set, 'others' is in nobody's."""
    small_model: str = "resnet18"
    feature_dim: int = 512
    epochs: int = 2
    """Of Stage 1 in the client's one round."""
    features: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """E by net and pool, (n, feature_dim); of 'vit' the frozen ViT's features at unit norm."""

    def look(self, kept: Path | None = None) -> None:
        """Train the nets and compute all features, or take them from the file ``kept`` of the same world."""
        if kept is not None and kept.is_file():
            self.features = torch.load(kept, weights_only=True)
            return
        trained_on = {"start": None, "trained": "own", "imitated": "shadow"}
        for name, place in trained_on.items():
            net = self.start() if place is None else self.learn(self.pools[place].first(self.size))
            for pool in self.pools:
                self.features[name, pool] = inferred(net.eval().embed, self.pools[pool].images)
        vit = FoundationClassifier(VIT, 1)
        for pool in self.pools:
            self.features["vit", pool] = F.normalize(inferred(vit.frozen_prefix, self.pools[pool].images))
        if kept is not None:
            torch.save(self.features, kept)

    def likeness(self, client: str, net: str) -> float:
        """Mean cosine between two nets' features of the same images of nobody, each less its mean."""
        one, other = (e - e.mean(0) for e in (self.features[client, "others"], self.features[net, "others"]))
        return F.cosine_similarity(one, other).mean().item()

    @property
    def size(self) -> int:
        """Samples of the client."""
        return len(self.pools["own"].images)

    @property
    def num_classes(self) -> int:
        """Classes of all pools."""
        return int(max(pool.labels.max() for pool in self.pools.values())) + 1

    def method(self) -> FedLSCL:
        """Fed-LSCL with its defaults and a small frozen ViT."""
        config = CollaboratorConfig(
            foundation=VIT,
            small_model=self.small_model,
            feature_dim=self.feature_dim,
            small_image_size=self.pools["own"].images.shape[-1],
        )
        return FedLSCL(collaborator=config, local_epochs=self.epochs)

    def start(self) -> Collaborator:
        """The net from which every client starts; the public seed gives it."""
        seed_turn(SEED, Turn.BUILD)
        return self.method().build_net(0, StreamShape(self.num_classes))

    def learn(self, pool: Pool) -> Collaborator:
        """A client's net after one round on a pool."""
        with tempfile.TemporaryDirectory() as folder:
            save(pool, Path(folder) / "pool.npz")
            data = SpatialTemporalDataModule(
                dataset="pool.npz", root=folder, num_clients=1, num_tasks=1, private_classes=self.num_classes,
                public_classes=0,
            )  # fmt: skip
            run = Recorded(rounds_per_task=1)
            run.fit(self.method(), data, SEED)
        return run.clients[0].net


def draw_pools(data: ImageData, shadow: int, own: int, others: int) -> dict[str, Pool]:
    """Disjoint random parts of the training images, with equally many of each class as far as they go."""
    if (wanted := shadow + own + others) > len(data.train_images):
        raise ValueError(f"{wanted} images are needed, {data.name} has {len(data.train_images)}: ask for fewer.")
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(SEED))
    seen: Counter[int] = Counter()
    rank = []
    for label in data.train_labels[order].tolist():
        rank.append(seen[label])
        seen[label] += 1
    order = order[torch.tensor(rank).argsort(stable=True)]
    parts = zip(("shadow", "own", "others"), order[:wanted].split([shadow, own, others]), strict=True)
    return {name: Pool(data.train_images[ids], data.train_labels[ids]) for name, ids in parts}


def save(pool: Pool, path: Path) -> None:
    """Write a pool as a data set, with a few of its images as test images."""
    images, labels = pool.images.permute(0, 2, 3, 1).numpy(), pool.labels.numpy()
    _, first = np.unique(labels, return_index=True)
    test = {"test_images": images[first], "test_labels": labels[first]}
    np.savez(path, train_images=images, train_labels=labels, **test)


@torch.no_grad()
def inferred(part: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a part of a net makes of images, (n, width)."""
    return torch.cat([part(few) for few in images.split(128)])
