"""Where rows of cached tensors lie: on the device, in host memory, or in a file that outlives the process."""

import os
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

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
