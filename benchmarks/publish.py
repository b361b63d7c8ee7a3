"""Fill the tables in README.md and docs/results.md from benchmarks/results, so that pages cannot drift from runs.

    python benchmarks/publish.py

A table stands between <!-- table NAME --> and <!-- end -->; <!-- table NAME: ROW ROW --> takes some rows only.
"""

import re
from pathlib import Path

from fedlscl.federated.checkpoint import write_atomically
from fedlscl.report.groups import grouped
from fedlscl.report.numbers import table_markdown
from fedlscl.report.runs import read_runs

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs/results.md")
START = r"(?P<start><!-- table (?P<name>\w+)(: (?P<rows>[\w ,-]+))? -->\n)"
TABLE = re.compile(START + r".*?(?P<end><!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables as the results now are.

    Raises:
        ValueError: if a row is asked for that is not there.
    """
    return TABLE.sub(lambda found: found["start"] + table(found["name"], found["rows"]) + found["end"], text)


def table(name: str, rows: str | None) -> str:
    """The table over benchmarks/results/NAME, best first; of the named rows only, where some are named."""
    groups = grouped(read_runs([ROOT / "benchmarks/results" / name]))
    if rows is None:
        return table_markdown(groups)
    wanted = rows.split()
    missing = set(wanted) - {group.name for group in groups}
    if missing:
        raise ValueError(f"rows {sorted(missing)} are not in benchmarks/results/{name}: run and collect them first.")
    return table_markdown([group for group in groups if group.name in wanted])


if __name__ == "__main__":
    for page in PAGES:
        write_atomically(page, filled(page.read_text()).encode())
