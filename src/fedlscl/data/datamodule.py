"""SpatialTemporalDataModule: every client's stream of tasks as a LightningDataModule."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from fedlscl.data.datasets import ImageSource, check_sizes, load_images
from fedlscl.data.loader import Augment, Batch, ImageData, batches, check_integers
from fedlscl.data.split import (
    ClientSplit,
    check_split,
    dirichlet_split,
    held_out,
    load_manifest,
    save_manifest,
    spatial_temporal_split,
)

Protocol = Literal["local", "global"]
EvaluateOn = Literal["test", "validation"]
MAX_WORKERS = 256
"""More processes than this would exhaust most machines (ours)."""


@dataclass(kw_only=True, eq=False, repr=False)
class SpatialTemporalDataModule(L.LightningDataModule):
    """K clients, each with its own stream of T tasks of new classes.

    Its dataloaders pool all clients and tasks, so that it works with any ``lightning.Trainer`` (the centralised upper
    bound); `at` narrows it to one client or task, and federated training uses `stream`.
    """

    dataset: str | ImageSource = "digits"
    """'cifar100', 'imagenet-r', 'folder', 'digits', 'fake', the name of an .npz file in MedMNIST's layout, or a
    subclass of `fedlscl.data.ImageSource`: an object in Python, a class_path in YAML."""
    root: str | None = None
    """Folder that holds the data set."""
    num_clients: int = 3
    """Clients K, 1 to 100,000."""
    num_tasks: int = 3
    """Tasks T per client, of equally many classes."""
    private_classes: int = 2
    """Classes per client that no other client has."""
    public_classes: int = 4
    """Classes that all clients share; their train samples are divided without overlap."""
    dirichlet_alpha: float = 1.0
    """Dirichlet concentration, in (0, 1e9]; smaller is more heterogeneous."""
    protocol: Protocol = "local"
    """'local' gives every client its own classes in its own order; 'global' gives all clients the same public classes
    in the same order and needs private_classes 0."""
    batch_size: int = 32
    """Samples per batch of the plain dataloaders."""
    image_size: int | None = None
    """Side in pixels, 1 to 4096, of decoded folder images (224 if left out) and of 'fake'; other data sets keep their
    size, and every net resizes for itself."""
    train_per_class: int | None = None
    """Keep at most so many train samples of each class."""
    test_per_class: int | None = None
    """Keep at most so many test samples of each class."""
    validation_per_class: int = 0
    """Hold so many train samples of each class out of all clients' training, to choose hyper-parameters with."""
    evaluate_on: EvaluateOn = "test"
    """Samples on which a run evaluates its clients: 'validation' to choose hyper-parameters, 'test' afterwards."""
    seed: int | None = None
    """Of the split; the seed of the run if left out."""
    manifest: str | None = None
    """Saved split to use instead of a draw; num_clients and num_tasks must agree with it."""
    download: bool = False
    """Fetch 'cifar100' if it is not under root."""
    cache_dir: str | None = None
    """Folder of decoded images, ~/.cache/fedlscl if left out."""
    fake_classes: int = 12
    """Number of classes of 'fake'."""
    num_workers: int = 0
    """Processes that load batches, at most 256; 0 loads in the training process."""
    augment: Augment = "none"
    """'standard' shifts and flips training images at random, anew in every epoch; frozen ViT tokens are then computed
    at every step instead of once."""

    def __post_init__(self) -> None:
        super().__init__()
        check_split(
            self.num_clients,
            self.num_tasks,
            self.private_classes,
            self.public_classes,
            self.dirichlet_alpha,
            self.seed,
        )
        check_integers(1, batch_size=self.batch_size)
        check_integers(0, MAX_WORKERS, num_workers=self.num_workers)
        check_sizes(self.image_size, self.train_per_class, self.test_per_class, self.fake_classes)
        check_integers(0, validation_per_class=self.validation_per_class)
        for option, value, kind in (
            ("protocol", self.protocol, Protocol),
            ("augment", self.augment, Augment),
            ("evaluate_on", self.evaluate_on, EvaluateOn),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{option} must be {' or '.join(map(repr, get_args(kind)))}, got {value!r}.")
        if self.evaluate_on == "validation" and not self.validation_per_class:
            raise ValueError("validation_per_class must be >= 1 to evaluate on validation samples, got 0.")
        self.source = self.dataset
        # From here on its name in results and manifests.
        self.dataset = self.source if isinstance(self.source, str) else self.source.name
        self._run_seed = 42
        self._data: ImageData | None = None
        self._splits: list[ClientSplit] | None = None
        self._held_out = np.zeros(0, dtype=bool)

    @property
    def run_seed(self) -> int:
        """Seed of the split if ``seed`` is left out; the trainer sets it to the seed of the run."""
        return self._run_seed

    @run_seed.setter
    def run_seed(self, seed: int) -> None:
        if seed != self._run_seed:
            self._run_seed, self._splits = seed, None

    @property
    def data(self) -> ImageData:
        """The whole data set, loaded at first use."""
        if self._data is None:
            self._data = load_images(
                self.source,
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
        """One split per client, drawn or read at first use."""
        if self._splits is None:
            seed = self.run_seed if self.seed is None else self.seed
            labels = self.data.train_labels.numpy()
            self._held_out = held_out(labels, self.validation_per_class, seed, self.class_names)
            self._splits = self._draw(seed) if self.manifest is None else self._load(self.manifest)
        return self._splits

    @property
    def num_classes(self) -> int:
        """Classes of the whole data set."""
        return self.data.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order."""
        return self.data.class_names

    @override
    def prepare_data(self) -> None:
        self.setup()

    @override
    def setup(self, stage: str | None = None) -> None:
        _ = self.data, self.splits

    def stream(self, client: int) -> "ClientStream":
        """The tasks of one client."""
        check_integers(0, self.num_clients - 1, client=client)
        split = self.splits[client]
        held = torch.from_numpy(self._held_out.nonzero()[0])
        return ClientStream(client, split, self.data, self.num_workers, self.augment, held, self.evaluate_on)

    def fetch(self, ids: Tensor) -> Batch:
        """The samples of ids (B,), in that order."""
        return self.data.fetch(ids)

    def at(self, client: int | None, task: int | None) -> "ClientTaskDataModule":
        """A plain datamodule for one client and task; ``None`` means every client, or every task."""
        return ClientTaskDataModule(self, client, task)

    @override
    def train_dataloader(self, client: int | None = None, task: int | None = None) -> DataLoader:
        """Shuffled train samples of a client and a task; ``None`` pools all of them."""
        ids = [stream.train_ids(n) for stream, n in self._streams_at(client, task)]
        return batches(self.data, torch.cat(ids).unique(), self.batch_size, True, None, self.num_workers, self.augment)

    @override
    def test_dataloader(self, client: int | None = None, task: int | None = None) -> DataLoader:
        """Test samples of a client and a task; ``None`` pools all of them, each sample once."""
        ids = [stream.test_ids(n) for stream, n in self._streams_at(client, task)]
        return batches(self.data, torch.cat(ids).unique(), self.batch_size, False, None, self.num_workers)

    @override
    def val_dataloader(self, client: int | None = None, task: int | None = None) -> DataLoader:
        """Validation samples of a client and a task; the test samples without ``validation_per_class``."""
        if not self.validation_per_class:
            return self.test_dataloader(client, task)
        ids = [stream.validation_ids(n) for stream, n in self._streams_at(client, task)]
        return batches(self.data, torch.cat(ids).unique(), self.batch_size, False, None, self.num_workers)

    predict_dataloader = test_dataloader

    def public_images(self, classes: Tensor, per_class: int, batch_size: int) -> DataLoader:
        """Shuffled validation samples of ``classes`` (n,), at most ``per_class`` of each, for a server to train on."""
        _ = self.splits
        held = torch.from_numpy(self._held_out.nonzero()[0])
        labels = self.data.labels(held)
        ids = torch.cat([held[labels == label][:per_class] for label in classes])
        return batches(self.data, ids, batch_size, True, None, self.num_workers)

    def _streams_at(self, client: int | None, task: int | None) -> list[tuple["ClientStream", int]]:
        check_integers(0, self.num_tasks - 1, task=task)
        clients = range(self.num_clients) if client is None else [client]
        tasks = range(self.num_tasks) if task is None else [task]
        return [(self.stream(i), n) for i in clients for n in tasks]

    def _draw(self, seed: int) -> list[ClientSplit]:
        options: dict[str, Any] = {
            "train_labels": np.where(self._held_out, -1, self.data.train_labels.numpy()),
            "test_labels": self.data.test_labels.numpy(),
            "num_clients": self.num_clients,
            "num_tasks": self.num_tasks,
            "dirichlet_alpha": self.dirichlet_alpha,
            "seed": seed,
        }
        if self.protocol == "local":
            options |= {"private_classes": self.private_classes, "public_classes": self.public_classes}
            return spatial_temporal_split(**options, class_names=self.class_names)
        if self.private_classes:
            raise ValueError(
                f"private_classes must be 0 for protocol 'global', got {self.private_classes}: set public_classes to "
                f"the classes of all clients (the data set has {self.num_classes})."
            )
        return dirichlet_split(**options, num_classes=self.public_classes)

    def _load(self, path: str) -> list[ClientSplit]:
        splits = load_manifest(path, self.data.fingerprint, self.class_names)
        tasks = sorted({len(split.classes) for split in splits})
        if len(splits) != self.num_clients or tasks != [self.num_tasks]:
            raise ValueError(
                f"manifest {path} must have {self.num_clients} clients x {self.num_tasks} tasks, got {len(splits)} "
                f"clients x {' or '.join(map(str, tasks))} tasks: set num_clients and num_tasks to those of the "
                "manifest."
            )
        if not self.validation_per_class:
            return splits
        rest = [replace(split, train=tuple(ids[~self._held_out[ids]] for ids in split.train)) for split in splits]
        labels = self.data.train_labels.numpy()
        for client, (before, after) in enumerate(zip(splits, rest, strict=True)):
            for task, (ids, kept) in enumerate(zip(before.train, after.train, strict=True)):
                if len(gone := np.setdiff1d(labels[ids], labels[kept])):
                    raise ValueError(
                        f"validation_per_class must leave client {client} of manifest {self.manifest} a train sample "
                        f"of class {self.class_names[gone[0]]!r} in task {task}, got {self.validation_per_class}: "
                        "lower it."
                    )
        return rest

    def save_manifest(self, path: str) -> None:
        """Save the split, so that any project can run the very same one."""
        meta: dict[str, Any] = {
            "dataset": self.dataset,
            "image_height": self.data.train_images.shape[2],
            "image_width": self.data.train_images.shape[3],
            "image_rule": "crop" if self.data.is_cropped else "stored",
            "train_per_class": self.train_per_class,
            "test_per_class": self.test_per_class,
        }
        if self.manifest is None:
            meta |= {
                "protocol": self.protocol,
                "private_classes": self.private_classes,
                "public_classes": self.public_classes,
                "dirichlet_alpha": self.dirichlet_alpha,
                "seed": self.run_seed if self.seed is None else self.seed,
            }
        save_manifest(path, self.splits, self.class_names, self.data.fingerprint, meta)


@dataclass(frozen=True, eq=False)
class ClientStream:
    """One client's stream of tasks, counted from 0."""

    client: int
    split: ClientSplit
    data: ImageData
    num_workers: int = 0
    augment: Augment = "none"
    """Random changes of the shuffled images, which are those that a net is trained on."""
    held_out: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Ids (n,) of the train samples that are kept for validation, of all classes."""
    evaluate_on: EvaluateOn = "test"

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

    def validation_ids(self, task: int) -> Tensor:
        """Ids (n,) of all validation samples of the task's classes; no client trains on them."""
        return self.held_out[torch.isin(self.data.labels(self.held_out), self.classes(task))]

    def evaluation_ids(self, task: int) -> Tensor:
        """Ids (n,) of the samples on which a run evaluates: ``test_ids``, or ``validation_ids``."""
        return self.test_ids(task) if self.evaluate_on == "test" else self.validation_ids(task)

    def class_counts(self, task: int) -> Tensor:
        """Train samples per class, (num_classes,) int64."""
        return torch.bincount(self.data.labels(self.train_ids(task)), minlength=self.data.num_classes)

    def fetch(self, ids: Tensor) -> Batch:
        """The samples of ids (B,), in that order."""
        return self.data.fetch(ids)

    def loader(
        self, ids: Tensor, batch_size: int, shuffle: bool, generator: torch.Generator | None = None
    ) -> DataLoader:
        """Loader of even batches over ids (n,), see `fedlscl.data.batches`; only shuffled images are augmented."""
        augment = self.augment if shuffle else "none"
        return batches(self.data, ids, batch_size, shuffle, generator, self.num_workers, augment)


class ClientTaskDataModule(L.LightningDataModule):
    """One client and task, for a stock ``lightning.Trainer``."""

    def __init__(self, streams: SpatialTemporalDataModule, client: int | None, task: int | None) -> None:
        super().__init__()
        self.streams, self.client, self.task = streams, client, task

    @override
    def setup(self, stage: str | None = None) -> None:
        self.streams.setup(stage)

    @override
    def train_dataloader(self) -> DataLoader:
        return self.streams.train_dataloader(self.client, self.task)

    @override
    def test_dataloader(self) -> DataLoader:
        return self.streams.test_dataloader(self.client, self.task)

    @override
    def val_dataloader(self) -> DataLoader:
        return self.streams.val_dataloader(self.client, self.task)

    predict_dataloader = test_dataloader
