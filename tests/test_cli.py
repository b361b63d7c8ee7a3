import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

import tiny
from fedlscl import __version__, methods
from fedlscl.__main__ import main
from fedlscl.cli.app import method_rows
from fedlscl.cli.runs import lock, versions
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.methods import FedAvg

METHOD_OF_ANOTHER_PACKAGE = """
from dataclasses import dataclass
from fedlscl.methods import FedAvg

@dataclass(kw_only=True)
class Lazy(FedAvg):
    '''Sends nothing.'''

    idleness: float = 0.5
    '''How idle it is.'''
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory of Fed-LSCL."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["fit", *tiny.FEDLSCL, *tiny.inside(folder)]) == 0
    return folder / "FedLSCL" / "version_0"


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run directory of FedAvg."""
    folder = tmp_path_factory.mktemp("runs")
    assert fit(folder) == 0
    return folder / "FedAvg" / "version_0"


@pytest.fixture
def again(averaged, tmp_path):
    """A copy of it, of one's own."""
    return shutil.copytree(averaged, tmp_path / "FedAvg" / "version_0")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def fit(folder, *arguments):
    return main(["fit", *tiny.FEDAVG, *tiny.inside(folder), *arguments])


def contents(run):
    return {name: (run / name).read_bytes() for name in ("checkpoint.pt", "results.json", "matrix.csv")}


def saved(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def test_help_and_version_wait_for_nothing():
    program = (
        "import sys; from fedlscl.__main__ import main; "
        "status = main(['--help']) + main(['--version']) + main([]); "
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'lightning', 'timm')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"fedlscl {__version__}\n" in done.stdout
    assert "predict" in done.stdout


def test_methods_lists_each_with_one_line(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[1] for line in lines] == methods.__all__
    fedavg = "| FedAvg | AISTATS 2017, arXiv 1602.05629 | small CNN and head, or the head of a frozen ViT | all"
    assert any(line.startswith(fedavg) for line in lines)


def test_methods_draws_a_table_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "240")
    assert main(["methods"]) == 0
    drawn = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    for name, *cells in method_rows():
        assert any(line.split()[1:2] == [name] and all(cell in line for cell in cells) for line in drawn.splitlines())


@pytest.mark.parametrize("name", ["fedprox", "FEDPROX"])
def test_a_method_is_found_in_any_case(name, capsys):
    assert main(["fit", "--method", name, "--print_config"]) == 0
    assert "class_path: fedlscl.methods.FedProx" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["FedAvg", "FedL2P", "FedMGP", "JointLSCL", "TARGET"])
def test_an_option_that_nobody_sets_has_the_methods_own_default(name, tmp_path, capsys):
    """Not that of the method which runs where none is named."""
    file = tmp_path / "method.yaml"
    file.write_text(f"method:\n  class_path: {name}\n")
    for words in (["--method", name], ["--config", str(file)]):
        assert main(["fit", *words, "--print_config"]) == 0
        given = yaml.safe_load(capsys.readouterr().out)["method"]["init_args"]
        own = {field.name: field.default for field in dataclasses.fields(getattr(methods, name)) if field.init}
        plain = {key: value for key, value in own.items() if isinstance(value, int | float | str)}
        assert {key: given[key] for key in plain} == plain and "lr" in plain


