"""Engine, the package's only training and inference loop on Fabric; its processes; the cache of frozen parts."""

import ctypes
import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

import fedlscl.nets
from fedlscl.data import Batch, ClientStream, SpatialTemporalDataModule
from fedlscl.federated.client import Client, ClientOffloader
from fedlscl.federated.method import Stage
from fedlscl.federated.payload import read_message, write_payload
from fedlscl.nets.net import Net

T = TypeVar("T")
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""
INITIAL_SCALE = 2.0**12
"""Of the loss in 16-mixed (ours; 2^16 in torch, whose first steps often overflow and are skipped)."""
PATIENCE = timedelta(days=7)
"""How long a process waits for the others (30 minutes in torch, which the training at a server can exceed)."""


@dataclass(eq=False, repr=False)
class Engine:
    """Trains stages and runs nets on Fabric's device and in its precision."""

    fabric: Fabric
    cache: "PrefixCache | None"
    """Cached outputs of frozen net parts; None computes them in every step."""
    infer_batch_size: int = 128
    """Images per forward pass of ``infer``."""
    offloader: ClientOffloader = field(default_factory=ClientOffloader)
    visitor: Client | None = field(default=None, init=False)
    """The client whose nets are on the device."""

    def train(self, stage: Stage, on_batch: Callable[[int], None] = lambda size: None) -> dict[str, float]:
        """Train a stage; returns the mean of each loss term over the last epoch.

        On a device no step waits for its results. In 16-mixed every stage starts with a new gradient scaler, so that
        stages do not depend on each other, and gradients are unscaled before ``on_before_optimizer_step``.
        """
        module = stage.module
        self.fabric.to_device(module)
        optimizer: Any = self.fabric.setup_optimizers(module.configure_optimizers())
        scaler = self._new_scaler()
        module.train()
        sums: dict[str, Tensor] = {}
        steps = 0
        for _ in range(stage.epochs):
            sums = {}
            for steps, batch in enumerate(stage.batches, start=1):
                prepared = self.prepare(batch, module.net)
                with self.precision(module.net):
                    terms = module.training_step(prepared, steps - 1)
                self.fabric.backward(terms["loss"])
                if scaler is not None:
                    scaler.unscale_(optimizer.optimizer)
                module.on_before_optimizer_step(optimizer)
                optimizer.step()
                optimizer.zero_grad()
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value.detach()
                on_batch(len(batch.labels))
        module.eval()
        totals = torch.stack([value.float() for value in sums.values()]).tolist() if sums else []
        return {name: total / steps for name, total in zip(sums, totals, strict=True)}

    @torch.no_grad()
    def infer(
        self,
        net: Net,
        stream: ClientStream,
        ids: Tensor,
        part: Callable[[Tensor], Any] | None = None,
        views: Callable[[Batch], Any] | None = None,
    ) -> Iterator[tuple[Batch, Any]]:
        """Yield batches on the device with the net's outputs, in eval mode and in the order of ``ids``.

        ``part`` is called on the images, or ``views`` on the prepared batch, instead of the whole net.
        """
        net.eval()
        for batch in stream.loader(ids, self.infer_batch_size, shuffle=False):
            batch = self.fabric.to_device(batch) if part else self.prepare(batch, net)
            with self.precision(net):
                if part is not None:
                    output = part(batch.images)
                else:
                    output = net(batch.images, batch.prefix) if views is None else views(batch)
            yield batch, output

    def prepare(self, batch: Batch, net: Net) -> Batch:
        """Attach the cached output of the net's frozen part to a batch on the host, and move both to the device."""
        if self.cache is not None and net.prefix_key is not None:
            batch = self.cache.attach(batch, net, lambda: self.precision(net), self.fabric.device)
        return self.fabric.to_device(batch)

    @contextmanager
    def precision(self, net: Net) -> Iterator[None]:
        """Fabric's autocast, with the frozen ViT's matrices in its half precision already: the same bits."""
        with ExitStack() as contexts:
            contexts.enter_context(self.fabric.autocast())
            device = self.fabric.device.type
            if net.foundation is not None and torch.is_autocast_enabled(device):
                model = net.foundation.to(self.fabric.device)
                contexts.enter_context(model.cast(torch.get_autocast_dtype(device)))
            yield

    def _new_scaler(self) -> torch.amp.GradScaler | None:
        plugin: Any = self.fabric.strategy.precision
        if getattr(plugin, "scaler", None) is None:
            return None
        plugin.scaler = torch.amp.GradScaler(plugin.device, init_scale=INITIAL_SCALE)
        return plugin.scaler

    @contextmanager
    def on_device(self, client: Client) -> Iterator[None]:
        """Keep a client's nets on the device during its turn, or during several of its turns around which it is."""
        if self.visitor is client:
            yield
            return
        self.offloader.acquire(client)
        for net in filter(None, (client.net, client.previous)):
            self.fabric.to_device(net)
        self.visitor = client
        try:
            yield
        finally:
            self.visitor = None
            if self.fabric.device.type != "cpu":
                for net in filter(None, (client.net, client.previous)):
                    net.cpu()
            self.offloader.release(client)


