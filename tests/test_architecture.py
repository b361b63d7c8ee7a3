"""The layers of docs/architecture.md: imports point down, without circles, in a limited number of files and lines."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fedlscl
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.testing import fake_data
from tiny_methods import METHODS

ROOT = Path(fedlscl.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
LAYERS = {
    "functional": 0,
    "options": 0,
    "data": 1,
    "nets": 1,
    "modules": 2,
    "federated": 3,
    "callbacks": 4,
    "methods": 4,
    "report": 5,
    "testing": 5,
    "cli": 6,
    "flower": 7,
    "__main__": 7,
    "__init__": 7,
}
"""A package imports from lower layers and from itself."""


def module(path):
    """``nets.vit`` of nets/vit.py, ``data`` of data/__init__.py."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module(path): path for path in FILES}


def layer(path):
    name = path.removesuffix(".py")
    return LAYERS.get(name, LAYERS.get(name.split("/")[0]))


def imported(path, everywhere=True):
    """Files of the package that a file imports, inside functions too if ``everywhere``; type checking aside."""
    tree = ast.parse((ROOT / path).read_text())
    checked = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree) if everywhere else tree.body:
        if id(node) in checked:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: write the whole name"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("fedlscl.") in MODULES else node.module for name in inner]
        else:
            continue
        for name in names:
            if name.startswith("fedlscl.") and name.removeprefix("fedlscl.") in MODULES:
                yield MODULES[name.removeprefix("fedlscl.")]


def test_the_walk_finds_imports():
    assert "nets/vit.py" in set(imported("nets/collaborator.py"))
    assert "functional/objectives.py" in set(imported("modules.py"))
    assert len(FILES) > 40 and layer("methods/fedavg.py") == 4 and layer("functional/objectives.py") == 0


@pytest.mark.parametrize("path", FILES)
def test_imports_point_down(path):
    assert layer(path) is not None, f"give {path} a layer"
    for other in imported(path):
        if other.split("/")[0] != path.split("/")[0]:
            assert layer(other) < layer(path), f"{path} (layer {layer(path)}) imports {other} (layer {layer(other)})"


def test_imports_have_no_circle():
    TopologicalSorter({path: set(imported(path, everywhere=False)) - {path} for path in FILES}).prepare()


def test_a_table_of_reports_needs_no_lightning():
    """Its import takes most of the time that a table takes."""
    code = "import sys, fedlscl.report.table; assert not {'lightning', 'timm', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_are_named_after_an_idea():
    assert not {Path(path).stem for path in FILES} & {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize(("name", "most"), [("FedAvg", 10), ("FedLSCL", 12)])
def test_few_files_from_a_round_to_its_first_loss(name, most):
    visited = {}

    def record(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            visited.setdefault(path.relative_to(ROOT).as_posix())
            if frame.f_code.co_name == "cross_entropy":
                raise InterruptedError

    class Traced(FederatedTrainer):
        def _round(self, progress):
            sys.setprofile(record)
            try:
                super()._round(progress)
            finally:
                sys.setprofile(None)

    with pytest.raises(InterruptedError):
        Traced(accelerator="cpu", rounds_per_task=1).fit(METHODS[name](), fake_data())
    assert "functional/objectives.py" in visited and len(visited) <= most, list(visited)


def test_the_package_stays_small():
    assert len(FILES) <= 71
    assert sum(len((ROOT / path).read_text().splitlines()) for path in FILES) <= 15020
