"""Cold starts of the command line, each in a process of its own."""

import subprocess
import sys

from .clock import side_by_side

COMMANDS = (("--help",), ("methods",), ("fit", "--help"))


def measure() -> list[dict]:
    """Median seconds; files are in the system's cache after the first call."""
    calls = {" ".join(words): start(words) for words in COMMANDS}
    rows = [
        {"command": f"fedlscl {name}", "seconds": timing.seconds, "others": timing.others}
        for name, timing in side_by_side(calls, 5, 1).items()
    ]
    return rows


def start(words: tuple[str, ...]):
    command = [sys.executable, "-m", "fedlscl", *words]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
