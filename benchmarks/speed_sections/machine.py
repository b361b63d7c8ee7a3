"""The machine: what it is, and how fast it multiplies matrices."""

import os
import platform
from pathlib import Path

import torch

from .clock import side_by_side

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"cpu": 4096, "cuda": 8192}
"""Of the square matrices whose product is timed."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe() -> dict:
    """Processor, memory, threads, GPU, versions, and measured matrix-product rates."""
    about = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_matrix_instructions": bool(torch.cpu._is_amx_tile_supported()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return about | {"product_gflops": {name: round(product_rate(name)) for name in DTYPES}}


def processor() -> str:
    path = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in path.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def product_rate(precision: str) -> float:
    """Of a square product, GFLOP/s."""
    size = SIZES[device().type]
    return 2 * size**3 / side_by_side({"product": product(precision, size)}, 5)["product"].seconds / 1e9


def product(precision: str, size: int):
    a, b = (torch.randn(size, size, device=device()).to(DTYPES[precision]) for _ in range(2))
    return lambda: a @ b
