"""The script is tried in bash itself."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import time

import pytest

from fedlscl import methods
from fedlscl.__main__ import COMMANDS, main

DRIVER = """
source {file}
COMP_WORDS=({words}) COMP_CWORD=$(({count} - 1))
_shtab_fedlscl
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "fedlscl.bash"
    with pytest.MonkeyPatch.context() as patch, file.open("w") as out:
        patch.setattr("sys.stdout", out)
        assert main(["completion", "bash"]) == 0
    return file


@pytest.fixture(scope="module")
def complete(file):
    """What bash offers for words, the last of which is being typed."""

    def run(*words):
        text = DRIVER.format(file=shlex.quote(str(file)), words=shlex.join(["fedlscl", *words]), count=len(words) + 1)
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


def test_bash_finds_no_fault_in_it(file):
    done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_shell_is_refused(capsys):
    assert main(["completion", "fish"]) == 2
    assert "completion must be of bash or zsh, got 'fish'." in capsys.readouterr().err


def test_commands(complete):
    assert complete("f") == ["fit"] and complete("re") == ["report"]
    assert set(COMMANDS) <= set(complete(""))


def test_methods_options_and_values(complete):
    assert complete("fit", "--method", "FedM") == ["FedMGP"]
    assert set(methods.__all__) <= set(complete("test", "--method", ""))
    assert complete("fit", "--trainer.rou") == ["--trainer.rounds_per_task"]
    assert complete("fit", "--data.dir") == ["--data.dirichlet_alpha"]
    assert complete("fit", "--dry") == ["--dry_run"]
    assert complete("predict", "--ima") == ["--images"]
    assert complete("report", "--o") == ["--out"]
    assert complete("doctor", "--d") == ["--data_root"]
    assert "--method.mu" in complete("fit", "--method", "FedProx", "--method.m")
    assert "--method.collaborator.blocks" in complete("fit", "--method.collaborator.bl")
    assert "bf16-mixed" in complete("fit", "--trainer.precision", "")


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_it_offers_every_option_of_the_groups(command, complete, capsys):
    assert main([command, "--help"]) == 0
    known = set(re.findall(r"(--(?:trainer|data)\.\w+) ", capsys.readouterr().out)) - {"--trainer.callbacks"}
    assert len(known) > 30 and known <= {*complete(command, "--trainer."), *complete(command, "--data.")}


def test_a_tab_is_enough(file, tmp_path):
    """On a terminal, by the key itself."""
    shutil.copy(file, tmp_path / "completion")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "PS1": "$ ", "HOME": str(tmp_path)}
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(["bash", "--norc", "-i"], cwd=tmp_path, env=environment, start_new_session=True, **ends)
    try:
        os.write(ours, b"source ./completion; echo re''ady\n")
        wait_for(ours, "\nready")
        os.write(ours, b"fedlscl f\t --method FedPr\t")
        wait_for(ours, "fedlscl fit  ?--method FedProx")
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def wait_for(terminal, pattern, seconds=30):
    text, end = "", time.monotonic() + seconds
    while not re.search(pattern, text.replace("\r", "")):
        assert time.monotonic() < end, text
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")
