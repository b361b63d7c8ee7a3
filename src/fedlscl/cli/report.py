"""``fedlscl report``: its options; the work is done in fedlscl.report."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from fedlscl.cli.paths import expand_paths
from fedlscl.report.table import print_comparison


class Parser(argparse.ArgumentParser):
    """Errors take one line, with the usage."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}: {self.usage}.")

    @override
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given, rest = super().parse_known_args(args, namespace)
        return expand_paths(given), rest


def report(arguments: list[str]) -> None:
    """Print one table over runs, or write the whole report into a folder."""
    parser = Parser(usage="fedlscl report RUN [RUN ...] [--out DIR]", description="Compare runs.", allow_abbrev=False)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="run folder, folder of several runs, or results.json."
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="write tables, figures and index.html there; otherwise print one table."
    )
    given = parser.parse_args(arguments)
    if given.out is None:
        print_comparison(given.runs)
        return
    # Here, since matplotlib takes a second to load.
    from fedlscl.report.page import write_report

    for path in write_report(given.runs, given.out):
        print(path)
