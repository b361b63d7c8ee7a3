"""Tables on pages are those that the committed results give."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import publish  # noqa: E402
from figures import figure  # noqa: E402

from fedlscl.report.table import cells  # noqa: E402

pytestmark = pytest.mark.publish


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


CLAIMS = {
    "a lead": r"LSCL (leads|is ahead|is first)|it leads|outperform|\bbeats\b|points above|best baseline|better control",
    "an upper bound": r"(?<!not an )(?<!not )upper bounds?\b",
    "the paper's letter": r"letter of the paper|paper's letter",
    "that no feature leaves": r"no raw feature|or a raw feature",
}
"""What no text may say before there is evidence of it."""
TEXTS = [
    *(ROOT / name for name in ("README.md", "CITATION.cff", "pyproject.toml", "Makefile")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "benchmarks/results").rglob("*.md")),
    *sorted((ROOT / "src/fedlscl/methods").glob("*.py")),
]


@pytest.mark.parametrize("claim", CLAIMS)
def test_no_text_claims_what_was_not_measured(claim):
    found = [
        (path.name, line.strip())
        for path in TEXTS
        for line in path.read_text().splitlines()
        if re.search(CLAIMS[claim], line)
    ]
    assert not found


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/results.md"])
def test_pages_begin_with_the_comparison_on_the_same_readout(page):
    beginning = (ROOT / page).read_text()[:3000]
    assert "readout" in beginning
    assert "do not show that Fed-LSCL is better" in beginning or "Own heads do not compare features" in beginning
    assert all(word in beginning for word in ("seed 42", "112 px", "after five tasks", "25 training images"))


@pytest.mark.parametrize("name", publish.REPORTS)
def test_reports_say_how_they_are_to_be_read(name):
    text = (ROOT / "benchmarks/results" / name / "report.html").read_text()
    assert f"<h2>{publish.READING.title}</h2>" in text and "does not rank" in text


def test_a_changed_number_is_noticed():
    broken = re.sub(r"\| \d\d\.\d", "| 12.3", (ROOT / "docs/results.md").read_text())
    assert publish.filled(broken) != broken


def test_rows_that_were_not_run_are_refused():
    with pytest.raises(ValueError, match="nobody"):
        publish.filled("<!-- table table1_160px: nobody -->\n<!-- end -->")
