"""Wheel and sdist hold what they need: built, installed beside the packages that are here, and run from elsewhere."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import fedlscl

ROOT = Path(__file__).parents[1]
UV = Path(sys.executable).with_name("uv")
TRY = """
import sys
from pathlib import Path
import fedlscl
assert Path(fedlscl.__file__).is_relative_to(sys.prefix), fedlscl.__file__
from fedlscl.__main__ import main
options = {
    "data.dataset": "fake", "data.num_clients": 2, "data.num_tasks": 1, "data.private_classes": 2,
    "data.public_classes": 2, "data.train_per_class": 4, "data.test_per_class": 2, "trainer.rounds_per_task": 1,
    "trainer.accelerator": "cpu", "method.foundation.name": "vit_glyph_patch4_32",
    "method.foundation.weights": "bundled",
}
words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
assert main(["fit", "--method", "FedNCM", *words]) == 0
assert main(["report", "runs", "--out", "report"]) == 0
assert Path("report/index.html").is_file()
"""


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not UV.exists(), reason="needs uv beside Python, which make puts there")
def test_wheel_and_sdist_are_whole_and_the_wheel_runs(tmp_path):
    dist = tmp_path / "dist"
    run(UV, "build", "--quiet", "--out-dir", dist, ROOT)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/fedlscl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= packed and "fedlscl/py.typed" in sources
    assert all(name.startswith(("fedlscl/", "fedlscl-")) for name in packed)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/test_package.py", "src/fedlscl/py.typed"} <= names
    assert not any(name.startswith(("runs/", ".venv", "site/")) for name in names)

    venv = tmp_path / "venv"
    run(UV, "venv", "--quiet", "--python", sys.executable, venv)
    python = venv / "bin/python"
    run(UV, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel)
    # Dependencies from where they are; a folder on the path brings no editable install of ours with it.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    away = tmp_path / "away"
    away.mkdir()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
    run(python, "-c", TRY, cwd=away, env=clean)
    assert run(venv / "bin/fedlscl", "--version", cwd=away, env=clean).strip() == f"fedlscl {fedlscl.__version__}"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fedlscl.__version__ and "2508.09489" in citation["preferred-citation"]["url"]
    assert f"## {fedlscl.__version__}" in (ROOT / "CHANGELOG.md").read_text()
