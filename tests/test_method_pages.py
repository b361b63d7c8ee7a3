"""README's table, the methods' cards and their pages agree."""

import re
from pathlib import Path

import pytest

from fedlscl import methods
from fedlscl.cli.app import LIST_HEADER as HEADER
from fedlscl.cli.app import method_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ROOT / "docs" / "methods"


def readme_row(name, *cells):
    """How a method stands in the README."""
    return " | ".join([f"| [`{name}`](docs/methods/{name.lower()}.md)", *cells]) + " |"


@pytest.mark.parametrize("row", method_rows(), ids=methods.__all__)
def test_readme_agrees_with_the_card(row):
    assert readme_row(*row) in README.splitlines()


def test_readme_lists_each_method_once_and_nothing_else():
    assert "| " + " | ".join(HEADER) + " |" in README
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", README, re.M)) == sorted(methods.__all__)


def test_every_method_has_a_page_and_every_page_a_method():
    assert {page.stem for page in PAGES.glob("*.md")} - {"index"} == {name.lower() for name in methods.__all__}


@pytest.mark.parametrize("name", methods.__all__)
def test_a_page_names_the_method_its_source_and_what_is_uploaded(name):
    page = (PAGES / f"{name.lower()}.md").read_text()
    assert page.splitlines()[0].replace("-", "") == f"# {name}"
    assert getattr(methods, name).card.arxiv in page
    assert re.search(r"^## What (is uploaded|leaves a client)", page, re.M) or name.startswith("Joint")


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
