"""Every option that is a path is known as one, and expanded wherever it can be given."""

import inspect
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

import tiny
from fedlscl import methods
from fedlscl.__main__ import main
from fedlscl.callbacks import Callback
from fedlscl.cli import PATHS, doctor, expanded, report
from fedlscl.cli.app import FederatedCLI, read_options
from fedlscl.cli.commands import Commands
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.trainer import FederatedTrainer

TRAINED = ("fit", "validate", "test", "predict")
NO_PATHS = {"accelerator", "name", "readout", "small_model", "small_models", "small_options", "targets"}
"""Options that are text, but no paths."""


def _of_call(group, call):
    """Options of a function or a constructor, with their types."""
    hints = get_type_hints(call.__init__ if inspect.isclass(call) else call)
    names = [name for name in inspect.signature(call).parameters if name not in ("self", "model", "datamodule")]
    return {f"{group}.{name}".removeprefix("."): hints[name] for name in names}


def _of_fields(group, kind):
    """Options of a dataclass and of those in it, with their types."""
    hints = get_type_hints(kind)
    for field in (field for field in fields(kind) if field.init):
        name, hint = f"{group}.{field.name}", hints[field.name]
        nested = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
        if nested:
            yield from _of_fields(name, nested[0])
        else:
            yield name, hint


def text_options():
    """Command, option and type of every option that takes any text."""
    groups = {**_of_call("trainer", FederatedTrainer), **_of_call("data", SpatialTemporalDataModule)}
    yield from (("fit", option, hint) for option, hint in groups.items())
    yield from ((name, *item) for name in TRAINED for item in _of_call("", getattr(Commands, name)).items())
    for name in methods.__all__:
        yield from ((name, *item) for item in _of_fields("method", getattr(methods, name)))


def holds(hint, kinds):
    return hint in kinds or any(holds(part, kinds) for part in get_args(hint))


TEXTS = [(where, option) for where, option, hint in text_options() if holds(hint, (str, Path))]
CNN_ONLY = ("FedWeIT", "GLFC", "MFCL", "TARGET")
"""Methods that refuse the foundation, and so its weights."""
LISTS = ("method.small_weights",)
"""Options with a list of paths."""
FOUND = [
    (where, option)
    for where, option in TEXTS
    if option.rpartition(".")[2] in PATHS and where not in CNN_ONLY and option not in LISTS
]


def test_every_text_option_is_a_path_or_known_to_be_none():
    last = {option.rpartition(".")[2] for _, option in TEXTS}
    assert last - PATHS == NO_PATHS, "name a new option in cli.PATHS, or here if it is no path"
    assert {"root", "cache_dir", "manifest", "default_root_dir", "weights", "ckpt_path", "images", "out"} <= last


class Read(FederatedCLI):
    """A command with its own options: everything is made, nothing runs."""

    def _run_subcommand(self, subcommand):
        self.run = subcommand


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "PLACE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("MISSING", "EMPTY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EMPTY", "")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def arguments(where):
    if where in TRAINED:
        needed = ["--images", "x.png"] if where == "predict" else []
        return [where, "--config", "base.yaml", *needed]
    return ["fit", "--method", where]


def value_of(cli, option):
    value = cli.trainer.config if option.partition(".")[0] in ("data", "trainer", "method") else None
    if value is None:
        return cli.config_init[cli.command][option]
    for part in option.split("."):
        value = value[part] if part in value else value["init_args"][part]
    return value


FORMS = ["$PLACE/x.npz", "${PLACE}/x.npz"]


@pytest.mark.parametrize(
    ("where", "option", "form"),
    [
        *((*found, "~/x.npz") for found in FOUND),
        *((*found, form) for found in FOUND for form in FORMS if found[0] in ("fit", "predict")),
    ],
)
def test_path_is_expanded_on_the_command_line_and_in_a_file(where, option, form, home):
    Path("base.yaml").write_text("method: FedAvg\n")
    assert value_of(Read([*arguments(where), f"--{option}={form}"]), option) == str(home / "x.npz")
    if form != "~/x.npz":
        return
    group, *rest = option.split(".")
    inner = form
    for part in reversed(rest):
        inner = {part: inner}
    if group == "method":
        inner = {"class_path": where, "init_args": inner}
    Path("base.yaml").write_text(yaml.safe_dump({group: inner}))
    first, *others = arguments(where)
    assert value_of(Read([first, *others, "--config", "base.yaml"]), option) == str(home / "x.npz")


