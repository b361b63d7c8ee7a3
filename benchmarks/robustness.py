"""What the federation survives: kills, broken checkpoints, full disks, malformed uploads, pickles, failing clients.

    python benchmarks/robustness.py [--only SECTION ...]

Every section has fixed seeds, prints what it finds and writes benchmarks/results/robustness/SECTION.json; the table of
all sections is README.md beside them. Part of it as tests: tests/test_resume.py, tests/test_pickles.py,
tests/federated/test_door.py and test_checkpoint.py.
"""

import argparse
import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from robustness_sections.checkpoints import damage, full_disk
from robustness_sections.failures import draw, failures
from robustness_sections.growth import growth
from robustness_sections.kills import kills
from robustness_sections.notes import Notes
from robustness_sections.pickles import pickles
from robustness_sections.uploads import uploads

OUT = Path(__file__).parent / "results" / "robustness"
ENDS = ("finished", "stopped for want of a quorum")
SLOPE = "memory slope of the last third [kB per round]"
MARKED = re.compile(r"(<!-- robustness -->\n).*?(<!-- end -->)", re.DOTALL)
PAGE = Path(__file__).parents[1] / "docs" / "robustness.md"
SECTIONS: dict[str, Callable[[Path, Notes], dict[str, Any]]] = {
    "kills": kills,
    "damage": lambda work, notes: damage(work),
    "full_disk": lambda work, notes: full_disk(work),
    "uploads": lambda work, notes: {f"{clients} clients": uploads(notes, clients=clients) for clients in (4, 2)},
    "pickles": lambda work, notes: pickles(work),
    "failures": lambda work, notes: failures(notes),
    "growth": lambda work, notes: growth(work),
}


def main() -> int:
    """Run sections and write what they found."""
    parser = argparse.ArgumentParser(description="What the federation survives.")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Thousands of lines otherwise; the section counts them.
    logging.getLogger("fedlscl.federated.validation").setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        began, notes = time.perf_counter(), Notes(options.out / f"{name}.partial")
        with tempfile.TemporaryDirectory() as folder:
            found = SECTIONS[name](Path(folder), notes)
        print(f"{name}: {time.perf_counter() - began:.0f} s", *lines(name, found), sep="\n  ", flush=True)
        (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        notes.done()
        if name == "failures":
            draw(found, options.out / "failures.svg")
    write_table(options.out)
    if options.out == OUT and all((OUT / f"{name}.json").is_file() for name in SECTIONS):
        PAGE.write_text(filled(PAGE.read_text()))
    return 0


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """What a section found, in a few words each."""
    if name == "kills":
        return [f"killed in {place}: {e['equal']} of {e['kills']} equal to the byte" for place, e in found.items()]
    if name in ("damage", "full_disk"):
        return [f"{kind}: {in_words(counts)}" for kind, counts in found.items()]
    if name == "uploads":
        return [
            f"{federation}, {kind.replace('_', ' ')}: {in_words(counts)}"
            for federation, kinds in found.items()
            for kind, counts in kinds.items()
        ]
    if name == "failures":
        return [
            f"{100 * float(rate):.0f} % fail: {entry['finished']} finished, "
            f"{entry['stopped for want of a quorum']} stopped for want of a quorum; accuracy "
            f"{100 * sum(entry['accuracies']) / len(entry['accuracies']):.1f} % with quorum 0"
            for rate, entry in found.items()
        ]
    return [f"{what}: {value}" for what, value in found.items() if not isinstance(value, list)]


def in_words(counts: dict[str, int] | str) -> str:
    """Counts behind their names."""
    return counts if isinstance(counts, str) else ", ".join(f"{what} {number}" for what, number in counts.items())


def page(out: Path = OUT) -> str:
    """The table for docs/robustness.md, from what the sections have found."""
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    rows = [(f"SIGKILL in {place}, then resumed", e["kills"], f"{e['equal']} equal to the byte")
            for place, e in found["kills"].items()]  # fmt: skip
    for kind in ("truncated", "bit flipped"):
        e = found["damage"][kind]
        before = f"the one before used {e['previous used']} and named {e['previous named']} times"
        said = f"{e['loaded silently']} loaded; {before}"
        rows.append((f"checkpoints {kind}", e["damaged"], said))
    for kind, e in found["full_disk"].items():
        if isinstance(e, dict):
            resumed = f"{e['resumed equal to the byte']} resumed to the byte"
            said = f"last good checkpoint intact {e['last good intact']} times, {resumed}"
            rows.append((f"full disk, {kind}", e["failures"], said))
    for federation, kinds in found["uploads"].items():
        sent, refused, equal = (sum(e[name] for e in kinds.values()) for name in ("sent", "refused", "equal"))
        said = f"{refused} refused, {equal} rounds equal to the bit to those without the sender"
        rows.append((f"malformed uploads of {len(kinds)} kinds, {federation}", sent, said))
    rows.append(("pickles in files and messages", found["pickles"]["canaries"], f"{found['pickles']['fired']} fired"))
    fails = found["failures"]
    runs = sum(len(e["accuracies"]) for e in fails.values())
    finished, stopped = (sum(e[name] for e in fails.values()) for name in ENDS)
    rows.append(("runs with 0 to 80 % failing clients", runs, f"{finished} finished, {stopped} stopped by the quorum"))
    grown = found["growth"]
    files = f"open files {grown['open files after warm-up']} before and {grown['open files at the end']} after"
    said = f"{grown[SLOPE]} kB more memory a round, {files}"
    rows.append(("rounds of one run", grown["rounds"], said))
    table = ["| what | how often | found |", "|---|---:|---|", *(f"| {a} | {b:,} | {c} |" for a, b, c in rows)]
    head = [
        "",
        "| clients that fail in a round | finished | stopped by a quorum of 1 | accuracy with quorum 0, ten seeds |",
    ]
    table += [*head, "|---:|---:|---:|---|"]
    for rate, e in fails.items():
        values = [100 * value for value in e["accuracies"]]
        said = f"{sum(values) / len(values):.1f} % ({min(values):.1f} to {max(values):.1f})"
        table.append(f"| {100 * float(rate):.0f} % | {e[ENDS[0]]} | {e[ENDS[1]]} | {said} |")
    return "\n".join(table) + "\n"


def filled(text: str) -> str:
    """A page with its table as the results now are."""
    return MARKED.sub(lambda marks: marks[1] + page() + marks[2], text)


def write_table(out: Path) -> None:
    """All sections that have been run, one list each."""
    text = ["# Robustness, as measured", "", "Written by `python benchmarks/robustness.py`.", ""]
    for name in SECTIONS:
        path = out / f"{name}.json"
        if path.is_file():
            text += [f"## {name}", "", *(f"- {line}" for line in lines(name, json.loads(path.read_text()))), ""]
    if (out / "failures.svg").is_file():
        text += ["![accuracy over the share of failing clients](failures.svg)", ""]
    (out / "README.md").write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