class Ranks:
    """The processes of a run; with one process, gathering is the identity.

    Modules are not wrapped for data parallelism: each client trains in one process, so that the result does not depend
    on the number of processes (bit for bit if all have the same number of threads). Objects go through the hosts'
    memory (gloo), also between GPUs.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.size, self.rank = fabric.world_size, fabric.global_rank
        self.is_first = self.rank == 0
        """Whether this process writes files, calls callbacks and computes the server's part."""
        self.group: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None

    def gather(self, items: Sequence[T]) -> list[T]:
        """Items of all processes, in the order of ranks."""
        if self.size == 1:
            return list(items)
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, list(items), group=self.group)
        return [item for part in gathered for item in part]

    def from_first(self, value: T) -> T:
        """The value of the first process."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def connect(accelerator: str, devices: int, precision: Precision, deterministic: bool = False) -> Fabric:
    """Launch Fabric; with several devices the program is started again for each further one.

    On a GPU 32-true means float32 in convolutions, too (torch's default is TF32 there), and cuDNN tries its algorithms
    for each new shape. With ``deterministic`` it takes one that repeats to the bit, as other operations do where they
    can; a warning names those that cannot. Results on a CPU always repeat.
    """
    has_cuda = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not has_cuda:
        raise ValueError(f"accelerator must be cpu or auto on a machine without CUDA, got {accelerator!r}.")
    if precision == "16-mixed" and (not has_cuda or accelerator not in ("gpu", "cuda", "auto")):
        raise ValueError("precision must be bf16-mixed or 32-true without CUDA, got '16-mixed'.")
    try:
        strategy = "ddp" if devices > 1 else "auto"
        fabric = Fabric(accelerator=accelerator, devices=devices, precision=cast(Any, precision), strategy=strategy)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"accelerator must be available, got {accelerator!r} ({reason}): use cpu or auto.") from error
    fabric.launch()
    if precision == "bf16-mixed" and fabric.device.type == "cuda" and not has_bf16():
        raise ValueError("precision must be 16-mixed or 32-true on a GPU without bfloat16, got 'bf16-mixed'.")
    if fabric.device.type == "cpu":
        keep_freed_memory()
        return fabric
    torch.backends.cudnn.allow_tf32 = precision != "32-true"
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if has_cuda:
        torch.cuda.reset_peak_memory_stats()  # of earlier runs in this process
    return fabric


def has_bf16() -> bool:
    """Whether the GPU has bfloat16 itself; torch also emulates it on older ones, where it is slower than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def chosen_precision(precision: Precision, accelerator: str) -> Precision:
    """Resolve 'auto': bf16-mixed where the hardware accelerates it, otherwise 32-true (ours)."""
    if precision != "auto":
        return precision
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if has_bf16() else "32-true"
    return "bf16-mixed" if accelerator in ("auto", "cpu") and fast_bf16() else "32-true"


def fast_bf16() -> bool:
    """Whether this CPU has bf16 instructions; without them such products took 200 times those of float32."""
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of returning them to the kernel; only speed and resident memory change.

    ViT activations are blocks of several MB. By default each is mapped and unmapped in every step, and the page faults
    took a sixth of a DeiT-tiny step on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 256 << 20)


HOST = torch.device("cpu")
CHUNK = 64
"""Images per forward pass that fills the cache."""
DIGEST = hashlib.sha256().digest_size
Context = Callable[[], AbstractContextManager[None]]


