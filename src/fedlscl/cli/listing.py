"""``fedlscl methods``: what there is, in one line each, from the methods' own cards."""

import sys

from fedlscl import methods
from fedlscl.federated.method import MethodCard
from fedlscl.report.numbers import markdown

HEADER = ("method", "source", "what a client trains", "what it uploads")


def method_rows() -> list[list[str]]:
    """Name, source, what is trained and what is uploaded of every public method, in alphabetical order."""
    return [[name, *card_cells(getattr(methods, name).card)] for name in methods.__all__]


def card_cells(card: MethodCard) -> tuple[str, str, str]:
    """A card in three cells.

    Example:
        >>> card_cells(MethodCard("AISTATS 2017", "1602.05629", trains="everything", uploads="all of it"))
        ('AISTATS 2017, arXiv 1602.05629', 'everything', 'all of it')
    """
    # An arXiv paper that was published nowhere else has its year as venue.
    venue = card.venue.removeprefix("arXiv ") if card.arxiv else card.venue
    source = f"{venue}, arXiv {card.arxiv}" if card.arxiv else venue
    return source, card.trains, card.uploads


def print_methods() -> None:
    """Print the table to the terminal, or as Markdown where the output goes elsewhere."""
    if not sys.stdout.isatty():
        print(markdown([list(HEADER), *method_rows()], rule="---"))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="fedlscl fit --method NAME")
    for number, column in enumerate(HEADER):
        table.add_column(column, no_wrap=number == 0, style="bold" if number == 0 else None)
    for row in method_rows():
        table.add_row(*row)
    Console().print(table)
