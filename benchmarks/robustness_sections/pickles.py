"""Canaries in every file and message that is read."""

from pathlib import Path
from typing import Any

import canaries


def pickles(work: Path) -> dict[str, Any]:
    """How many traps were laid, how many of them are live when read without care, how many fired here."""
    folder = work / "sprung"
    controls = {name: canaries.spring(read, folder) for name, read in canaries.controls(folder)}
    found = {name: canaries.spring(read, folder) for name, read in canaries.canaries(folder, work)}
    return {
        "canaries": len(found),
        "fired": sum(found.values()),
        "forms": len(controls),
        "forms that fire when read without care": sum(controls.values()),
        "places": sorted(found),
    }
