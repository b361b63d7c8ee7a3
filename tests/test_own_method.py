"""docs/own_method.md is followed to the letter: its blocks are the files that it names."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import tiny
from fedlscl.__main__ import main
from fedlscl.federated.checkpoint import load_checkpoint

PAGE = (Path(__file__).parents[1] / "docs" / "own_method.md").read_text()
METHOD, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(CONFIG,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
COMMANDS = [
    line.split("  #")[0] for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()
]
FILES = ("checkpoint.pt", "results.json", "matrix.csv")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the newcomer works; only the command line makes it importable."""
    for name, text in {"mymodule.py": METHOD, "my.yaml": CONFIG, "test_mymodule.py": TEST}.items():
        assert f"`{name}`" in PAGE
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mymodule", None)


def shrunk(words):
    return tiny.COMMON if "--config" in words else []


@pytest.mark.slow
def test_its_commands_run_and_end_with_tables(folder, capsys):
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        assert main([*words, *shrunk(words)]) == 0, command
        assert str(folder) not in sys.path
    printed = capsys.readouterr().out
    assert "weight of the previous velocity" in " ".join(printed.split())
    assert "worst client" in printed and re.search(r"^\| MyMethod \|", printed, re.M)
    results = json.loads((folder / "runs/mine/MyMethod/version_0/results.json").read_text())
    assert results["tasks_done"] == 2


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_servers_state(folder, monkeypatch):
    fit = ["fit", "--config", "my.yaml", *tiny.COMMON, "--trainer.rounds_per_task", "3"]
    assert main([*fit, "--trainer.name", "whole"]) == 0
    method, calls = sys.modules["mymodule"].MyMethod, []
    aggregate = method.aggregate

    def interrupted(self, uploads, progress):
        calls.append(progress)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return aggregate(self, uploads, progress)

    with monkeypatch.context() as patch:
        patch.setattr(method, "aggregate", interrupted)
        assert main(fit) == 130
    state = load_checkpoint(folder / "runs/mine/MyMethod/version_0/checkpoint.pt")["method"]
    assert state["velocity"]["head.weight"].abs().sum() > 0
    assert main([*fit, "--ckpt_path", "last"]) == 0
    for name in FILES:
        found, whole = (folder / "runs/mine" / run / "version_0" / name for run in ("MyMethod", "whole"))
        assert found.read_bytes() == whole.read_bytes(), name


@pytest.mark.slow
def test_its_tests_pass_and_notice_what_they_are_for(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    tests = runpy.run_path("test_mymodule.py")
    names = [name for name in tests if name.startswith("test_")]
    assert len(names) == 2
    for name in names:
        tests[name]()
    monkeypatch.setattr(tests["MyMethod"], "state_dict", lambda self: {})
    monkeypatch.setattr(tests["MyMethod"], "load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError, match="does state_dict have the whole state"):
        tests["test_my_method_keeps_the_contract"]()
