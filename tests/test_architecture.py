"""The house of docs/architecture.md: imports point down only, and every idea has a name."""

import ast
from pathlib import Path

import pytest

import fedlscl

ROOT = Path(fedlscl.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
LAYERS = {
    "data": 0,
    "nets": 0,
    "modules": 1,
    "federated": 2,
    "methods": 3,
    "report": 5,
    "cli": 6,
    "deploy": 7,
    "__main__": 7,
    "__init__": 7,
}
"""Packages and the two doors; every other file at the top holds free functions and is on the ground."""
LONGEST = 500


def package(name):
    """The first part below fedlscl: ``nets`` of nets/vit.py and of fedlscl.nets.vit."""
    return name.replace("/", ".").removesuffix(".py").removeprefix("fedlscl.").split(".")[0]


def layer(name):
    return LAYERS.get(package(name), 0)


def imported(path):
    """Names of our own modules that a file imports, anywhere in it."""
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: write the whole name"
            names = [f"fedlscl.{alias.name}" for alias in node.names] if node.module == "fedlscl" else [node.module]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "fedlscl" and name not in OWN_NAMES)


OWN_NAMES = {"fedlscl", "fedlscl.__version__"}


def test_the_walk_finds_imports():
    assert "fedlscl.nets.vit" in set(imported("nets/collaborator.py"))
    assert "fedlscl.functional.objectives" in set(imported("modules/classification.py"))
    assert len(FILES) > 40 and layer("methods/fedavg.py") == 3 and layer("fedlscl.functional.objectives") == 0


@pytest.mark.parametrize("path", FILES)
def test_imports_point_down(path):
    for name in imported(path):
        if package(name) != package(path):
            assert layer(name) < layer(path), f"{path} (layer {layer(path)}) imports {name} (layer {layer(name)})"


@pytest.mark.parametrize("path", FILES)
def test_files_are_named_after_an_idea_and_short(path):
    assert Path(path).stem not in {"utils", "util", "helpers", "helper", "common", "misc"}
    length = len((ROOT / path).read_text().splitlines())
    assert length <= LONGEST, f"{path} has {length} lines: look for its second idea"


def test_packages_are_known():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= LAYERS.keys(), f"give {folders - LAYERS.keys()} a layer"


def test_tests_mirror_the_source():
    """A test file stands where the file stands that it tests; contract, reference and whole-program tests aside."""
    tests = Path(__file__).parent
    source = {path.removesuffix(".py") for path in FILES} | {package(path) for path in FILES}
    for path in tests.rglob("test_*.py"):
        folder = path.parent.relative_to(tests).as_posix()
        if folder not in (".", "contract"):
            assert f"{folder}/{path.stem.removeprefix('test_')}" in source, f"{path} tests no file of that name"
