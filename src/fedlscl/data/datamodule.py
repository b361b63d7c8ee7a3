"""SpatialTemporalDataModule: every client's stream of tasks as a LightningDataModule."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from fedlscl.data.datasets import ImageSource, Side, load_images
from fedlscl.data.loader import Augment, Batch, ImageData, batches, check_integers
from fedlscl.data.split import (
    ALPHAS,
    MAX_CLIENTS,
    ClientSplit,
    Protocol,
    held_out,
    load_manifest,
    save_manifest,
    spatial_temporal_split,
)
from fedlscl.options import Count, Interval, Whole, check_options


@dataclass(kw_only=True, eq=False, repr=False)
class SpatialTemporalDataModule(L.LightningDataModule):
    """K clients, each with its own stream of T tasks of new classes.

    Its dataloaders pool all clients and tasks, each sample once, so that it works with any ``lightning.Trainer`` (the
    centralised upper bound); `at` narrows it to one client or task, and federated training uses `stream`.
    """

    dataset: str | ImageSource = "digits"
    """'cifar100', 'imagenet-r', 'folder', 'digits', 'fake', the name of an .npz file in MedMNIST's layout, or a
    subclass of `fedlscl.data.ImageSource`: an object in Python, a class_path in YAML."""
    root: str | None = None
    """Folder that holds the data set."""
    num_clients: Annotated[int, Interval(f"[1, {MAX_CLIENTS}]")] = 3
    """Clients K."""
    num_tasks: Count = 3
    """Tasks T per client, of equally many classes."""
    private_classes: Whole = 2
    """Classes per client that no other client has."""
    public_classes: Whole = 4
    """Classes that all clients share; their train samples are divided without overlap."""
    dirichlet_alpha: Annotated[float, ALPHAS] = 1.0
    """Dirichlet concentration; smaller is more heterogeneous."""
    protocol: Protocol = "local"
    """'local' gives every client its own classes in its own order; 'global' gives all clients the same public classes
    in the same order and needs private_classes 0."""
    batch_size: Count = 32
    """Samples per batch of the plain dataloaders."""
    image_size: Side | None = None
    """Side in pixels of decoded folder images (224 if left out) and of 'fake'; other data sets keep their size, and
    every net resizes for itself."""
    train_per_class: Count | None = None
    """Keep at most so many train samples of each class."""
    test_per_class: Count | None = None
    """Keep at most so many test samples of each class."""
    validation_per_class: Whole = 0
    """Hold so many train samples of each class out of all clients' training, to choose hyper-parameters with."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Samples on which a run evaluates its clients: 'validation' to choose hyper-parameters, 'test' afterwards."""
    seed: Whole | None = None
    """Of the split; the seed of the run if left out."""
    manifest: str | None = None
    """Saved split to use instead of a draw; num_clients and num_tasks must agree with it."""
    download: bool = False
    """Fetch 'cifar100' if it is not under root."""
    cache_dir: str | None = None
    """Folder of decoded images, ~/.cache/fedlscl if left out."""
    fake_classes: Count = 12
    """Number of classes of 'fake'."""
    num_workers: Annotated[int, Interval("[0, 256]")] = 0
    """Processes that load batches; 0 loads in the training process."""
    augment: Augment = "none"
    """'standard' shifts and flips training images at random, anew in every epoch; frozen ViT tokens are then computed
    at every step instead of once."""
    run_seed: int = field(default=42, init=False)
    """Seed of the split if ``seed`` is left out; the trainer sets it to the seed of the run."""

    def __post_init__(self) -> None:
        super().__init__()
        check_options(self)
        if self.evaluate_on == "validation" and not self.validation_per_class:
            raise ValueError("validation_per_class must be >= 1 to evaluate on validation samples, got 0.")
        self.source = self.dataset
        # From here on its name in results and manifests.
        self.dataset = self.source if isinstance(self.source, str) else self.source.name
        self._place: tuple[int | None, int | None] = None, None
        self._split_seed: int | None = None

    @cached_property
    def data(self) -> ImageData:
        """The whole data set, loaded at first use."""
        return load_images(
            self.source,
            self.root,
            self.image_size,
            train_per_class=self.train_per_class,
            test_per_class=self.test_per_class,
            download=self.download,
            cache_dir=self.cache_dir,
            fake_classes=self.fake_classes,
        )

    @property
    def splits(self) -> list[ClientSplit]:
        """One split per client, drawn or read at first use."""
        if (seed := self.run_seed if self.seed is None else self.seed) != self._split_seed:
            labels = self.data.train_labels.numpy().copy()
            held = held_out(labels, self.validation_per_class, seed, self.class_names)
            if self.manifest is not None:
                self._splits = self._load(self.manifest, held)
            else:
                labels[held] = -1
                self._splits = spatial_temporal_split(
                    labels,
                    self.data.test_labels.numpy(),
                    num_clients=self.num_clients,
                    num_tasks=self.num_tasks,
                    private_classes=self.private_classes,
                    public_classes=self.public_classes,
                    dirichlet_alpha=self.dirichlet_alpha,
                    protocol=self.protocol,
                    seed=seed,
                    class_names=self.class_names,
                )
            self._held_out, self._split_seed = torch.from_numpy(held), seed
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
        _ = self.splits

    def stream(self, client: int) -> "ClientStream":
        """The tasks of one client."""
        check_integers(0, self.num_clients - 1, client=client)
        split = self.splits[client]
        return ClientStream(client, split, self.data, self.num_workers, self.augment, self._held_out, self.evaluate_on)

    def fetch(self, ids: Tensor) -> Batch:
        """The samples of ids (B,), in that order."""
        return self.data.fetch(ids)

    def at(self, client: int | None, task: int | None) -> "SpatialTemporalDataModule":
        """The same data, with dataloaders of one client and task; ``None`` means every client, or every task."""
        check_integers(0, self.num_clients - 1, client=client)
        check_integers(0, self.num_tasks - 1, task=task)
        self.setup()
        narrowed = copy(self)
        narrowed._place = client, task
        return narrowed

    @override
    def train_dataloader(self) -> DataLoader:
        """Shuffled train samples."""
        return self._loader(ClientStream.train_ids, shuffle=True)

    @override
    def test_dataloader(self) -> DataLoader:
        """Test samples."""
        return self._loader(ClientStream.test_ids)

    @override
    def val_dataloader(self) -> DataLoader:
        """Validation samples; the test samples without ``validation_per_class``."""
        return self._loader(ClientStream.validation_ids if self.validation_per_class else ClientStream.test_ids)

    predict_dataloader = test_dataloader

    def public_images(self, classes: Tensor, per_class: int, batch_size: int) -> DataLoader:
        """Shuffled validation samples of ``classes`` (n,), at most ``per_class`` of each, for a server to train on."""
        self.setup()
        labels = self.data.labels(self._held_out)
        ids = torch.cat([self._held_out[labels == label][:per_class] for label in classes])
        return batches(self.data, ids, batch_size, True, None, self.num_workers)

    def _loader(self, ids_of: Callable[["ClientStream", int], Tensor], shuffle: bool = False) -> DataLoader:
        client, task = self._place
        clients = range(self.num_clients) if client is None else [client]
        tasks = range(self.num_tasks) if task is None else [task]
        ids = torch.cat([ids_of(self.stream(i), n) for i in clients for n in tasks]).unique()
        return batches(self.data, ids, self.batch_size, shuffle, None, self.num_workers, self.augment)

    def _load(self, path: str, held: np.ndarray) -> list[ClientSplit]:
        """A saved split without the validation samples."""
        splits, labels = load_manifest(path, self.data.fingerprint, self.class_names), self.data.train_labels.numpy()
        tasks = sorted({len(split.classes) for split in splits})
        if len(splits) != self.num_clients or tasks != [self.num_tasks]:
            raise ValueError(
                f"manifest {path} must have {self.num_clients} clients x {self.num_tasks} tasks, got {len(splits)} "
                f"clients x {' or '.join(map(str, tasks))} tasks: set num_clients and num_tasks to those of the "
                "manifest."
            )
        for client, split in enumerate(splits):
            rest = tuple(np.setdiff1d(ids, held, assume_unique=True) for ids in split.train)
            for task, (ids, kept) in enumerate(zip(split.train, rest, strict=True)):
                if len(gone := np.setdiff1d(labels[ids], labels[kept])):
                    raise ValueError(
                        f"validation_per_class must leave client {client} of manifest {path} a train sample of class "
                        f"{self.class_names[gone[0]]!r} in task {task}, got {self.validation_per_class}: lower it."
                    )
            splits[client] = replace(split, train=rest)
        return splits

    def save_manifest(self, path: str) -> None:
        """Save the split, so that any project can run the very same one."""
        meta = {
            "dataset": self.dataset,
            "image_height": self.data.train_images.shape[2],
            "image_width": self.data.train_images.shape[3],
            "image_rule": "crop" if self.data.is_cropped else "stored",
            "train_per_class": self.train_per_class,
            "test_per_class": self.test_per_class,
        }
        if self.manifest is None:
            drawn = ("protocol", "private_classes", "public_classes", "dirichlet_alpha")
            meta |= {name: getattr(self, name) for name in drawn}
            meta["seed"] = self.run_seed if self.seed is None else self.seed
        save_manifest(path, self.splits, self.class_names, self.data.fingerprint, meta)


@dataclass(frozen=True, eq=False)
class ClientStream:
    """One client's stream of tasks, counted from 0."""

    client: int
    split: ClientSplit
    data: ImageData
    num_workers: int
    augment: Augment
    held_out: Tensor
    """Ids (n,) of the train samples that are kept for validation, of all classes."""
    evaluate_on: str

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
        """Loader of even batches over ids (n,), see `fedlscl.data.batches`."""
        return batches(self.data, ids, batch_size, shuffle, generator, self.num_workers, self.augment)
