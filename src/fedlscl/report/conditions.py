"""What is not equal between groups of runs: a reader must know it before comparing them."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from fedlscl.report.groups import Group, split_hash
from fedlscl.report.runs import Run

SETS = "Sets differ in data, clients, tasks, rounds per task or split: rank runs only within one set."


def inequalities(groups: Sequence[Group]) -> list[str]:
    """One sentence for each condition that is not the same in all groups, and for runs of identical results."""
    found: dict[str, dict[str, list[str]]] = {}
    for group in groups:
        for what, value in (entry for run in group.runs for entry in _conditions(group, run)):
            names = found.setdefault(what, {}).setdefault(str(value), [])
            names += [] if group.name in names else [group.name]
    different = [_sentence(what, values) for what, values in found.items() if len(values) > 1]
    is_split = any(group.comparable for group in groups)
    return [SETS] * is_split + different + _copies(groups)


def _copies(groups: Sequence[Group]) -> list[str]:
    alike: dict[str, list[str]] = {}
    for group in groups:
        for run in group.runs:
            alike.setdefault(json.dumps(run.results, sort_keys=True), []).append(f"{group.name} seed {run.seed}")
    return [
        f"Identical results (copies of one run?): {', '.join(names)}." for names in alike.values() if len(names) > 1
    ]


def _sentence(what: str, values: dict[str, list[str]]) -> str:
    *most, last = [f"{value} ({', '.join(names)})" for value, names in values.items()]
    return f"{what}: {', '.join(most)} and {last}."


def _conditions(group: Group, run: Run) -> Iterator[tuple[str, Any]]:
    data, trainer, foundation = (run.results[name] for name in ("data", "trainer", "foundation"))
    yield "Data set", f"{data['dataset']} {data['fingerprint'][:12]}"
    yield "Clients", data["num_clients"]
    yield "Finished tasks", f"{run.tasks} of {run.planned}"
    yield "Rounds per task", trainer["rounds_per_task"]
    if "local_epochs" in run.results["method"]["fields"]:
        yield "Local epochs", run.results["method"]["fields"]["local_epochs"]
    yield "Precision", trainer["precision"]
    yield "Seeds", ", ".join(map(str, group.seeds))
    yield f"Split of seed {run.seed}", split_hash(run)
    if foundation:
        yield "Frozen ViT", f"{foundation['name']} {foundation['fingerprint'][:12]}"
    if run.devices:
        yield "Device", ", ".join(run.devices)
