import html
import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from chromium import browser, find_browser
from fedlscl import methods
from fedlscl.report.groups import CENTRALISED, grouped
from fedlscl.report.page import page as page_of
from fedlscl.report.runs import read_runs
from fedlscl.report.table import table_latex

HOSTILE = '<img src=x onerror="alert(1)">&amp; {{ 1 + 1 }} $\\frac$'
CHECK = """
(async () => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const pictures = [...document.querySelectorAll('figure svg')];
  const column = i => [...document.querySelectorAll('#comparison tbody tr')].map(row => row.cells[i].textContent);
  const before = column(2);
  const button = document.querySelectorAll('#comparison th button')[2];
  button.click();  // best first, as it was
  button.click();
  return {
    pictures: pictures.map(p => p.getBoundingClientRect()).map(r => [r.width, r.height]),
    painted: pictures.map(p => { const b = p.getBBox(); return b.width * b.height; }),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(pictures[0]).color,
    before, after: column(2),
  };
})()
"""


class Links(HTMLParser):
    """Attributes that could load something or lead somewhere, and tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.loaded, self.names = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.names.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data") and not value.startswith("#"):
                (self.links if tag == "a" else self.loaded).append(value)


@pytest.fixture(scope="module")
def page(report):
    return (report / "index.html").read_text()


@pytest.fixture(scope="module")
def tab():
    path = find_browser()
    if path is None:
        pytest.skip("neither Chromium nor Chrome is on the PATH")
    with browser(path) as opened:
        yield opened


def test_the_page_loads_nothing_and_its_links_lead_to_files(page, report):
    found = Links(page)
    assert all(value.startswith("data:") for value in found.loaded)
    assert len(set(found.names)) == len(found.names)
    assert len(found.links) > 30
    for link in found.links:
        assert (report / unquote(link)).is_file(), link


def test_every_source_is_named(page, runs):
    text = html.unescape(re.sub(r"<svg.*?</svg>", "", page, flags=re.S))
    for file in runs.rglob("results.json"):
        results, costs = json.loads(file.read_text()), json.loads(file.with_name("costs.json").read_text())
        commit = costs["sessions"][0]["commit"]
        expected = [results["data"]["fingerprint"], *results["versions"].values(), *([commit] if commit else [])]
        assert all(value in text for value in [*expected, file.with_name("config.yaml").read_text()])


def test_every_figure_has_a_heading_and_words(page):
    words = re.findall(r'role="img" aria-label="([^"]+)"', page)
    assert len(words) == 12 == page.count("<figcaption>")
    assert all(len(text) > 60 for text in words)
    assert page.count("<h1>") == 1 and page.count("<h2") == 8


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_picture_without_complaint_or_request(tab, report, width, scheme):
    address = (report / "index.html").as_uri()
    tab.open(address, width, scheme)
    found = tab.run(CHECK)
    assert tab.complaints == []
    assert all(url == address or url.startswith("data:") for url in tab.requests)
    assert len(found["pictures"]) == 12 and min(map(min, found["pictures"])) > 150 and min(found["painted"]) > 1e4
    assert found["overflow"] <= 0
    assert sorted(found["after"]) == sorted(found["before"])
    assert found["after"] == sorted(found["after"], key=lambda text: float(text.split()[0]))
    colours = [sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("background", "ink")]
    assert colours == sorted(colours, reverse=scheme == "light") and abs(colours[0] - colours[1]) > 400


def test_names_bring_no_markup_into_page_and_table(runs, tmp_path, request):
    shutil.copytree(runs / "Local" / "version_0", tmp_path / HOSTILE)
    groups = grouped(read_runs([tmp_path / HOSTILE]))
    text = page_of(groups, [], [], tmp_path)
    assert "img" not in Links(text).tags and text.count("&lt;img src=x onerror") >= 3 and "{{ 1 + 1 }}" in text
    assert r"\$\textbackslash{}frac\$" in table_latex(groups)
    tab = request.getfixturevalue("tab")
    (tmp_path / "page.html").write_text(text)
    tab.open((tmp_path / "page.html").as_uri())
    assert tab.complaints == [] and tab.run("document.querySelectorAll('img').length") == 0


def test_centralised_methods_are_named_as_such_and_never_lead(runs, tmp_path):
    assert sorted(CENTRALISED) == [
        name for name in methods.__all__ if getattr(methods, name).card.venue == "all data (centralised)"
    ]
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "Local").glob("version_*/results.json"):
        results = json.loads(path.read_text())
        results["method"]["name"] = "Joint"
        for after_task in results["summary"]:
            after_task |= {"class_il/average": 1.0, "task_il/average": 1.0}
        path.write_text(json.dumps(results))
    text = page_of(grouped(read_runs([tmp_path])), [], [], tmp_path)
    first = text.index("Class-incremental: FedAvg reaches ")
    assert "Trained on the pooled data of all clients, Local has 100.0 %." in text[first:]
    assert "Local reaches" not in text and "points above" not in text and "numbers as files" not in text
