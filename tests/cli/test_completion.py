"""The script is tried in the shells themselves."""

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
from fedlscl.cli.completion import TRAINED, script

DRIVER = """
source {file}
COMP_WORDS=({words}) COMP_CWORD=$(({count} - 1))
_fedlscl
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "fedlscl.bash"
    file.write_text(script("bash"))
    return file


@pytest.fixture(scope="module")
def complete(file, tmp_path_factory):
    """What bash offers for words, the last of which is being typed."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "runs").mkdir()
    (folder / "ewc.yaml").write_text("method:\n  class_path: fedlscl.methods.EWC\n")

    def run(*words):
        text = DRIVER.format(file=shlex.quote(str(file)), words=shlex.join(["fedlscl", *words]), count=len(words) + 1)
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd=folder, timeout=60)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.split()

    return run


def test_bash_finds_no_fault_in_it(file):
    done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_switched_on_as_documented(capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash")
    assert main(["completion", "fish"]) == 2
    assert "fedlscl completion bash, or zsh" in capsys.readouterr().err


def test_commands(complete):
    assert complete("f") == ["fit"]
    assert complete("re") == ["report"]
    assert set(COMMANDS) < set(complete(""))


def test_names_of_methods(complete):
    assert complete("fit", "--method", "FedM") == ["FedMGP"]
    assert complete("fit", "--method", "") == methods.__all__


def test_options_of_groups_and_of_the_command(complete):
    assert complete("fit", "--trainer.rou") == ["--trainer.rounds_per_task"]
    assert complete("fit", "--dry") == ["--dry_run"]
    assert complete("predict", "--ima") == ["--images"]
    assert complete("report", "--o") == ["--out"]
    assert complete("doctor", "--d") == ["--data_root"]


def test_options_are_those_of_the_method_at_hand(complete):
    assert complete("fit", "--method", "FedProx", "--method.m") == ["--method.mu"]
    assert complete("fit", "--method.collaborator.bl") == ["--method.collaborator.block"]
    assert complete("fit", "--method.m") == []
    assert "--method.fisher_samples" in complete("fit", "--config", "ewc.yaml", "--method.f")
    assert not complete("fit", "--config", "ewc.yaml", "--method.mu")
    assert complete("fit", "--method", "mine.Own", "--method.mu") == ["--method.mu"]


def test_values(complete):
    assert complete("fit", "--trainer.server_every", "") == ["round", "task"]
    assert "bf16-mixed" in complete("fit", "--trainer.precision", "")
    assert complete("fit", "--method.collaborator.head", "l") == ["linear"]
    assert complete("fit", "--method.balance", "t") == ["true"]
    assert complete("test", "--ckpt_path", "ru") == ["runs"]


def offered(command):
    (line,) = re.findall(rf'^    {command}\) words="(.*)" ;;$', script("bash"), re.M)
    return set(line.split())


@pytest.mark.parametrize("command", TRAINED)
def test_what_it_offers_is_what_the_parser_takes(command, capsys):
    assert main([command, "--help"]) == 0
    taken = set(re.findall(r"(--[\w.]+)", capsys.readouterr().out))
    assert offered(command) - taken == set()
    groups = {option for option in taken if option.startswith(("--trainer.", "--data.")) and ".help" not in option}
    assert len(groups) > 30 and groups <= offered(command)


@pytest.mark.parametrize("name", ["FedLSCL", "FedMGP"])
def test_options_of_a_method_are_those_of_its_help(name, capsys):
    (words,) = re.findall(rf'^    fit:{name}\|.*words="\$words (.*)" ;;$', script("bash"), re.M)
    assert main(["fit", "--method.help", name]) == 0
    text = capsys.readouterr().out
    assert words.split() and not [option for option in words.split() if option not in text]


def test_options_of_a_foundation_that_a_method_may_lack_are_taken(complete, capsys):
    words = ["--method", "FedAvg", "--method.foundation.nam"]
    (option,) = complete("fit", *words)
    assert main(["fit", *words[:2], option, "test_vit", "--print_config"]) == 0
    assert "name: test_vit" in capsys.readouterr().out


@pytest.mark.parametrize(("shell", "options"), [("bash", ["--norc", "-i"]), ("zsh", ["-f", "-i"])])
def test_a_tab_is_enough(shell, options, tmp_path):
    """On a terminal, by the key itself."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "completion").write_text(script(shell))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "PS1": "$ ", "ZDOTDIR": str(tmp_path), "HOME": str(tmp_path)}
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen([shell, *options], cwd=tmp_path, env=environment, start_new_session=True, **ends)
    try:
        os.write(ours, b"source ./completion; echo re''ady\n")
        wait_for(ours, "\nready")
        os.write(ours, b"fedlscl f\t --method FedPr\t")
        wait_for(ours, "fedlscl fit  --method FedProx|fedlscl fit --method FedProx")
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
