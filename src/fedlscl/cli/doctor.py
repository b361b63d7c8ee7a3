"""``fedlscl doctor``: whether this machine has what a run needs, in one line for each thing, with the remedy."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fedlscl.cli.inventory import Finding, found_in, needed_by
from fedlscl.cli.report import Parser
from fedlscl.federated.device import chosen_precision
from fedlscl.federated.wording import in_bytes

PACKAGES = ("fedlscl", "torch", "torchvision", "lightning", "timm", "tensorboard")
EXTRAS = {
    "digits": ("scikit-learn", "the demo's data set"),
    "secure": ("cryptography", "secure sums"),
    "noise": ("dp-accounting", "differential privacy"),
    "flower": ("flwr", "federations over a network"),
}
"""By extra: the package in it, and what for."""
SIDE = 512
"""Rows of the matrices that are multiplied."""
PATIENCE = 2.0
"""Seconds after which a product counts as slow, and is not repeated."""
MUCH = 1.2
"""Ratio from which one precision is called faster than the other."""


def doctor(arguments: list[str]) -> None:
    """Print the findings; the exit status is 1 if something that was asked for does not work."""
    usage = "fedlscl doctor [--data_root DIR] [--config FILE]"
    parser = Parser(usage=usage, description="Say what works on this machine.", allow_abbrev=False)
    parser.add_argument("--data_root", metavar="DIR", type=Path, help="folder of data sets and weights to try.")
    parser.add_argument("--config", metavar="FILE", help="configuration whose data set and nets are tried.")
    given = parser.parse_args(arguments)
    is_well = True
    for finding in findings(given.data_root, given.config):
        print(f"{'ok' if finding.is_well else 'FAILS':<7}{finding.name:<12}{finding.text}", flush=True)
        is_well &= finding.is_well
    if not is_well:
        raise SystemExit(1)


def findings(data_root: Path | None, config: str | None) -> Iterator[Finding]:
    """Everything about this machine, and what was asked for."""
    yield Finding("python", f"{platform.python_version()} in {sys.prefix}")
    yield Finding("versions", ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    for extra, (package, use) in EXTRAS.items():
        yield Finding(f"[{extra}]", _extra(extra, package, use))  # optional, so that its absence is no fault
    yield Finding("devices", _devices())
    for device in ("cpu", "cuda"):
        if device == "cpu" or torch.cuda.is_available():
            yield Finding("precision", _precision(device))
    yield Finding("memory", _memory())
    here = shutil.disk_usage(".")
    yield Finding("disk", f"{in_bytes(here.free)} free of {in_bytes(here.total)} here, where runs go")
    if config is not None:
        yield from needed_by(config, data_root)
    elif data_root is not None:
        yield from found_in(data_root)


def precision_advice(float32: float, bf16: float, is_chosen: bool) -> str:
    """Which precision to take, from seconds of the same product in both.

    Example:
        >>> precision_advice(0.01, 2.0, is_chosen=False)
        'bf16 is 200 times slower than fp32: take --trainer.precision 32-true'
        >>> precision_advice(0.4, 0.1, is_chosen=True)
        'bf16 is 4.0 times faster than fp32: take --trainer.precision bf16-mixed, or auto'
    """
    slower, ratio = bf16 > float32, max(bf16, float32) / min(bf16, float32)
    if ratio < MUCH:
        return "bf16 is as fast as fp32: take --trainer.precision 32-true"
    times = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
    best = "32-true" if slower else "bf16-mixed"
    auto = ", or auto" if is_chosen else ""
    return f"bf16 is {times} times {'slower' if slower else 'faster'} than fp32: take --trainer.precision {best}{auto}"


def _extra(extra: str, package: str, use: str) -> str:
    try:
        return f"{package} {version(package)}: {use}"
    except PackageNotFoundError:
        return f"{package} is absent: for {use}, pip install 'fedlscl[{extra}]'"


def _devices() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [f"cpu ({platform.machine()}, {cores} cores, {torch.get_num_threads()} threads)"]
    words += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    words += ["mps"] if torch.backends.mps.is_available() else []
    return (
        ", ".join(words)
        if len(words) > 1
        else f"{words[0]}; no GPU: take the presets for a CPU, digits or cifar100_small"
    )


def _precision(device: str) -> str:
    seconds = {dtype: _product(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = "32-true" if seconds[torch.bfloat16] >= seconds[torch.float32] else "bf16-mixed"
    is_chosen = chosen_precision("auto", device) == best
    rates = [
        f"{name} {2e-9 * SIDE**3 / seconds[dtype]:,.1f}"
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    advice = precision_advice(seconds[torch.float32], seconds[torch.bfloat16], is_chosen)
    return f"{device}: {' and '.join(rates)} GFLOP/s; {advice}"


def _product(device: str, dtype: torch.dtype) -> float:
    """Seconds of a matrix product: the best of five, or the first where that takes long."""
    left, right = (torch.rand(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - started)
        if best > PATIENCE:
            break
    return best


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = f"{in_bytes(page * os.sysconf('SC_AVPHYS_PAGES'))} free of " if "SC_AVPHYS_PAGES" in os.sysconf_names else ""
    cuda = [f"cuda:{i} {in_bytes(torch.cuda.mem_get_info(i)[0])} free" for i in range(torch.cuda.device_count())]
    return ", ".join([f"{free}{in_bytes(total)}", *cuda])
