"""SIGKILL at random points, then ``--ckpt_path last``: does the run end as if nothing had happened?"""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

from robustness_sections.notes import Notes
from robustness_sections.processes import FIT, KILLED, RESUME, Zygote, differing, prepare

PLACES = {
    "client training": (20, ["step"]),
    "server step": (10, ["server", "line of the server step"]),
    "checkpoint being written": (
        10,
        ["line of saving a checkpoint", "half a file written", "file written, not yet in place"],
    ),
}
"""How many kills, and the events at which they happen; the kind is drawn first, then which of its events."""


def kills(work: Path, notes: Notes, share: float = 1.0, seed: int = 42) -> dict[str, Any]:
    """Forty kills by place: how many runs resumed, and how many of them were equal to the byte."""
    picker, found = random.Random(seed), {}
    with Zygote() as zygote:
        whole = prepare(work / "whole")
        assert zygote.run(whole, *FIT, traced=True) == 0, (whole / "log.txt").read_text()
        events = json.loads((whole / "events.json").read_text())
        for place, (number, kinds) in PLACES.items():
            points = []
            for n in range(max(1, round(share * number))):
                kind = kinds[n % len(kinds)]
                points.append((kind, picker.randint(1, events.count(kind))))
            equal = 0
            for n, point in enumerate(points):
                step = partial(survives, zygote, work / f"{place}-{n}", whole, point)
                equal += notes.once(f"{place} {n}: {point}", step)
            found[place] = {"kills": len(points), "equal": equal, "points": [list(point) for point in points]}
    return found


def survives(zygote: Zygote, folder: Path, whole: Path, point: tuple[str, int]) -> bool:
    """Whether a run that is killed at a point and resumed equals the whole one."""
    prepare(folder)
    status = zygote.run(folder, *FIT, traced=True, deadly=point)
    assert status == KILLED, (point, status, (folder / "log.txt").read_text())
    assert zygote.run(folder, *FIT, *RESUME) == 0, (point, (folder / "log.txt").read_text())
    return differing(folder, whole) == []
