"""The only training loop and the only inference loop of the package, on Fabric; device and precision."""

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlscl.data import Batch, ClientStream
from fedlscl.federated.cache import PrefixCache
from fedlscl.federated.client import Client, ClientOffloader
from fedlscl.federated.compilation import Compile, compile_small_models
from fedlscl.federated.method import Stage
from fedlscl.nets.net import Net

# Memory that stays with the process between training steps.

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> bool:
    """Let the C library reuse freed blocks in place of handing them back to the kernel; tells whether it did.

    Activations of a ViT are blocks of several MB. By default each is mapped anew and unmapped at every step, and the
    page faults took a sixth of a DeiT-tiny step on a CPU. Nothing but speed and resident memory changes.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 256 << 20}
    return all([libc.mallopt(option, value) == 1 for option, value in settings.items()])


# Where a federation computes, and in which precision.

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]


def chosen_precision(precision: Precision, accelerator: str) -> Precision:
    """What 'auto' is on this machine: bf16-mixed where it makes products faster, 32-true elsewhere (ours)."""
    if precision != "auto":
        return precision
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if accelerator in ("auto", "cpu") and fast_bf16() else "32-true"


def fast_bf16() -> bool:
    """Whether this processor has bf16 instructions; without them such products took 200 times those of float32."""
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def connect(accelerator: str, devices: int, precision: Precision) -> Fabric:
    """Fabric on the device and in the precision asked for, or a refusal.

    For more than one device the program is started anew for each further one, with the same command line.

    Raises:
        ValueError: if this machine lacks them.
    """
    if devices < 1:
        raise ValueError(f"devices {devices} cannot be used: choose 1 or more.")
    has_cuda = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not has_cuda:
        raise ValueError(f"accelerator {accelerator!r} is absent on this machine: choose cpu or auto.")
    if precision == "16-mixed" and (not has_cuda or accelerator not in ("gpu", "cuda", "auto")):
        raise ValueError("precision '16-mixed' needs CUDA: choose bf16-mixed or 32-true.")
    try:
        strategy = "ddp" if devices > 1 else "auto"
        fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision, strategy=strategy)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"accelerator {accelerator!r} cannot be used ({reason}): choose cpu or auto.") from error
    fabric.launch()
    if precision == "bf16-mixed" and fabric.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("precision 'bf16-mixed' is not supported by this GPU: choose 16-mixed or 32-true.")
    if fabric.device.type == "cpu":
        keep_freed_memory()
    return fabric


# The only training loop and the only inference loop of the package, on Fabric.


class Engine:
    """Runs stages and nets on Fabric's device in its precision, with frozen prefixes from the cache."""

    def __init__(
        self,
        fabric: Fabric,
        cache: PrefixCache | None,
        infer_batch_size: int = 128,
        offloader: ClientOffloader | None = None,
        compile: Compile = "auto",
    ) -> None:
        self.fabric, self.cache, self.infer_batch_size, self.compile = fabric, cache, infer_batch_size, compile
        self.offloader = offloader or ClientOffloader(float("inf"))

    def train(self, stage: Stage, on_batch: Callable[[int], None] = lambda size: None) -> dict[str, float]:
        """Go through a stage's batches; returns the mean of each term of the last epoch."""
        module = stage.module
        self.fabric.to_device(module)
        compile_small_models(module.net, self.compile)
        optimizer: Any = self.fabric.setup_optimizers(module.configure_optimizers())
        module.train()
        means: dict[str, float] = {}
        for _ in range(stage.epochs):
            sums: dict[str, Tensor] = {}
            steps = 0
            for steps, batch in enumerate(stage.batches, start=1):
                placed = self.place(batch, module.net)
                with self.fabric.autocast():
                    terms = module.training_step(placed, steps - 1)
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
        self, net: Net, stream: ClientStream, ids: Tensor, part: Callable[[Tensor], Any] | None = None
    ) -> Iterator[tuple[Batch, Any]]:
        """Batches on the device with the net's outputs, in evaluation mode and in the order of ``ids``.

        ``part`` computes on images alone what is wanted of the net, such as its small model's features.
        """
        net.eval()
        for batch in stream.loader(ids, self.infer_batch_size, shuffle=False):
            batch = self.fabric.to_device(batch) if part else self.place(batch, net)
            with self.fabric.autocast():
                output = part(batch.images) if part else net(batch.images, batch.prefix)
            yield batch, output

    def place(self, batch: Batch, net: Net) -> Batch:
        """Move a batch to the device and give it the cached output of the net's frozen part."""
        batch = self.fabric.to_device(batch)
        return batch if self.cache is None else self.cache.attach(batch, net, self.fabric.autocast)

    @contextmanager
    def on_device(self, client: Client) -> Iterator[None]:
        """Hold a client's nets on the device for its turn; idle clients wait in host memory, or in a file."""
        self.offloader.take(client)
        nets = [net for net in (client.net, client.previous) if net is not None]
        for net in nets:
            self.fabric.to_device(net)
        try:
            yield
        finally:
            if self.fabric.device.type != "cpu":
                for net in filter(None, (client.net, client.previous)):
                    net.cpu()
            self.offloader.leave(client)
