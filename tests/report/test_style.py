import re

import pytest
from matplotlib.figure import Figure

from fedlscl.report.plots import COLOURS, INK, PAPER, for_page, looks, picture, shown, styled


class Named:
    def __init__(self, name):
        self.name = name


@styled
def drawn(text="after $a_b$ & <c>"):
    figure = Figure()
    figure.text(0.5, 0.5, text)
    return picture(figure, "p", "caption", "alt")


def test_every_group_looks_different_and_the_order_of_results_does_not_matter():
    groups = [Named(f"m{n:02}") for n in range(33)]
    assert len(set(looks(groups).values())) == 33
    assert looks(groups) == looks(groups[::-1])
    assert len({colour for colour, *_ in looks(groups[: len(COLOURS)]).values()}) == len(COLOURS)


def test_the_same_figure_has_the_same_bytes_whatever_the_users_style(monkeypatch):
    import matplotlib

    first = drawn()
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 20, "svg.hashsalt": None}):
        assert drawn() == first
    assert b"<dc:date>" not in first.svg and first.png.startswith(b"\x89PNG")


def test_names_are_drawn_as_they_stand():
    assert drawn("$x$").svg != drawn("x").svg
    assert shown("_hidden") == " _hidden" and len(shown("a" * 99)) == 34


def test_on_the_page_a_figure_takes_its_colours_and_its_names_are_unique():
    svg = for_page(drawn().svg, "p")
    assert svg.startswith("<svg ") and "<!--" not in svg and "currentColor" in svg
    assert INK not in svg and PAPER not in svg
    names = re.findall(r'\bid="([^"]+)"', svg)
    assert names and all(name.startswith("p-") for name in names)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(names)


@pytest.mark.parametrize("text", ["--><script>alert(1)</script>", "</svg><b>"])
def test_text_of_a_figure_brings_no_markup(text):
    svg = for_page(drawn(text).svg, "p")
    assert "<script" not in svg and "<b>" not in svg and svg.count("</svg>") == 1
