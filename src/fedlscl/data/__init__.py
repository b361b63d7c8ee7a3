"""Data sets, their split into clients and tasks, batches and the replay buffer."""

from fedlscl.data.datamodule import ClientStream, SpatialTemporalDataModule
from fedlscl.data.datasets import (
    CIFAR100,
    Digits,
    Fake,
    Folder,
    ImageNetR,
    ImageSource,
    NpzFile,
    TorchDatasets,
    load_images,
)
from fedlscl.data.loader import Batch, Buffer, EvenBatches, ImageData, batches, lowest_loss
from fedlscl.data.split import ClientSplit, load_manifest, save_manifest, spatial_temporal_split

__all__ = [
    "CIFAR100",
    "Batch",
    "Buffer",
    "ClientSplit",
    "ClientStream",
    "Digits",
    "EvenBatches",
    "Fake",
    "Folder",
    "ImageData",
    "ImageNetR",
    "ImageSource",
    "NpzFile",
    "SpatialTemporalDataModule",
    "TorchDatasets",
    "batches",
    "load_images",
    "load_manifest",
    "lowest_loss",
    "save_manifest",
    "spatial_temporal_split",
]