def test_every_method_and_the_data_have_defaults_that_fit_together():
    streams = SpatialTemporalDataModule()
    assert all(len(split.classes) == streams.num_tasks for split in streams.splits)
    for name in methods.__all__:
        assert getattr(getattr(methods, name)(), "num_tasks", streams.num_tasks) >= streams.num_tasks


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_a_command_explains_groups_and_options(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fedlscl {command} [--config FILE]")
    assert "Communication rounds between two tasks" in text
    assert "--ckpt_path" in text


def test_help_of_a_method_shows_the_docstrings_of_its_fields(capsys):
    assert main(["fit", "--method.help", "FedLSCL"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "samples of lowest loss kept of each class" in text
    assert "The adapted ViT blocks, counted from 0" in text


def test_print_config_resolves_files_and_nested_options(tmp_path, capsys):
    base, changes = tmp_path / "base.yaml", tmp_path / "changes.yaml"
    base.write_text("trainer: {rounds_per_task: 3}\nmethod: {class_path: FedLSCL, init_args: {lr: 1e-2}}\n")
    changes.write_text("method: {class_path: FedProx, init_args: {mu: 0.5}}\n")
    arguments = ["--config", str(base), "--config", str(changes), "--method.mu", "0.1", "--data.num_clients", "3"]
    assert main(["fit", *arguments, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["method"]["class_path"].endswith("FedProx")
    assert (config["method"]["init_args"]["mu"], config["method"]["init_args"]["lr"]) == (0.1, 0.01)
    assert (config["trainer"]["rounds_per_task"], config["data"]["num_clients"]) == (3, 3)
    assert config["seed_everything"] == 42


def test_the_saved_configuration_is_resolved_and_replays(trained, tmp_path):
    config = saved(trained)
    assert config["method"]["init_args"]["collaborator"]["foundation"]["name"] == "test_vit"
    assert config["method"]["init_args"]["lambda_lora"] == 0.01
    assert "ckpt_path" not in config
    assert main(["fit", "--config", str(trained / "config.yaml"), *tiny.inside(tmp_path)]) == 0
    assert contents(tmp_path / "FedLSCL" / "version_0") == contents(trained)


def test_a_second_fit_never_overwrites_the_first(again, tmp_path):
    first = contents(again)
    assert fit(tmp_path, "--seed_everything", "1") == 0
    assert [run.name for run in versions(tmp_path / "FedAvg")] == ["version_0", "version_1"]
    assert contents(again) == first
    assert contents(tmp_path / "FedAvg" / "version_1") != first


def test_a_method_of_another_package_needs_no_registration(tmp_path, monkeypatch):
    (tmp_path / "another_package.py").write_text(METHOD_OF_ANOTHER_PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    assert fit(tmp_path, "--method", "another_package.Lazy", "--method.idleness", "0.9") == 0
    assert saved(tmp_path / "Lazy" / "version_0")["method"]["init_args"]["idleness"] == 0.9


def test_weights_are_looked_up_under_the_data_root(tmp_path, capsys):
    from safetensors.torch import save_file

    from fedlscl.nets.vit import FoundationConfig, foundation

    save_file(foundation(FoundationConfig(**tiny.VIT)).vit.state_dict(), tmp_path / "some.safetensors")
    arguments = ["fit", *tiny.FEDLSCL, "--method.collaborator.foundation.weights", "some.safetensors"]
    assert main([*arguments, *tiny.inside(tmp_path)]) == 2
    assert "or 'random', got 'some.safetensors'" in capsys.readouterr().err
    assert main([*arguments, "--data.root", str(tmp_path), *tiny.inside(tmp_path)]) == 0
    # As given, so that another data.root serves as well.
    weights = saved(tmp_path / "FedLSCL" / "version_0")["method"]["init_args"]["collaborator"]["foundation"]["weights"]
    assert weights == "some.safetensors"


def test_last_begins_where_nothing_was_saved_and_then_continues_in_place(tmp_path, capsys):
    assert fit(tmp_path, "--ckpt_path", "last") == 0
    assert "No checkpoint to continue" in capsys.readouterr().out
    first = contents(tmp_path / "FedAvg" / "version_0")
    assert fit(tmp_path, "--ckpt_path", "last") == 0
    assert "accuracy in percent" in capsys.readouterr().out
    assert contents(tmp_path / "FedAvg" / "version_0") == first
    assert fit(tmp_path, "--ckpt_path", str(tmp_path / "FedAvg" / "version_0")) == 0
    assert len(versions(tmp_path / "FedAvg")) == 1


def test_last_passes_over_a_run_of_another_configuration_if_a_newer_one_was_stopped(again, tmp_path, capsys):
    assert fit(tmp_path, "--method.lr", "0.1", "--ckpt_path", "last") == 2
    assert "another configuration" in capsys.readouterr().err
    (tmp_path / "FedAvg" / "version_1").mkdir()
    assert fit(tmp_path, "--method.lr", "0.1", "--ckpt_path", "last") == 0
    assert versions(tmp_path / "FedAvg")[-1].joinpath("checkpoint.pt").is_file()


def test_a_run_in_use_is_left_alone(again, tmp_path, capsys):
    lock(again)
    assert fit(tmp_path, "--ckpt_path", "last") == 2
    assert "is in use" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["test", "validate"])
@pytest.mark.parametrize("options", [[], ["--trainer.precision", "bf16-mixed"]])
def test_evaluation_uses_the_trained_state(command, options, trained, capsys):
    assert main([command, "--ckpt_path", str(trained), *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = [[float(value) for value in row[2:4]] for row in rows if row and row[0] == "class-IL" and row[1] != "mean"]
    results = json.loads((trained / "results.json").read_text())
    expected = [[100 * value for value in client[-1]] for client in results["accuracy"]["after"]["class_il"]]
    np.testing.assert_allclose(found, expected, atol=0.06 if not options else 20)


def test_evaluation_finds_the_newest_run(trained, capsys):
    assert main(["test", "--trainer.default_root_dir", str(trained.parents[1])]) == 0
    assert str(trained) in capsys.readouterr().out


def test_evaluation_without_a_checkpoint_is_refused(tmp_path, capsys):
    for arguments in (["test"], ["validate"], ["predict", "--images", "x.png"]):
        assert main([*arguments, *tiny.inside(tmp_path / "none")]) == 2
        assert "does not exist: run fedlscl fit first" in capsys.readouterr().err


def predictions(capsys, *arguments):
    assert main(["predict", *arguments]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_predict_ranks_the_classes_that_the_client_has_seen(trained, images, capsys):
    manifest = json.loads((trained / "manifest.json").read_text())
    for client in (0, 1):
        rows = predictions(
            capsys, "--ckpt_path", str(trained), "--images", str(images), "--client", str(client), "--top", "99"
        )
        seen = {manifest["class_names"][label] for task in manifest["clients"][client] for label in task["classes"]}
        for number in range(3):
            of_image = [row for row in rows if row["image"].endswith(f"{number}.png")]
            assert {row["class"] for row in of_image} == seen
            assert [int(row["rank"]) for row in of_image] == [1, 2, 3, 4]
            probabilities = [float(row["probability"]) for row in of_image]
            assert probabilities == sorted(probabilities, reverse=True)
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_predict_needs_no_data_set_and_writes_a_file(trained, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fedlscl.data.datamodule.load_images", None)
    out = tmp_path / "predictions.csv"
    image = str(images / "0.png")
    assert main(["predict", "--ckpt_path", str(trained), "--images", image, "--out", str(out), "--top", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed == ""
    assert out.read_text().startswith(f"image,rank,class,probability\n{image},1,fake")
    assert len(out.read_text().splitlines()) == 2


def interrupt_at(monkeypatch, call, error):
    """Let the server fail in its n-th round."""
    calls = []
    original = FedAvg.aggregate

    def aggregate(self, uploads, progress):
        calls.append(progress)
        if len(calls) == call:
            raise error
        return original(self, uploads, progress)

    monkeypatch.setattr(FedAvg, "aggregate", aggregate)


def test_ctrl_c_says_in_one_line_how_to_go_on(averaged, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 2, KeyboardInterrupt())
    assert fit(tmp_path) == 130
    run = tmp_path / "FedAvg" / "version_0"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"fedlscl: interrupted: continue with --ckpt_path {run}"
    monkeypatch.undo()
    assert fit(tmp_path, "--ckpt_path", str(run)) == 0
    assert contents(run) == contents(averaged)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_run_that_ends_before_its_first_checkpoint_leaves_nothing(error, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 1, error)
    if isinstance(error, RuntimeError):
        # A programming error keeps its traceback.
        with pytest.raises(RuntimeError, match="a bug"):
            fit(tmp_path / "runs")
    else:
        assert fit(tmp_path / "runs") == 130
    assert list(tmp_path.rglob("version_*")) == []