@dataclass(eq=False, repr=False)
class PrefixCache:
    """Outputs of a net's frozen part by sample id, for as many images as the budget holds.

    Rounding depends on which images share a forward pass. The split alone determines these chunks and which of them are
    kept, so that a resumed run or another order of clients gets the same bits. Files change no bit either. Randomly
    augmented images (``Batch.augmented``) are never cached.
    """

    datamodule: SpatialTemporalDataModule
    budget_bytes: float
    """Maximum size of the rows of one frozen part."""
    dtype: torch.dtype
    """Of the rows."""
    folder: Path | None = None
    """Keeps a file of each chunk, which later processes find again."""

    def __post_init__(self) -> None:
        data = self.datamodule.data
        self.chunks = _chunks(self.datamodule)
        self.ends = list(accumulate(map(len, self.chunks)))
        self.chunk_of, self.row = torch.full((2, len(data.train_labels) + len(data.test_labels)), -1)
        for index, (chunk, end) in enumerate(zip(self.chunks, self.ends, strict=True)):
            self.chunk_of[chunk] = index
            self.row[chunk] = torch.arange(end - len(chunk), end)
        self.stores: dict[str, Rows] = {}

    def attach(self, batch: Batch, net: Net, precision: Context, device: torch.device = HOST) -> Batch:
        """Add the output of the net's frozen part (``net.prefix_key``) to a batch on the host, if it is cached.

        ``device`` computes it and gets it. With a warm cache it is not waited for.
        """
        if batch.prefix is not None or batch.augmented or (batch.ids < 0).any():
            return batch
        chunks = self.chunk_of[batch.ids].unique().tolist()
        if not all(chunk >= 0 and self._fill(chunk, net, precision, device) for chunk in chunks):
            return batch
        return batch._replace(prefix=self.stores[str(net.prefix_key)].take(self.row[batch.ids], device))

    @torch.no_grad()
    def _fill(self, index: int, net: Net, precision: Context, device: torch.device) -> bool:
        """Get a chunk unless it is stored; returns whether it is within the budget."""
        end, store = self.ends[index], self.stores.get(str(net.prefix_key))
        if store is None or (index not in store.filled and end <= len(store.values)):
            prefix = self._prefix(self.chunks[index], net, precision, device)
            if store is None:
                store = Rows(min(int(self.budget_bytes // prefix[0].nbytes), self.ends[-1]), prefix)
                self.stores[str(net.prefix_key)] = store
            if end <= len(store.values):
                store.values[end - len(prefix) : end] = prefix
                store.filled.add(index)
        return index in store.filled

    def _prefix(self, ids: Tensor, net: Net, precision: Context, device: torch.device) -> Tensor:
        path = self.folder / f"{self._name(ids, net, device)}.tokens" if self.folder and self.budget_bytes else None
        if path and (found := read_tensor(path)) is not None:
            return found.to(device)
        with precision():
            prefix = net.frozen_prefix(self.datamodule.fetch(ids).images.to(device)).to(self.dtype)
        if path:
            write_tensor(path, prefix.cpu())
        return prefix

    def _name(self, ids: Tensor, net: Net, device: torch.device) -> str:
        """Hash of all that determines the bits: weights, resolution and block, images, number format, code, machine."""
        vit = net.foundation
        transform = None if vit is None else (vit.mean.tolist(), vit.std.tolist())
        machine = (torch.__version__, device.type, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
        images = (self.datamodule.data.fingerprint, ids.tolist())
        facts = (net.prefix_key, transform, self.dtype, images, machine, _code())
        return hashlib.sha256(repr(facts).encode()).hexdigest()


@cache
def _code() -> str:
    """Hash of the files that compute prefixes; they include the image transform."""
    sources = sorted(Path(fedlscl.nets.__path__[0]).glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


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


class Rows:
    """Rows like those of ``sample``: on its device if they leave half of its free memory, otherwise on the host."""

    def __init__(self, num_rows: int, sample: Tensor) -> None:
        device = sample.device
        if device.type == "cuda" and 2 * num_rows * sample[0].nbytes > torch.cuda.mem_get_info(device)[0]:
            device = HOST
        self.values = sample.new_empty(num_rows, *sample.shape[1:], device=device)
        self.filled: set[int] = set()
        """Chunks that are stored."""

    def take(self, rows: Tensor, device: torch.device) -> Tensor:
        """Rows by index (n,), on a device."""
        if device.type != "cuda" or self.values.device.type == "cuda":
            return self.values[rows.to(self.values.device, non_blocking=True)].to(device, non_blocking=True)
        pinned = torch.empty(len(rows), *self.values.shape[1:], dtype=self.values.dtype, pin_memory=True)
        return torch.index_select(self.values, 0, rows, out=pinned).to(device, non_blocking=True)


def write_tensor(path: Path, value: Tensor) -> None:
    """Write a tensor to a file with its checksum, so that ``read_tensor`` knows whether all of it was written."""
    body = write_payload({"value": value})
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(hashlib.sha256(body).digest() + body)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{str(path.parent)!r} must have room for cached ViT tokens ({error.strerror}): lower trainer.cache_gb, or "
            "choose a state-dir on a larger disk."
        ) from error


def read_tensor(path: Path) -> Tensor | None:
    """The tensor of a file of ``write_tensor``; None if there is none, or it is damaged."""
    data = path.read_bytes() if path.exists() else b""
    digest, body = data[:DIGEST], data[DIGEST:]
    return read_message(body)[1]["value"] if hashlib.sha256(body).digest() == digest else None
