"""The commands of the README run as they are, on tiny nets and fake data."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import tiny
from fedlscl.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", README, re.S) for language in ("bash", "python")}
LINES = [line.split("  #")[0].strip() for block in BLOCKS["bash"] for line in block.splitlines()]


def shrunk(words):
    """Options that make a fit of the README run in a second."""
    if words[0] != "fit":
        return []
    options = [*tiny.COMMON, "--data.root", "null"]
    if any("digits/" in word for word in words):
        return [*options, *tiny.options("method", tiny.SMALL)]
    collaborator = tiny.options("method.collaborator", tiny.SMALL | {"feature_dim": 16})
    block = [] if "--method.collaborator.blocks" in words else ["--method.collaborator.blocks", "[3]"]
    vit = {"name": "vit_glyph_patch4_32", "weights": "random", "image_size": 32}
    return [*options, *collaborator, *block, *tiny.options("method.collaborator.foundation", vit)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory that looks like the repository, with an image to classify."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my_images").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "my_images" / "black.png")
    return folder


@pytest.mark.publish
def test_every_command_is_shown_once_at_least():
    shown = {name for line in LINES for name in re.findall(r"\bfedlscl ([a-z]+)", line)}
    assert shown == set(COMMANDS) - {"validate"}


@pytest.mark.slow
def test_commands_run_in_the_order_of_the_readme(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    commands = [shlex.split(line)[1:] for line in LINES if line.startswith("fedlscl ")]
    assert len(commands) >= 8
    for words in commands:
        assert main([*words, *shrunk(words)]) == 0, words
    assert "black.png" in capsys.readouterr().out


@pytest.mark.publish
def test_everything_else_is_a_make_target_the_environment_tensorboard_or_completion():
    others = {line.split()[0] for line in LINES if line and not line.startswith("fedlscl ")}
    assert others == {"make", "source", "tensorboard", "eval"}
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {line.split()[1] for line in LINES if line.startswith("make ")} <= set(targets)


DEMO = re.search(r"^demo: .*?(?=^\w)", (ROOT / "Makefile").read_text(), re.M | re.S)[0]
BASELINES = {"FedRidge", "FedAvg+ViT"}
"""What Fed-LSCL's pretrained ViT reaches without Fed-LSCL."""


def names_in_the_demo():
    """The runs of `make demo`, by the names that its table has."""
    runs = [re.findall(r"--config (\S+)", line) for line in DEMO.splitlines() if "--config" in line]
    configs = [[yaml.safe_load((ROOT / path).read_text()) for path in files] for files in runs]
    return {
        next((config["trainer"]["name"] for config in files if "name" in config.get("trainer", {})), None)
        or files[0]["method"]["class_path"]
        for files in configs
    }


@pytest.mark.publish
@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_pages_show_every_run_of_the_demo_and_what_it_has(page):
    text = (ROOT / page).read_text()
    rows = re.findall(r"^\| (Fed\S+) \|.* 42 \|$", text, re.M)
    assert set(rows) == names_in_the_demo() >= {"FedLSCL", "FedAvg", *BASELINES} and len(rows) == len(set(rows))
    for name in rows:
        sent = re.search(rf"^\| {re.escape(name)} \|(?:[^|]*\|){{5}} ([\d.]+) \|", text, re.M)[1]
        assert re.search(
            rf"^- `{re.escape(name)}`: .*(ViT|CNN from scratch).*; {sent} MB.*; \d+ seconds\.$", text, re.M
        )


@pytest.mark.publish
def test_the_two_tables_of_the_demo_are_one():
    tables = [
        re.findall(r"^\| Fed\S+ \|.* 42 \|$", (ROOT / page).read_text(), re.M)
        for page in ("README.md", "docs/index.md")
    ]
    assert tables[0] == tables[1]


def test_the_demo_says_after_its_table_what_each_run_has(tmp_path):
    """With the figures of the newest version of every run."""
    names = names_in_the_demo()
    for number, name in enumerate(sorted(names)):
        for version in range(2):
            run = tmp_path / "runs/digits" / name / f"version_{version}"
            run.mkdir(parents=True)
            sent = (number + 1) * 1_500_000 if version else 1
            (run / "results.json").write_text(json.dumps({"traffic": {"up_bytes": sent, "down_bytes": 7}}, indent=1))
            costs = {"total_seconds": 20.4 + number if version else 1.0, "sessions": [{"total_seconds": 9.0}]}
            (run / "costs.json").write_text(json.dumps(costs, indent=1))
            os.utime(run, (version, version))
    ready = [f"--assume-old={path}" for path in (".venv/.ready", "requirements.lock", "pyproject.toml")]
    command = ["make", "-s", "-f", ROOT / "Makefile", *ready, "BIN=programs", "demo"]
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs/fedlscl").write_text("#!/bin/sh\n")
    (tmp_path / "programs/fedlscl").chmod(0o755)
    for file in ("requirements.lock", "pyproject.toml", ".venv/.ready"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number, name in enumerate(sorted(names)):
        found = re.search(
            rf"^{re.escape(name)} +(.*); {1.5 * (number + 1):.2f} MB up; {20 + number} s$", done.stdout, re.M
        )
        assert found and re.search("ViT|CNN", found[1]) and re.search("train", found[1]), done.stdout


def test_the_python_example_runs():
    for block in BLOCKS["python"]:
        exec(compile(block, "README.md", "exec"), {})
