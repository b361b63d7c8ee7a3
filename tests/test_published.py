"""Tables on pages are those that the committed results give."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import publish  # noqa: E402
from figures import figure  # noqa: E402

from fedlscl.report.numbers import cells  # noqa: E402


@pytest.mark.parametrize("page", publish.PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_results(page):
    text = page.read_text()
    assert publish.TABLE.search(text)
    assert publish.filled(text) == text


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            found["name"]
            for page in publish.PAGES
            for found in publish.TABLE.finditer(page.read_text())
            if found["kind"] == "figure"
        }
    ),
)
def test_pictures_are_those_of_the_results(name):
    assert (publish.PICTURES / f"{name}.svg").read_bytes() == figure(name, publish.results(name)).svg


@pytest.mark.parametrize("name", publish.REPORTS)
def test_reports_hold_the_numbers_of_the_results(name):
    text = (ROOT / "benchmarks/results" / name / "report.html").read_text()
    for group in publish.results(name):
        assert group.name in text
        assert all(number in text for number in cells(group))


def test_a_changed_number_is_noticed():
    broken = re.sub(r"\| \d\d\.\d", "| 12.3", (ROOT / "docs/results.md").read_text())
    assert publish.filled(broken) != broken


def test_rows_that_were_not_run_are_refused():
    with pytest.raises(ValueError, match="nobody"):
        publish.filled("<!-- table table1_160px: nobody -->\n<!-- end -->")
