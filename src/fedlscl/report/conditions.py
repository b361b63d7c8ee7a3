"""What is not equal between groups of runs: a reader must know it before comparing them."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from fedlscl.report.groups import Group
from fedlscl.report.runs import Run


def inequalities(groups: Sequence[Group]) -> list[str]:
    """One sentence for each condition that is not the same in all groups."""
    found: dict[str, dict[str, list[str]]] = {}
    for group in groups:
        for what, value in (entry for run in group.runs for entry in _conditions(group, run)):
            names = found.setdefault(what, {}).setdefault(str(value), [])
            names += [] if group.name in names else [group.name]
    return [_sentence(what, values) for what, values in found.items() if len(values) > 1]


def _sentence(what: str, values: dict[str, list[str]]) -> str:
    *most, last = [f"{value} ({', '.join(names)})" for value, names in values.items()]
    return f"{what}: {', '.join(most)} and {last}."


def _conditions(group: Group, run: Run) -> Iterator[tuple[str, Any]]:
    data, trainer, foundation = (run.results[name] for name in ("data", "trainer", "foundation"))
    yield "Data set", f"{data['dataset']} {data['fingerprint'][:12]}"
    yield "Clients", data["num_clients"]
    yield "Finished tasks", run.tasks
    yield "Rounds per task", trainer["rounds_per_task"]
    yield "Precision", trainer["precision"]
    yield "Seeds", ", ".join(map(str, group.seeds))
    # A fingerprint of the split: its classes in text would fill a page.
    yield f"Split of seed {run.seed}", hashlib.sha256(repr(data["classes"]).encode()).hexdigest()[:8]
    if foundation:
        yield "Frozen ViT", f"{foundation['name']} {foundation['fingerprint'][:12]}"
    if run.devices:
        yield "Device", ", ".join(run.devices)
