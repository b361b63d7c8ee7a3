"""PrefixCache: outputs of frozen net parts, computed once per image and kept on the device, in memory or in files."""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

import fedlscl.nets
from fedlscl.data import Batch, SpatialTemporalDataModule
from fedlscl.nets.net import Net

HOST = torch.device("cpu")
CHUNK = 64
"""Images per forward pass that fills the cache."""
DIGEST = 16
"""Bytes of a chunk's checksum in the index file."""


class PrefixCache:
    """Outputs of a net's frozen part by sample id, for as many images as the budget holds.

    Rounding depends on which images share a forward pass. The split alone determines these chunks and which of them are
    kept, so that a resumed run or another order of clients gets the same bits. The storage changes no bit either.
    Randomly augmented images (``Batch.augmented``) are never cached.

    Args:
        datamodule: images and split.
        budget_bytes: maximum size of the rows of one frozen part.
        dtype: of the rows.
        folder: keeps the rows in files, which later processes find again.
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

    def attach(
        self,
        batch: Batch,
        net: Net,
        precision: Callable[[], AbstractContextManager[None]],
        device: torch.device = HOST,
    ) -> Batch:
        """Add the output of the net's frozen part (``net.prefix_key``) to a batch on the host, if it is cached.

        ``device`` computes it and gets it. With a warm cache it is not waited for.
        """
        ids = batch.ids
        if batch.prefix is not None or batch.augmented or (ids < 0).any():
            return batch
        chunks = self.chunk_of[ids].unique().tolist()
        if not all(chunk >= 0 and self._fill(chunk, net, device, precision) for chunk in chunks):
            return batch
        return batch._replace(prefix=self.stores[str(net.prefix_key)].take(self.row[ids], device))

    @torch.no_grad()
    def _fill(
        self, index: int, net: Net, device: torch.device, precision: Callable[[], AbstractContextManager[None]]
    ) -> bool:
        """Compute a chunk unless it is cached; returns whether it is within the budget."""
        chunk, end, store = self.chunks[index], self.ends[index], self.stores.get(str(net.prefix_key))
        rows = slice(end - len(chunk), end)
        if store is not None and (end > len(store) or store.has(index, rows)):
            return end <= len(store)
        with precision():
            prefix = net.frozen_prefix(self.datamodule.fetch(chunk).images.to(device)).to(self.dtype)
        if store is None:
            store = self._create_store(net, prefix)
        if end > len(store):
            return False
        if not store.has(index, rows):
            store.put(index, rows, prefix)
        return True

    def _create_store(self, net: Net, prefix: Tensor) -> "MemoryRows | FileRows":
        shape = prefix.shape[1:]
        rows = min(int(self.budget_bytes // (shape.numel() * prefix.element_size())), self.ends[-1])
        if self.folder is None or not rows:
            store = MemoryRows(rows, shape, self.dtype, prefix.device)
        else:
            path = self.folder / f"{self._name(net, prefix)}.tokens"
            store = FileRows(path, len(self.chunks), rows, shape, self.dtype)
        self.stores[str(net.prefix_key)] = store
        return store

    def _name(self, net: Net, prefix: Tensor) -> str:
        """Hash of all that determines the bits: weights, resolution and block, images, split, code and machine."""
        vit = net.foundation
        transform = None if vit is None else (vit.mean.tolist(), vit.std.tolist())
        machine = (
            torch.__version__,
            prefix.device.type,
            torch.get_num_threads(),
            torch.backends.cpu.get_cpu_capability(),
        )
        images = self.datamodule.data.fingerprint
        facts = (net.prefix_key, transform, tuple(prefix.shape[1:]), self.dtype, images, machine)
        digest = hashlib.sha256(repr(facts).encode())
        for chunk in self.chunks:
            digest.update(chunk.numpy().tobytes() + b"/")
        for source in sorted(Path(fedlscl.nets.__path__[0]).glob("*.py")):  # includes the image transform
            digest.update(source.read_bytes())
        return digest.hexdigest()[:32]


def _chunks(datamodule: SpatialTemporalDataModule) -> list[Tensor]:
    streams = [datamodule.stream(client) for client in range(datamodule.num_clients)]
    seen = torch.zeros(len(datamodule.data.train_labels) + len(datamodule.data.test_labels), dtype=torch.bool)
    chunks: list[Tensor] = []
    for task in range(datamodule.num_tasks):
        for stream in streams:
            for ids in (stream.train_ids(task), stream.evaluation_ids(task)):
                fresh = ids[~seen[ids]]
                seen[fresh] = True
                chunks += [chunk for chunk in fresh.split(CHUNK) if len(chunk)]
    return chunks


class MemoryRows:
    """Rows in memory: on the device if they leave half of its free memory to training, otherwise on the host."""

    def __init__(self, rows: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        size = rows * torch.Size(shape).numel() * dtype.itemsize
        if device.type == "cuda" and 2 * size > torch.cuda.mem_get_info(device)[0]:
            device = torch.device("cpu")
        self.values = torch.empty(rows, *shape, dtype=dtype, device=device)
        self.filled: set[int] = set()

    def __len__(self) -> int:
        return len(self.values)

    def has(self, chunk: int, rows: slice) -> bool:
        """Whether a chunk is stored."""
        return chunk in self.filled

    def put(self, chunk: int, rows: slice, values: Tensor) -> None:
        """Store a chunk."""
        self.values[rows] = values
        self.filled.add(chunk)

    def take(self, rows: Tensor, device: torch.device = HOST) -> Tensor:
        """Rows by index (n,), on a device."""
        if device.type != "cuda" or self.values.device.type == "cuda":
            return self.values[rows.to(self.values.device, non_blocking=True)].to(device, non_blocking=True)
        pinned = torch.empty(len(rows), *self.values.shape[1:], dtype=self.values.dtype, pin_memory=True)
        return torch.index_select(self.values, 0, rows, out=pinned).to(device, non_blocking=True)


class FileRows(MemoryRows):
    """Rows in a memory-mapped file, with a checksum of each chunk in a second file.

    A chunk is valid if its rows have the checksum: after a kill during a write, or on a damaged disk, it is computed
    again. Processes may share the files, since all of them write the same bytes.
    """

    def __init__(self, path: Path, chunks: int, rows: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers, index = rows * torch.Size(shape).numel(), path.with_suffix(".index")
        _allocate(path, numbers * dtype.itemsize)
        _allocate(index, chunks * DIGEST)
        self.values = torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).view(rows, *shape)
        digests = torch.from_file(str(index), shared=True, size=chunks * DIGEST, dtype=torch.uint8)
        self.index = digests.view(chunks, DIGEST)
        self.filled: set[int] = set()
        """Chunks that this process has checked."""

    def has(self, chunk: int, rows: slice) -> bool:
        """Whether a valid chunk is stored; checked once per process."""
        if chunk not in self.filled and self.index[chunk].any():
            if torch.equal(self.index[chunk], checksum(self.values[rows])):
                self.filled.add(chunk)
        return chunk in self.filled

    def put(self, chunk: int, rows: slice, values: Tensor) -> None:
        """Store a chunk, then its checksum."""
        super().put(chunk, rows, values.cpu())
        self.index[chunk] = checksum(self.values[rows])


def checksum(values: Tensor) -> Tensor:
    """BLAKE2b of a tensor's bytes, (DIGEST,) uint8."""
    data = values.contiguous().view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(bytearray(hashlib.blake2b(data.data, digest_size=DIGEST).digest()), dtype=torch.uint8)


def _allocate(path: Path, size: int) -> None:
    """Reserve a file's size: if the disk were full at the first write to a mapped page, the process would be killed."""
    with path.open("ab") as file:
        before = file.tell()
        if size <= before:
            return
        try:
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            file.truncate(before)
            raise ValueError(
                f"{str(path.parent)!r} must have room for {size / 2**30:.2f} GiB of cached ViT tokens "
                f"({error.strerror}): lower trainer.cache_gb, or choose a state-dir on a larger disk."
            ) from error
