"""One client's stream of tasks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fedlscl.data.augment import Augment
from fedlscl.data.batch import Batch
from fedlscl.data.images import ImageData
from fedlscl.data.loader import batches
from fedlscl.data.split import ClientSplit


@dataclass(frozen=True, eq=False)
class ClientStream:
    """What one client meets, task by task; tasks count from 0."""

    client: int
    split: ClientSplit
    data: ImageData
    num_workers: int = 0
    augment: Augment = "none"
    """What is done at random to shuffled images, which are those that a net is trained on."""

    @property
    def num_tasks(self) -> int:
        """Tasks of the stream."""
        return len(self.split.classes)

    @property
    def num_samples(self) -> int:
        """Train samples of all tasks."""
        return sum(len(ids) for ids in self.split.train)

    def classes(self, task: int) -> Tensor:
        """Sorted classes of the task, int64."""
        return torch.tensor(self.split.classes[task], dtype=torch.int64)

    def seen(self, task: int) -> Tensor:
        """Sorted classes of tasks 0 to ``task``, int64."""
        return torch.cat([self.classes(earlier) for earlier in range(task + 1)]).unique()

    def train_ids(self, task: int) -> Tensor:
        """Ids (n,) of the client's own train samples of the task."""
        return torch.from_numpy(self.split.train[task])

    def test_ids(self, task: int) -> Tensor:
        """Ids (n,) of all test samples of the task's classes."""
        return torch.from_numpy(self.split.test[task])

    def class_counts(self, task: int) -> Tensor:
        """Train samples per class, (num_classes,) int64."""
        return torch.bincount(self.data.labels(self.train_ids(task)), minlength=self.data.num_classes)

    def fetch(self, ids: Tensor) -> Batch:
        """The samples of ids (B,), in that order."""
        return self.data.fetch(ids)

    def loader(
        self, ids: Tensor, batch_size: int, shuffle: bool, generator: torch.Generator | None = None
    ) -> DataLoader:
        """Loader of even batches over ids (n,), see `fedlscl.data.batches`."""
        augment = self.augment if shuffle else "none"
        return batches(self.data, ids, batch_size, shuffle, generator, self.num_workers, augment)
