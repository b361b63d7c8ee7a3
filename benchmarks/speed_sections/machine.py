"""The machine: what it is, and how fast it multiplies matrices."""

import os
import platform
import re
from pathlib import Path

import torch

from fedlscl.federated.engine import fast_bf16

from .clock import side_by_side

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"cpu": 4096, "cuda": 8192}
"""Of the square matrices whose product is timed."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precisions() -> tuple[str, ...]:
    """Those that are worth measuring here."""
    return tuple(name for name in DTYPES if name not in skipped())


def skipped() -> dict[str, str]:
    """Those that are not, and why."""
    if device().type == "cuda" or fast_bf16():
        return {}
    return {"bf16": "this processor has no bf16 instructions, a product in bf16 takes 200 times one in fp32"}


def key() -> str:
    """A folder's name for results of this machine: processor or GPU, instruction set, threads.

    Example:
        >>> slug("Intel(R) Xeon(R) Processor AVX512 AMX 2 threads")
        'intel_xeon_processor_avx512_amx_2_threads'
    """
    if device().type == "cuda":
        return slug(torch.cuda.get_device_name())
    matrix = "AMX" if torch.cpu._is_amx_tile_supported() else ""
    instructions = torch.backends.cpu.get_cpu_capability()
    return slug(f"{processor()} {instructions} {matrix} {torch.get_num_threads()} threads")


def slug(text: str) -> str:
    return re.sub(r"\W+", "_", text.replace("(R)", "").lower()).strip("_")


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
    rates = {name: round(product_rate(name)) for name in precisions()}
    return about | {"product_gflops": rates, "skipped": skipped()}


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
