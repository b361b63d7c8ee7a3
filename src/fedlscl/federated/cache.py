"""Frozen prefixes, computed once per image and run; with a folder, once per image and split."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

import fedlscl.nets
from fedlscl.data import Batch, SpatialTemporalDataModule
from fedlscl.federated.store import FileRows, MemoryRows
from fedlscl.nets.net import Net

CHUNK = 64
"""Images per forward pass that fills the cache."""


class PrefixCache:
    """Outputs of a net's frozen part by sample id, for as many images as the budget holds.

    Rounding depends on which images share a pass, so the split alone decides the composition of the passes and which
    of them are kept: a resumed run, or another order of clients, gets the same bits. Where they are kept changes none:
    on the device, in host memory if there is little room, or in files under ``folder`` that later runs find again.
    Random images (``Batch.augmented``) are never served from here.
    """

    def __init__(
        self,
        datamodule: SpatialTemporalDataModule,
        budget_bytes: float,
        dtype: torch.dtype,
        folder: Path | None = None,
    ) -> None:
        self.datamodule, self.budget_bytes, self.dtype, self.folder = datamodule, budget_bytes, dtype, folder
        self.chunks = _chunks(datamodule)
        num_ids = len(datamodule.data.train_labels) + len(datamodule.data.test_labels)
        self.chunk_of, self.row = torch.full((num_ids,), -1), torch.full((num_ids,), -1)
        self.ends = torch.tensor([0, *map(len, self.chunks)]).cumsum(0)[1:].tolist()
        for index, (chunk, end) in enumerate(zip(self.chunks, self.ends, strict=True)):
            self.chunk_of[chunk] = index
            self.row[chunk] = torch.arange(end - len(chunk), end)
        self.stores: dict[str, MemoryRows | FileRows] = {}

    def attach(self, batch: Batch, net: Net, precision: Callable[[], AbstractContextManager[None]]) -> Batch:
        """Give a batch on the device the prefix of ``net`` for its samples, where net and budget allow it."""
        ids = batch.ids.cpu()
        if net.prefix_key is None or batch.prefix is not None or batch.augmented or (ids < 0).any():
            return batch
        chunks = self.chunk_of[ids].unique().tolist()
        if not all(chunk >= 0 and self._fill(chunk, net, batch.images.device, precision) for chunk in chunks):
            return batch
        rows = self.stores[net.prefix_key].take(self.row[ids])
        return batch._replace(prefix=rows.to(batch.images.device, non_blocking=True))

    @torch.no_grad()
    def _fill(
        self, index: int, net: Net, device: torch.device, precision: Callable[[], AbstractContextManager[None]]
    ) -> bool:
        chunk, end, key = self.chunks[index], self.ends[index], net.prefix_key
        rows = slice(end - len(chunk), end)
        if key in self.stores and (end > len(self.stores[key]) or self.stores[key].has(index, rows)):
            return end <= len(self.stores[key])
        with precision():
            prefix = net.frozen_prefix(self.datamodule.fetch(chunk).images.to(device)).to(self.dtype)
        store = self._store(net, prefix)
        if end > len(store):
            return False
        if not store.has(index, rows):
            store.put(index, rows, prefix)
        return True

    def _store(self, net: Net, prefix: Tensor) -> MemoryRows | FileRows:
        key = str(net.prefix_key)
        if key not in self.stores:
            shape = prefix.shape[1:]
            rows = min(int(self.budget_bytes // (shape.numel() * prefix.element_size())), self.ends[-1])
            if self.folder is None or not rows:
                self.stores[key] = MemoryRows(rows, shape, self.dtype, prefix.device)
            else:
                path = self.folder / f"{self._name(net, prefix)}.tokens"
                self.stores[key] = FileRows(path, len(self.chunks), rows, shape, self.dtype)
        return self.stores[key]

    def _name(self, net: Net, prefix: Tensor) -> str:
        """Hash of all that the bits depend on: weights, resolution and block, images, split, code and machine."""
        vit = net.foundation
        transform = None if vit is None else (vit.mean.tolist(), vit.std.tolist())
        machine = (
            torch.__version__,
            prefix.device.type,
            torch.get_num_threads(),
            torch.backends.cpu.get_cpu_capability(),
        )
        facts = (
            net.prefix_key,
            transform,
            tuple(prefix.shape[1:]),
            self.dtype,
            self.datamodule.data.fingerprint,
            machine,
        )
        digest = hashlib.sha256(repr(facts).encode())
        for chunk in self.chunks:
            digest.update(chunk.numpy().tobytes() + b"/")
        for source in sorted(Path(fedlscl.nets.__path__[0]).glob("*.py")):  # the transform is in there, too
            digest.update(source.read_bytes())
        return digest.hexdigest()[:32]


def _chunks(datamodule: SpatialTemporalDataModule) -> list[Tensor]:
    streams = [datamodule.stream(client) for client in range(datamodule.num_clients)]
    seen = torch.zeros(len(datamodule.data.train_labels) + len(datamodule.data.test_labels), dtype=torch.bool)
    chunks: list[Tensor] = []
    for task in range(datamodule.num_tasks):
        for ids in _groups(streams, task):
            fresh = ids[~seen[ids]]
            seen[fresh] = True
            chunks += [chunk for chunk in fresh.split(CHUNK) if len(chunk)]
    return chunks


def _groups(streams: Sequence, task: int) -> list[Tensor]:
    return [ids for stream in streams for ids in (stream.train_ids(task), stream.test_ids(task))]
