"""Results as text: JSON that a person can read, and tables in long form."""

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from fedlscl.federated.callbacks import AT_SERVER
from fedlscl.federated.metrics import MASKS, PHASES


def to_json(value: Any) -> str:
    """Indented JSON with lists of numbers on one line.

    Example:
        >>> print(to_json({"a": [1, 2]}), end="")
        {
         "a": [1, 2]
        }
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    # Strings of JSON hold no line break, so that only lists can match.
    return re.sub(r"\[(\n[^\[\]{}]+)\]", lambda found: "[" + re.sub(r"\n *", " ", found[1]).strip() + "]", text) + "\n"


def matrix_rows(accuracy: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The accuracy matrix of ``results`` in long form."""
    for phase in PHASES:
        for mask in MASKS:
            for client, after in enumerate(accuracy[phase][mask]):
                for n, row in enumerate(after):
                    for t, value in enumerate(row):
                        if value is not None:
                            names = ("phase", "mask", "client", "after_task", "task", "accuracy")
                            yield dict(zip(names, (phase, mask, client, n, t, value), strict=True))


def round_rows(traffic: dict[str, Any], history: list[dict[str, Any]], tasks: int) -> Iterator[dict[str, Any]]:
    """Bytes and loss terms of every client in every round of the first ``tasks`` tasks.

    Where the server trained (client -1) it has a row with the terms of the last stage of each name.
    """
    losses: dict[tuple[int, int, int], dict[str, float]] = {}
    for entry in history:
        terms = {f"{entry['stage']}/{name}": value for name, value in entry["terms"].items()}
        losses.setdefault((entry["task"], entry["round"], entry["client"]), {}).update(terms)
    for task in range(tasks):
        for round_ in range(len(traffic["up"][0][task])):
            for client, (up, down) in enumerate(zip(traffic["up"], traffic["down"], strict=True)):
                place = {"task": task, "round": round_, "client": client}
                sizes = {"bytes_up": up[task][round_], "bytes_down": down[task][round_]}
                yield place | sizes | losses.get((task, round_, client), {})
            if (task, round_, AT_SERVER) in losses:
                yield {"task": task, "round": round_, "client": AT_SERVER} | losses[task, round_, AT_SERVER]


def to_csv(rows: Iterator[dict[str, Any]]) -> str:
    """A table whose columns come in the order in which the rows first name them; floats as repr."""
    collected = list(rows)
    columns = list(dict.fromkeys(name for row in collected for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(collected)
    return text.getvalue()
