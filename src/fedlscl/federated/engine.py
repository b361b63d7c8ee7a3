"""Engine, the package's only training loop and only inference loop on Lightning Fabric; its device and processes."""

import ctypes
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlscl.data import Batch, ClientStream
from fedlscl.federated.cache import PrefixCache
from fedlscl.federated.client import Client, ClientOffloader
from fedlscl.federated.method import Stage
from fedlscl.nets.net import Net

T = TypeVar("T")
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""


class Engine:
    """Trains stages and runs nets on Fabric's device and in its precision.

    Args:
        fabric: device and precision.
        cache: cached outputs of frozen net parts; None to compute them in every step.
        infer_batch_size: images per forward pass of ``infer``.
        offloader: keeps idle clients within a memory budget; by default all of them stay in memory.
    """

    def __init__(
        self,
        fabric: Fabric,
        cache: PrefixCache | None,
        infer_batch_size: int = 128,
        offloader: ClientOffloader | None = None,
    ) -> None:
        self.fabric = fabric
        self.cache = cache
        self.infer_batch_size = infer_batch_size
        self.offloader = offloader or ClientOffloader(float("inf"))

    def train(self, stage: Stage, on_batch: Callable[[int], None] = lambda size: None) -> dict[str, float]:
        """Train a stage; returns the mean of each loss term over the last epoch."""
        module = stage.module
        self.fabric.to_device(module)
        optimizer: Any = self.fabric.setup_optimizers(module.configure_optimizers())
        module.train()
        means: dict[str, float] = {}
        for _ in range(stage.epochs):
            sums: dict[str, Tensor] = {}
            steps = 0
            for steps, batch in enumerate(stage.batches, start=1):
                prepared = self.prepare(batch, module.net)
                with self.fabric.autocast():
                    terms = module.training_step(prepared, steps - 1)
                self.fabric.backward(terms["loss"])
                module.on_before_optimizer_step(optimizer)
                optimizer.step()
                optimizer.zero_grad()
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value.detach()
                on_batch(len(batch.labels))
            means = {name: float(value) / steps for name, value in sums.items()}
        module.eval()
        return means

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

        Args:
            net: the net.
            stream: the client's images.
            ids: samples.
            part: a part of the net that is called on the images instead of the whole net.
            views: is called on the prepared batch instead of the whole net.
        """
        net.eval()
        for batch in stream.loader(ids, self.infer_batch_size, shuffle=False):
            batch = self.fabric.to_device(batch) if part else self.prepare(batch, net)
            with self.fabric.autocast():
                if part is not None:
                    output = part(batch.images)
                else:
                    output = net(batch.images, batch.prefix) if views is None else views(batch)
            yield batch, output

    def prepare(self, batch: Batch, net: Net) -> Batch:
        """Move a batch to the device and attach the cached output of the net's frozen part."""
        batch = self.fabric.to_device(batch)
        if self.cache is None or net.prefix_key is None:
            return batch
        return self.cache.attach(batch, net, self.fabric.autocast)

    @contextmanager
    def on_device(self, client: Client) -> Iterator[None]:
        """Keep a client's nets on the device during its turn."""
        self.offloader.acquire(client)
        for net in filter(None, (client.net, client.previous)):
            self.fabric.to_device(net)
        try:
            yield
        finally:
            if self.fabric.device.type != "cpu":
                for net in filter(None, (client.net, client.previous)):
                    net.cpu()
            self.offloader.release(client)


class Ranks:
    """The processes of a run; with one process, gathering is the identity.

    Modules are not wrapped for data parallelism: each client trains in one process, so that the result does not depend
    on the number of processes (bit for bit if all have the same number of threads).
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.size, self.rank = fabric, fabric.world_size, fabric.global_rank
        self.is_first = self.rank == 0
        """Whether this process writes files and calls callbacks."""

    def gather(self, items: Sequence[T]) -> list[T]:
        """Items of all processes, in the order of ranks."""
        if self.size == 1:
            return list(items)
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, list(items))
        return [item for part in gathered for item in part]

    def from_first(self, value: T) -> T:
        """The value of the first process."""
        return value if self.size == 1 else self.fabric.broadcast(value, src=0)


def connect(accelerator: str, devices: int, precision: Precision) -> Fabric:
    """Launch Fabric; with several devices the program is started again for each further one.

    Raises:
        ValueError: if this machine lacks the accelerator or does not support the precision.
    """
    if devices < 1:
        raise ValueError(f"devices must be >= 1, got {devices}.")
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
    if precision == "bf16-mixed" and fabric.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("precision must be 16-mixed or 32-true on a GPU without bfloat16, got 'bf16-mixed'.")
    if fabric.device.type == "cpu":
        keep_freed_memory()
    return fabric


def chosen_precision(precision: Precision, accelerator: str) -> Precision:
    """Resolve 'auto': bf16-mixed where the hardware accelerates it, otherwise 32-true (ours)."""
    if precision != "auto":
        return precision
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if accelerator in ("auto", "cpu") and fast_bf16() else "32-true"


def fast_bf16() -> bool:
    """Whether this CPU has bf16 instructions; without them such products took 200 times those of float32."""
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> bool:
    """Let glibc reuse freed blocks instead of returning them to the kernel; returns whether it was possible.

    ViT activations are blocks of several MB. By default each is mapped and unmapped in every step, and the page faults
    took a sixth of a DeiT-tiny step on a CPU. Only speed and resident memory change.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 256 << 20}
    return all([libc.mallopt(option, value) == 1 for option, value in settings.items()])
