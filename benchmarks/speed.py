"""How fast Fed-LSCL is, against what a straightforward implementation does on the same machine in the same minutes.

    python benchmarks/speed.py [--only vit step cnn run loop together o2d memory start] [--match 'block 9']
    python benchmarks/speed.py --publish    # tables only, from what was measured before

Ratios come from interleaved repetitions and are medians. Results go to benchmarks/results/speed, a folder per machine
and in it one JSON file per section; table.md and docs/performance.md show them all. On a processor without bf16
instructions bf16 is left out, which the tables say.
"""

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from speed_sections import cnn, machine, memory, o2d, start, step, together, vit, whole
from speed_sections.page import publish

from fedlscl.federated.engine import keep_freed_memory

OUT = Path(__file__).parent / "results/speed"
SECTIONS = {
    "vit": vit.cases,
    "step": step.cases,
    "cnn": cnn.cases,
    "run": whole.cases,
    "loop": step.loop_cases,
    "together": together.cases,
    "o2d": lambda: {"closed form": o2d.measure},
    "memory": lambda: {"resnet18": memory.measure},
    "start": lambda: {"start": start.measure},
}
"""Cases of each section by name; a case gives rows."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument(
        "--match", default="", help="measure cases with this in their name; the others stay as they are"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--publish", action="store_true", help="write the tables from earlier results, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for precision, reason in machine.skipped().items():
        print(f"{precision} is not measured: {reason}.", flush=True)
    for section in () if options.publish else options.only:
        for case, measure in SECTIONS[section]().items():
            if options.match in case:
                rows = [{"case": f"{case} on {machine.device().type}", **row} for row in measure()]
                print(*rows, sep="\n", flush=True)
                save(section, rows)
    publish(OUT)
    return 0


def save(section: str, rows: list[dict]) -> None:
    """Put the rows of a case in place of those that it had."""
    path = OUT / machine.key() / f"{section}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = sorted([row for row in earlier if row["case"] != rows[0]["case"]] + rows, key=lambda row: row["case"])
    content = {"measured": datetime.now(UTC).isoformat(timespec="minutes"), "machine": machine.describe(), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
