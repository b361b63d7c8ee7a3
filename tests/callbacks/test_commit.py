import shutil
import subprocess

import pytest

import fedlscl
from fedlscl.callbacks.results import package_commit

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository that holds a file of the package's place; and a way to call git in it."""
    file = tmp_path / "src" / "fedlscl" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(fedlscl, "__file__", str(file))

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    return file, git


def test_the_commit_is_that_of_the_checkout_and_says_what_was_changed(checkout):
    file, git = checkout
    assert package_commit.__wrapped__() == git("rev-parse", "HEAD")
    file.write_text("changed = True\n")
    assert package_commit.__wrapped__() == git("rev-parse", "HEAD") + "-dirty"


def test_a_package_installed_inside_another_checkout_has_none(checkout, monkeypatch):
    file, _ = checkout
    installed = file.parents[2] / ".venv" / "lib" / "site-packages" / "fedlscl" / "__init__.py"
    monkeypatch.setattr(fedlscl, "__file__", str(installed))
    assert package_commit.__wrapped__() is None
