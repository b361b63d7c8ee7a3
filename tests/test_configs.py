"""Every file in configs/ is used as it stands, on tiny nets and fake data."""

import sys
from pathlib import Path

import pytest
import yaml

import fedlscl.methods
import tiny
from fedlscl.__main__ import main
from fedlscl.federated.trainer import FederatedTrainer

CONFIGS = Path(__file__).parents[1] / "configs"
sys.path.insert(0, str(CONFIGS.parent / "benchmarks"))

from presets import configuration, methods  # noqa: E402

DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
EXAMPLES = sorted(CONFIGS.glob("*.yaml"))
PAIRS = [(data, method) for data in DATA for method in methods(data)]


def settings(files):
    """Options of files by dotted names, without init_args; a later file wins."""

    def flat(values, path):
        if not isinstance(values, dict):
            return {path: values}
        return {
            name: value
            for key, part in values.items()
            for name, value in flat(part, path if key == "init_args" else f"{path}.{key}".lstrip(".")).items()
        }

    return {name: value for file in files for name, value in flat(yaml.safe_load(file.read_text()), "").items()}


def shrunk(options):
    """Options that replace what is large in a configuration by something tiny of the same kind."""
    changed = [*tiny.COMMON, "--data.root", "null", "--data.download", "false"]
    for group in ("method", "method.collaborator"):
        if f"{group}.small_model" in options:
            changed += tiny.options(group, tiny.SMALL)
        if f"{group}.foundation.name" in options:
            changed += tiny.options(f"{group}.foundation", tiny.VIT)
    changed += tiny.options("method", tiny.SERVER.get(options["method.class_path"], {}))
    if options["data.public_classes"] == 0:
        changed += ["--data.public_classes", "0"]
    return changed


def kind(files):
    """The method, its nets, and every option that is text, a list or zero, unless ``shrunk`` replaces it."""
    options = settings(files)
    replaced = {word.removeprefix("--") for word in shrunk(options)[::2]}
    return frozenset(
        (name, str(value))
        for name, value in options.items()
        if name.startswith("method.") and name not in replaced and (not value or type(value) not in (int, float))
    ) | {name for name in ("method.small_model", "method.foundation.name") if name in options}


def fit(files, folder):
    words = [word for file in files for word in ("--config", str(file))]
    return main(["fit", *words, *shrunk(settings(files)), *tiny.inside(folder)])


ONE_OF_A_KIND = {kind(configuration(*pair)): pair for pair in PAIRS[::-1]}.values()


@pytest.mark.parametrize(
    "data, method", [pair if pair[0] == "digits" else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_a_run_of_a_method_on_a_data_set_can_be_set_up(data, method, tmp_path, monkeypatch):
    built = []

    def build(trainer, method, data, seed, *_):
        trainer.setup(method, data, seed)
        built.append(len(trainer.clients))

    monkeypatch.setattr(FederatedTrainer, "fit", build)
    assert fit(configuration(data, method), tmp_path) == 0
    assert built == [tiny.DATA["num_clients"]]


@pytest.mark.slow
@pytest.mark.parametrize("data, method", ONE_OF_A_KIND)
def test_a_run_of_each_kind_ends(data, method, tmp_path):
    """Other pairs differ in numbers and names of nets alone."""
    assert fit(configuration(data, method), tmp_path) == 0
    (results,) = tmp_path.glob("*/version_0/results.json")
    assert results.with_name("checkpoint.pt").is_file()


def test_every_file_is_part_of_a_run_and_every_method_has_one():
    used = {file for pair in PAIRS for file in configuration(*pair)}
    assert used == set(CONFIGS.rglob("*.yaml")) - set(EXAMPLES)
    named = {settings(configuration(*pair))["method.class_path"] for pair in PAIRS}
    assert named == set(fedlscl.methods.__all__)


def test_files_of_data_sets_name_no_method_and_files_of_methods_no_data():
    for data in (CONFIGS / "data").iterdir():
        assert yaml.safe_load(data.read_text()).keys() == {"seed_everything", "trainer", "data"}, data
    for method in (CONFIGS / "method").iterdir():
        assert yaml.safe_load(method.read_text()).keys() <= {"trainer", "method"}, method


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_fed_lscl_on_its_data_set(example):
    """Written out in one file; an option that the method's file repeats from the defaults may be missing."""
    composed, written = settings(configuration(example.stem, "fedlscl")), settings([example])
    assert composed | written == composed
    assert all(name.startswith("method.") for name in composed.keys() - written.keys())


@pytest.mark.parametrize("name", ["cifar100.yaml", "imagenet_r.yaml"])
def test_the_papers_setting_is_stated(name):
    text, options = (CONFIGS / name).read_text(), settings([CONFIGS / name])
    assert options["trainer.rounds_per_task"] == 5
    assert options["method.lr"] == 1e-3
    assert options["method.buffer_per_class"] == 20
    assert options["method.collaborator.foundation.name"] == "vit_base_patch16_224.augreg_in21k"
    assert (options["method.collaborator.small_model"], options["method.collaborator.blocks"]) == ("resnet18", "all")
    assert (options["data.num_clients"], options["data.num_tasks"]) == (5, 5)
    assert options["data.private_classes"] + options["data.public_classes"] == 40
    assert all(seed in text for seed in ("42", "1999", "2024"))
