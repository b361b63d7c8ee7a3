"""SpatialTemporalDataModule: every client's stream of tasks as a LightningDataModule."""

from dataclasses import dataclass
from typing import Literal, get_args

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fedlscl.data import manifest as manifests
from fedlscl.data.datasets import CROPPED, check_sizes, load_images
from fedlscl.data.images import Batch, ImageData
from fedlscl.data.loader import Augment, batches
from fedlscl.data.split import (
    MAX_CLIENTS,
    ClientSplit,
    check_dirichlet_alpha,
    check_integers,
    dirichlet_split,
    spatial_temporal_split,
)

# One client's stream of tasks.


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


# One place in the streams as a plain datamodule.


class ClientTaskDataModule(L.LightningDataModule):
    """One place in the streams, for a stock ``lightning.Trainer``."""

    def __init__(self, streams: "SpatialTemporalDataModule", client: int | None, task: int | None) -> None:
        super().__init__()
        self.streams = streams
        self.client = client
        self.task = task

    def setup(self, stage: str | None = None) -> None:
        """Load and split, if that was not done yet."""
        self.streams.setup(stage)

    def train_dataloader(self) -> DataLoader:
        """Shuffled train samples of this place."""
        return self.streams.train_dataloader(self.client, self.task)

    def test_dataloader(self) -> DataLoader:
        """Test samples of this place."""
        return self.streams.test_dataloader(self.client, self.task)

    val_dataloader = test_dataloader
    predict_dataloader = test_dataloader


# Every client's stream of tasks as a LightningDataModule.

Protocol = Literal["local", "global"]
MAX_WORKERS = 256
"""More processes than this would exhaust most machines (ours)."""


