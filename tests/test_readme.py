"""The commands that the README shows are run as they stand there, on tiny nets and fake data."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
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
    block = [] if "--method.collaborator.block" in words else ["--method.collaborator.block", "3"]
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


def test_everything_else_is_a_make_target_the_environment_tensorboard_or_completion():
    others = {line.split()[0] for line in LINES if line and not line.startswith("fedlscl ")}
    assert others == {"make", "source", "tensorboard", "eval"}
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {line.split()[1] for line in LINES if line.startswith("make ")} <= set(targets)


def test_the_python_example_runs():
    for block in BLOCKS["python"]:
        exec(compile(block, "README.md", "exec"), {})
