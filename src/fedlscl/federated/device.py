"""Where a federation computes, and in which precision."""

import platform
from typing import Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlscl.federated.allocator import keep_freed_memory

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