class SpatialTemporalDataModule(L.LightningDataModule):
    """K clients, each with its own stream of T tasks of new classes.

    Its dataloaders pool all clients and tasks, so that it works with any ``lightning.Trainer`` (the centralised upper
    bound); `at` narrows it to one place in the streams, `stream` is what federated training works with.

    Args:
        dataset: 'cifar100', 'imagenet-r', 'folder', 'digits', 'fake' or the name of an .npz file in MedMNIST's layout.
        root: folder that holds the data set.
        num_clients: clients K, 1 to 100,000.
        num_tasks: tasks T per client, of equally many classes.
        private_classes: classes per client that no other client has.
        public_classes: classes that all clients share; their train samples are divided without overlap.
        dirichlet_alpha: concentration of the Dirichlet draw that divides a class, in (0, 1e9]; smaller is more
            heterogeneous.
        protocol: 'local' gives every client its own classes in its own order; 'global' gives all clients the same
            public classes in the same order and needs private_classes 0.
        batch_size: samples per batch of the plain dataloaders.
        image_size: side in pixels, 1 to 4096, of decoded folder images (224 if left out) and of 'fake'; other data
            sets stay as stored, every net resizes for itself.
        train_per_class: keep at most so many train samples of each class.
        test_per_class: keep at most so many test samples of each class.
        seed: of the split; left out, the seed of the run.
        manifest: saved split to use in place of a draw; num_clients and num_tasks must agree with it.
        download: fetch 'cifar100' if it is not under root.
        cache_dir: where decoded image folders are kept, ~/.cache/fedlscl if left out.
        fake_classes: number of classes of 'fake'.
        num_workers: processes that fetch batches, at most 256; 0 fetches in the training process.
        augment: 'standard' shifts and flips training images at random, anew in every epoch; frozen ViT tokens are then
            computed at every step instead of once.
    """

    def __init__(
        self,
        *,
        dataset: str = "digits",
        root: str | None = None,
        num_clients: int = 3,
        num_tasks: int = 3,
        private_classes: int = 2,
        public_classes: int = 4,
        dirichlet_alpha: float = 1.0,
        protocol: Protocol = "local",
        batch_size: int = 32,
        image_size: int | None = None,
        train_per_class: int | None = None,
        test_per_class: int | None = None,
        seed: int | None = None,
        manifest: str | None = None,
        download: bool = False,
        cache_dir: str | None = None,
        fake_classes: int = 12,
        num_workers: int = 0,
        augment: Augment = "none",
    ) -> None:
        super().__init__()
        check_integers(1, MAX_CLIENTS, num_clients=num_clients)
        check_integers(1, num_tasks=num_tasks, batch_size=batch_size)
        check_integers(0, private_classes=private_classes, public_classes=public_classes, seed=seed)
        check_integers(0, MAX_WORKERS, num_workers=num_workers)
        check_dirichlet_alpha(dirichlet_alpha)
        check_sizes(image_size, train_per_class, test_per_class, fake_classes)
        for option, value, choices in (
            ("protocol", protocol, get_args(Protocol)),
            ("augment", augment, get_args(Augment)),
        ):
            if value not in choices:
                raise ValueError(f"{option} must be {' or '.join(map(repr, choices))}, got {value!r}: correct it")
        self.dataset = dataset
        self.root = root
        self.num_clients = num_clients
        self.num_tasks = num_tasks
        self.private_classes = private_classes
        self.public_classes = public_classes
        self.dirichlet_alpha = dirichlet_alpha
        self.protocol = protocol
        self.batch_size = batch_size
        self.image_size = image_size
        self.train_per_class = train_per_class
        self.test_per_class = test_per_class
        self.seed = seed
        self.manifest = manifest
        self.download = download
        self.cache_dir = cache_dir
        self.fake_classes = fake_classes
        self.num_workers = num_workers
        self.augment: Augment = augment
        self._run_seed = 42
        self._data: ImageData | None = None
        self._splits: list[ClientSplit] | None = None

    @property
    def run_seed(self) -> int:
        """Seed of the split when ``seed`` is left out; set by whoever knows the run's seed."""
        return self._run_seed

    @run_seed.setter
    def run_seed(self, seed: int) -> None:
        if seed != self._run_seed:
            self._run_seed, self._splits = seed, None

    @property
    def data(self) -> ImageData:
        """The whole data set."""
        if self._data is None:
            self._data = load_images(
                self.dataset,
                self.root,
                self.image_size,
                train_per_class=self.train_per_class,
                test_per_class=self.test_per_class,
                download=self.download,
                cache_dir=self.cache_dir,
                fake_classes=self.fake_classes,
            )
        return self._data

    @property
    def splits(self) -> list[ClientSplit]:
        """What each client gets."""
        if self._splits is None:
            self._splits = self._draw() if self.manifest is None else self._load(self.manifest)
        return self._splits

    @property
    def num_classes(self) -> int:
        """Classes of the whole data set, whoever sees them."""
        return self.data.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order."""
        return self.data.class_names

    def prepare_data(self) -> None:
        """Download and decode what is missing; Lightning calls it in one process."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load and split; done once, and by itself when something is first asked for."""
        _ = self.data, self.splits

    def stream(self, client: int) -> ClientStream:
        """The tasks of one client."""
        if not 0 <= client < self.num_clients:
            raise ValueError(f"client={client}: num_clients={self.num_clients}, use 0 to {self.num_clients - 1}")
        return ClientStream(client, self.splits[client], self.data, self.num_workers, self.augment)

    def fetch(self, ids: Tensor) -> Batch:
        """The samples of ids (B,), in that order."""
        return self.data.fetch(ids)

    def loader(
        self, ids: Tensor, batch_size: int, shuffle: bool, generator: torch.Generator | None = None
    ) -> DataLoader:
        """Loader of even batches over ids (n,), see `fedlscl.data.batches`."""
        augment = self.augment if shuffle else "none"
        return batches(self.data, ids, batch_size, shuffle, generator, self.num_workers, augment)

    def at(self, client: int | None, task: int | None) -> ClientTaskDataModule:
        """A plain datamodule for one place in the streams; ``None`` means every client, or every task."""
        return ClientTaskDataModule(self, client, task)

    def train_dataloader(self, client: int | None = None, task: int | None = None) -> DataLoader:
        """Shuffled train samples of a client and a task; ``None`` pools all of them."""
        ids = torch.cat([stream.train_ids(n) for stream, n in self._streams_at(client, task)]).unique()
        return self.loader(ids, self.batch_size, shuffle=True)

    def test_dataloader(self, client: int | None = None, task: int | None = None) -> DataLoader:
        """Test samples of a client and a task; ``None`` pools all of them, each sample once."""
        ids = torch.cat([stream.test_ids(n) for stream, n in self._streams_at(client, task)]).unique()
        return self.loader(ids, self.batch_size, shuffle=False)

    val_dataloader = test_dataloader
    predict_dataloader = test_dataloader

    def save_manifest(self, path: str) -> None:
        """Save the split, so that any project can run the very same one."""
        manifests.save_manifest(path, self.splits, self.class_names, self.data.fingerprint, self._meta())

    def _streams_at(self, client: int | None, task: int | None) -> list[tuple[ClientStream, int]]:
        if task is not None and not 0 <= task < self.num_tasks:
            raise ValueError(f"task={task}: num_tasks={self.num_tasks}, use 0 to {self.num_tasks - 1}")
        clients = range(self.num_clients) if client is None else [client]
        tasks = range(self.num_tasks) if task is None else [task]
        return [(self.stream(i), n) for i in clients for n in tasks]

    def _draw(self) -> list[ClientSplit]:
        labels = self.data.train_labels.numpy(), self.data.test_labels.numpy()
        seed = self.run_seed if self.seed is None else self.seed
        if self.protocol == "local":
            return spatial_temporal_split(
                *labels,
                num_clients=self.num_clients,
                num_tasks=self.num_tasks,
                private_classes=self.private_classes,
                public_classes=self.public_classes,
                dirichlet_alpha=self.dirichlet_alpha,
                seed=seed,
                class_names=self.class_names,
            )
        if self.private_classes:
            raise ValueError(
                f"private_classes={self.private_classes}: protocol 'global' has none, set private_classes to 0 and "
                f"public_classes to the classes of all clients (the data set has {self.num_classes})"
            )
        return dirichlet_split(
            *labels,
            num_clients=self.num_clients,
            num_tasks=self.num_tasks,
            num_classes=self.public_classes,
            dirichlet_alpha=self.dirichlet_alpha,
            seed=seed,
        )

    def _load(self, path: str) -> list[ClientSplit]:
        splits = manifests.load_manifest(path, self.data.fingerprint, self.class_names)
        tasks = sorted({len(split.classes) for split in splits})
        if len(splits) != self.num_clients or tasks != [self.num_tasks]:
            found = f"{len(splits)} clients x {' or '.join(map(str, tasks))} tasks"
            raise ValueError(
                f"manifest {path} has {found}, but num_clients={self.num_clients} and num_tasks={self.num_tasks}: "
                "set them to those of the manifest"
            )
        return splits

    def _meta(self) -> dict[str, str | int | float | None]:
        meta = {
            "dataset": self.dataset,
            "image_height": self.data.train_images.shape[2],
            "image_width": self.data.train_images.shape[3],
            "image_rule": "crop" if self.dataset in CROPPED else "stored",
            "train_per_class": self.train_per_class,
            "test_per_class": self.test_per_class,
        }
        if self.manifest is not None:
            return meta
        return meta | {
            "protocol": self.protocol,
            "private_classes": self.private_classes,
            "public_classes": self.public_classes,
            "dirichlet_alpha": self.dirichlet_alpha,
            "seed": self.run_seed if self.seed is None else self.seed,
        }