def test_weights_of_small_models_are_looked_up_under_the_root(home):
    (home / "data").mkdir()
    (home / "data/a.safetensors").touch()
    command = ["fit", "--method", "FedLSCL", "--data.root", "~/data", "--method.small_weights"]
    cli = Read([*command, "[a.safetensors, ~/b.safetensors]"])
    found = [str(home / "data/a.safetensors"), str(home / "b.safetensors")]
    assert value_of(cli, "method.small_weights") == found
    cli = Read([*command[:-1], "--method.collaborator.small_weights", "a.safetensors"])
    assert value_of(cli, "method.collaborator.small_weights") == found[0]


@dataclass
class Noting(Callback):
    """A callback of a user, with a path that no name gives away."""

    diary: Path
    log: Path | None = None


def test_a_path_of_a_users_class_is_expanded_by_its_type(home):
    callback = {"class_path": f"{__name__}.Noting", "init_args": {"diary": "~/d", "log": "$PLACE/l"}}
    Path("a.yaml").write_text(yaml.safe_dump({"method": "FedAvg", "trainer": {"callbacks": [callback]}}))
    cli = Read(["fit", "--config=~/../a.yaml"])
    (made,) = cli.trainer.trainer.callbacks
    assert (made.diary, made.log) == (home / "d", home / "l")


@pytest.mark.parametrize("form", ["~/d.yaml", "$PLACE/d.yaml"])
def test_the_file_of_a_group_is_found(form, home):
    Path(home, "d.yaml").write_text("root: $PLACE/x.npz\n")
    for words in ([f"--data={form}"], ["--data", form], ["--data", '{"root": "$PLACE/x.npz"}']):
        assert value_of(Read(["fit", "--method", "FedAvg", *words]), "data.root") == str(home / "x.npz")


def test_the_saved_configuration_keeps_what_a_file_says(home):
    Path("a.yaml").write_text("method: FedAvg\ndata: {root: ~/d}\n")
    cli = Read(["fit", "--config", "a.yaml"])
    assert yaml.safe_load(cli.trainer.text)["data"]["root"] == "~/d"


def test_no_folder_of_that_name_appears(home, capsys):
    assert main(["fit", *tiny.FEDAVG, "--trainer.default_root_dir=~/runs"]) == 0
    assert (home / "runs" / "FedAvg" / "version_0" / "results.json").is_file()
    assert not Path("~").exists()
    assert main(["test", "--ckpt_path=~/runs"]) == main(["report", "$PLACE/runs", "--out=~/page"]) == 0
    assert (home / "page" / "index.html").is_file()
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["home"]


@pytest.mark.parametrize("parse", [report, doctor.doctor])
def test_the_other_commands_expand_theirs(parse, home, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("fedlscl.report.table.print_comparison", given.extend)
    monkeypatch.setattr(doctor, "checks", lambda root, configs: given.extend([root, *configs]) or [])
    parse(["~/x", "$PLACE/y"] if parse is report else ["--data_root=~/x", "--config=$PLACE/y"])
    assert [str(path) for path in given] == [str(home / "x"), str(home / "y")]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("$MISSING/x", "must be a path whose variables are set, got '$MISSING/x': set MISSING, or write"),
        ("a/${MISSING}", "got 'a/${MISSING}': set MISSING"),
        ("$EMPTY/x", "got '$EMPTY/x': set EMPTY"),
        ("$PLACE/$MISSING", "set MISSING"),
        ("~nobody-here/x", "must begin with the home of a known user, got '~nobody-here/x': write the path in full"),
    ],
)
@pytest.mark.parametrize("option", ["--trainer.default_root_dir", "--data.root", "--method.foundation.weights"])
def test_an_unset_variable_or_unknown_user_is_refused(option, path, said, home, capsys):
    Path("a.yaml").write_text("method: FedAvg\n")
    assert main(["fit", *tiny.FEDAVG, f"{option}={path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedlscl: error: {option[2:]} must") and said in line
    assert sorted(found.name for found in Path.cwd().iterdir()) == ["a.yaml", "home"]


@pytest.mark.parametrize("name", ["a$MISSING", "cost$5", "~nobody-here", "$", "a~", "100%"])
def test_what_exists_as_it_is_written_stays(name, home):
    Path(name).mkdir()
    assert expanded(name) == expanded(f"./{name}")[2:] == name


def test_other_words_stay(home):
    words = ["--trainer.name=~a", "--method.small_model", "$PLACE", "~", "--images"]
    assert read_options(words) == [("--trainer.name", "~a"), ("--method.small_model", "$PLACE"), ("~", None),
                                   ("--images", None)]  # fmt: skip
