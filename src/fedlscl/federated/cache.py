"""Frozen prefixes, computed once per image and run."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fedlscl.data import Batch, SpatialTemporalDataModule
from fedlscl.nets.net import Net

CHUNK = 64
"""Images per forward pass that fills the cache."""


class PrefixCache:
    """Outputs of a net's frozen part by sample id, for as many images as the budget holds.

    Rounding depends on which images share a pass, so the split alone decides the composition of the passes and which
    of them are kept: a resumed run, or another order of clients, gets the same bits.
    """

    def __init__(self, datamodule: SpatialTemporalDataModule, budget_bytes: float, dtype: torch.dtype) -> None:
        self.datamodule, self.budget_bytes, self.dtype = datamodule, budget_bytes, dtype
        self.chunks = _chunks(datamodule)
        num_ids = len(datamodule.data.train_labels) + len(datamodule.data.test_labels)
        self.chunk_of, self.row = torch.full((num_ids,), -1), torch.full((num_ids,), -1)
        self.ends = torch.tensor([0, *map(len, self.chunks)]).cumsum(0)[1:].tolist()
        for index, (chunk, end) in enumerate(zip(self.chunks, self.ends, strict=True)):
            self.chunk_of[chunk] = index
            self.row[chunk] = torch.arange(end - len(chunk), end)
        self.stores: dict[str, tuple[Tensor, set[int]]] = {}

    def attach(self, batch: Batch, net: Net, precision: Callable[[], AbstractContextManager[None]]) -> Batch:
        """Give a batch on the device the prefix of ``net`` for its samples, where net and budget allow it."""
        ids = batch.ids.cpu()
        if net.prefix_key is None or batch.prefix is not None or (ids < 0).any():
            return batch
        chunks = self.chunk_of[ids].unique().tolist()
        if not all(chunk >= 0 and self._fill(chunk, net, batch.images.device, precision) for chunk in chunks):
            return batch
        store, _ = self.stores[net.prefix_key]
        rows = store[self.row[ids].to(store.device)]
        return batch._replace(prefix=rows.to(batch.images.device, non_blocking=True))

    @torch.no_grad()
    def _fill(
        self, index: int, net: Net, device: torch.device, precision: Callable[[], AbstractContextManager[None]]
    ) -> bool:
        chunk, end, key = self.chunks[index], self.ends[index], net.prefix_key
        assert key is not None
        if key in self.stores:
            store, filled = self.stores[key]
            if index in filled or end > len(store):
                return index in filled
        with precision():
            prefix = net.frozen_prefix(self.datamodule.fetch(chunk).images.to(device)).to(self.dtype)
        store, filled = self._store(key, prefix)
        if end > len(store):
            return False
        store[end - len(chunk) : end] = prefix
        filled.add(index)
        return True

    def _store(self, key: str, prefix: Tensor) -> tuple[Tensor, set[int]]:
        if key not in self.stores:
            rows = min(int(self.budget_bytes // (prefix[0].numel() * prefix.element_size())), self.ends[-1])
            store = torch.empty(rows, *prefix.shape[1:], dtype=self.dtype, device=prefix.device)
            self.stores[key] = store, set()
        return self.stores[key]


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
