"""Outputs of frozen prefixes, computed once per image, in memory or in files."""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

import fedlscl.nets
from fedlscl.data import Batch, SpatialTemporalDataModule
from fedlscl.nets.net import Net

# Where rows of cached tensors lie: on the device, in host memory, or in a file that outlives the process.

DIGEST = 16
"""Bytes of a chunk's checksum in the index file."""


class MemoryRows:
    """Rows in memory: on the device if they leave half of its free memory to training, else on the host."""

    def __init__(self, rows: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        size = rows * torch.Size(shape).numel() * dtype.itemsize
        if device.type == "cuda" and 2 * size > torch.cuda.mem_get_info(device)[0]:
            device = torch.device("cpu")
        self.values = torch.empty(rows, *shape, dtype=dtype, device=device)
        self.filled: set[int] = set()

    def __len__(self) -> int:
        return len(self.values)

    def has(self, chunk: int, rows: slice) -> bool:
        """Whether the rows of a chunk are there."""
        return chunk in self.filled

    def put(self, chunk: int, rows: slice, values: Tensor) -> None:
        """Keep a chunk."""
        self.values[rows] = values
        self.filled.add(chunk)

    def take(self, rows: Tensor) -> Tensor:
        """Some rows (n,), in that order."""
        return self.values[rows.to(self.values.device)]


class FileRows:
    """Rows in a memory-mapped file, with a checksum of each chunk in a second one.

    A chunk counts as there when its rows have the checksum that the index names: a process that is killed while it
    writes, or a damaged disk, leaves a chunk that is computed again. Two processes may share the files, since both
    write the same bytes.
    """

    def __init__(self, path: Path, chunks: int, rows: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = rows * torch.Size(shape).numel()
        _reserve(path, numbers * dtype.itemsize)
        _reserve(path.with_suffix(".index"), chunks * DIGEST)
        self.values = torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).view(rows, *shape)
        index = torch.from_file(str(path.with_suffix(".index")), shared=True, size=chunks * DIGEST, dtype=torch.uint8)
        self.index = index.view(chunks, DIGEST)
        self.checked: set[int] = set()

    def __len__(self) -> int:
        return len(self.values)

    def has(self, chunk: int, rows: slice) -> bool:
        """Whether the rows of a chunk are there, checked once per process."""
        if chunk not in self.checked and self.index[chunk].any():
            if torch.equal(self.index[chunk], checksum(self.values[rows])):
                self.checked.add(chunk)
        return chunk in self.checked

    def put(self, chunk: int, rows: slice, values: Tensor) -> None:
        """Keep a chunk; its checksum comes last."""
        self.values[rows] = values.cpu()
        self.index[chunk] = checksum(self.values[rows])
        self.checked.add(chunk)

    def take(self, rows: Tensor) -> Tensor:
        """Some rows (n,), in that order."""
        return self.values[rows]


def checksum(values: Tensor) -> Tensor:
    """BLAKE2b of a tensor's bytes, (DIGEST,) uint8."""
    data = values.contiguous().view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(bytearray(blake2b(data.data, digest_size=DIGEST).digest()), dtype=torch.uint8)


def _reserve(path: Path, size: int) -> None:
    """Give a file its size at once: a disk that is full while a mapped page is written would end the process."""
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
                f"cache_dir {str(path.parent)!r} has no room for {size / 2**30:.2f} GiB of tokens "
                f"({error.strerror}): lower cache_gb, or choose another folder."
            ) from error


# Frozen prefixes, computed once per image and run; with a folder, once per image and split.

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
