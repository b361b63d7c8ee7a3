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

    Rounding depends on which images share a pass, so passes have a composition that only the split decides: a resumed
    run fills its cache with the same bits.
    """

    def __init__(self, datamodule: SpatialTemporalDataModule, budget_bytes: float, dtype: torch.dtype) -> None:
        self.datamodule, self.budget_bytes, self.dtype = datamodule, budget_bytes, dtype
        self.chunks = _chunks(datamodule)
        self.num_ids = len(datamodule.data.train_labels) + len(datamodule.data.test_labels)
        self.chunk_of = torch.full((self.num_ids,), -1)
        for index, chunk in enumerate(self.chunks):
            self.chunk_of[chunk] = index
        self.stores: dict[str, tuple[Tensor, Tensor]] = {}
        self.is_full = False

    def attach(self, batch: Batch, net: Net, precision: Callable[[], AbstractContextManager[None]]) -> Batch:
        """Give a batch on the device the prefix of ``net`` for its samples, where net and budget allow it."""
        if net.prefix_key is None or batch.prefix is not None:
            return batch
        known = self.chunk_of[batch.ids.cpu()]
        if (known < 0).any():
            return batch
        for chunk in known.unique().tolist():
            if not self._fill(chunk, net, batch.images.device, precision):
                return batch
        store, position = self.stores[net.prefix_key]
        rows = store[position[batch.ids.cpu()].to(store.device)]
        return batch._replace(prefix=rows.to(batch.images.device, non_blocking=True))

    @torch.no_grad()
    def _fill(
        self, chunk: int, net: Net, device: torch.device, precision: Callable[[], AbstractContextManager[None]]
    ) -> bool:
        ids = self.chunks[chunk]
        if net.prefix_key in self.stores:
            position = self.stores[net.prefix_key][1]
            if position[ids[0]] >= 0:
                return True
            if self.is_full:
                return False
        with precision():
            prefix = net.frozen_prefix(self.datamodule.fetch(ids).images.to(device)).to(self.dtype)
        store, position = self._store(net.prefix_key, prefix)
        start = int(position.max()) + 1
        if start + len(ids) > len(store):
            self.is_full = True
            return False
        store[start : start + len(ids)] = prefix
        position[ids] = torch.arange(start, start + len(ids))
        return True

    def _store(self, key: str, prefix: Tensor) -> tuple[Tensor, Tensor]:
        if key not in self.stores:
            rows = min(
                int(self.budget_bytes // (prefix[0].numel() * prefix.element_size())), sum(map(len, self.chunks))
            )
            store = torch.empty(rows, *prefix.shape[1:], dtype=self.dtype, device=prefix.device)
            self.stores[key] = store, torch.full((self.num_ids,), -1)
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
