"""Functions, files and commands that the pages name exist, and the site builds and opens."""

import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fedlscl
from chromium import browser, find_browser
from fedlscl.__main__ import main
from fedlscl.cli.commands import Commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}
FUNCTION = re.compile(r"`((?:\w+/)*\w+\.py)`((?:, `[A-Za-z_][\w.]*`)+)")
OWN_METHOD = TEXTS[ROOT / "docs/own_method.md"]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands():
    """Every command of ours that a page shows, once."""
    lines = [
        line.split("  #")[0].strip() for text in TEXTS.values() for b in blocks(text, "bash") for line in b.split("\n")
    ]
    # Redirections are the shell's; test_shown_commands.py runs the commands themselves, doctor among them.
    return sorted({line.split(" > ")[0] for line in lines if re.match("fedlscl (?!doctor)", line)})


def has(module, name):
    """Whether a dotted name exists, a field of a class without a value included."""
    found = module
    for part in name.split("."):
        if part in getattr(found, "__annotations__", {}):
            return True
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_functions_that_a_page_names_exist(page):
    for path, names in FUNCTION.findall(TEXTS[page]):
        if (ROOT / "src/fedlscl" / path).is_file():
            module = importlib.import_module("fedlscl." + path.removesuffix(".py").replace("/", "."))
            missing = [name for name in re.findall(r"`([\w.]+)`", names) if not has(module, name)]
            assert not missing, f"{path} has no {missing}"
        else:
            assert (ROOT / path).is_file() or path in ("mymodule.py", "test_mymodule.py"), path


def test_a_function_that_is_gone_would_be_noticed():
    text = TEXTS[ROOT / "docs/data_flow.md"]
    assert len(FUNCTION.findall(text)) > 20
    assert not has(importlib.import_module("fedlscl.federated.trainer"), "FederatedTrainer.fitt")


def test_the_tree_of_the_architecture_page_has_every_file():
    (tree,) = re.findall(r"```\n(options.py.*?)```", TEXTS[ROOT / "docs/architecture.md"], re.S)
    folder, found = "", []
    for line in tree.splitlines():
        folder = line.split()[0] if not line.startswith(" ") else folder
        found += [(folder if line.startswith(" ") else "") + name for name in re.findall(r"\b\w+\.py", line)]
    package = ROOT / "src/fedlscl"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert set(found) == {path for path in files if not path.endswith(("__init__.py", "__main__.py"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_configurations_that_a_page_names_exist(page):
    text = TEXTS[page].replace("DATA", "digits").replace("METHOD", "fedavg_vit")
    for name in re.findall(r"\bconfigs/[\w/]+\.yaml", text):
        assert (ROOT / name).is_file(), name


def test_every_command_on_the_pages_is_understood(tmp_path, monkeypatch, capsys):
    """Parsed, checked and its method made, by the program itself; only the work is left out."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mymodule.py").write_text(blocks(OWN_METHOD, "python")[0])
    (tmp_path / "my.yaml").write_text(blocks(OWN_METHOD, "yaml")[0])
    run = tmp_path / "runs/digits/FedLSCL/version_0"
    run.mkdir(parents=True)
    (run / "checkpoint.pt").write_bytes(b"")
    (run / "config.yaml").write_text((ROOT / "configs/digits.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    done = []
    for name in ("fit", "validate", "test", "predict"):

        @functools.wraps(getattr(Commands, name))
        def stand_in(self, model, datamodule, name=name, **options):
            done.append(name)

        monkeypatch.setattr(Commands, name, stand_in)
    monkeypatch.setattr("fedlscl.report.table.print_comparison", lambda runs: done.append("report"))
    monkeypatch.setattr("fedlscl.report.page.write_report", lambda runs, out: done.append("report") or [])
    listed = {"RUN": str(run), "FOLDER": "runs", "NAME": "FedProx"}
    found = commands()
    assert len(found) > 25
    for line in found:
        words = [listed.get(word, word) for word in shlex.split(line)[1:]]
        assert main(words) == 0, (line, capsys.readouterr().err)
    sys.modules.pop("mymodule", None)
    assert {"fit", "test", "predict", "report"} <= set(done)


def test_pythons_on_the_pages_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for page in ("own_data", "own_models", "own_project"):
        (code,) = blocks(TEXTS[ROOT / f"docs/{page}.md"], "python")
        (tmp_path / f"page_{page}.py").write_text(code)
        importlib.import_module(f"page_{page}")
        del sys.modules[f"page_{page}"]


def test_reference_lists_all_public_names():
    text = TEXTS[ROOT / "docs/reference/index.md"]
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", text, re.M)) == sorted(fedlscl.__all__)


def test_overview_of_methods_is_the_readmes():
    rows = [
        line.replace("(docs/methods/", "(")
        for line in TEXTS[ROOT / "README.md"].split("\n")
        if "](docs/methods/" in line
    ]
    page = TEXTS[ROOT / "docs/methods/index.md"].split("\n")
    assert rows and all(row in page for row in rows if row.startswith("| [`"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="needs the group docs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_other_servers(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]+rel=\"(?:stylesheet|preconnect|icon|preload)\"[^>]*href=\"([^\"]+)\"", text)
        outside = [address for address in loaded if re.match(r"(https?:)?//", address)]
        assert not outside, (page.name, outside)
    reference = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    for name in fedlscl.__all__:
        assert f'id="{fedlscl._MODULES[name]}.{name}"' in reference.replace("fedlscl.data.datamodule.", "fedlscl.data.")
    assert "build_net" in (site / "source/src__fedlscl__methods__fedlscl.py.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome")
def test_the_site_opens_from_disk_on_wide_and_narrow_screens(site):
    with browser(find_browser()) as tab:
        for name in ("index", "idea", "data_flow", "reference/nets", "methods/index", "costs"):
            for width in (1280, 390):
                tab.open(f"file://{site}/{name}.html", width)
                assert tab.run("document.documentElement.scrollWidth <= innerWidth + 1"), (name, width)
                assert tab.run("[...document.images].every(image => image.naturalWidth > 0)"), name
        assert not tab.complaints
        assert not [url for url in tab.requests if not url.startswith(("file:", "data:", "blob:"))]
