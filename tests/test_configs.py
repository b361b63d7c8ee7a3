"""Every YAML in configs/ is taken as it is, on tiny nets and fake data.

Every kind of file is run to its end. Of the others, which differ from one of these in numbers alone, everything is
built that a run needs before its first step.
"""

from pathlib import Path

import pytest
import yaml

import tiny
from fedlscl.__main__ import main
from fedlscl.federated.trainer import FederatedTrainer

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def shrunk(file):
    """Options that replace what is large in a configuration by something tiny of the same kind."""
    config = yaml.safe_load(file.read_text())
    method = config["method"].get("init_args", {})
    changed = [*tiny.COMMON, "--data.root", "null", "--data.download", "false"]
    groups = {"method": method, "method.collaborator": method.get("collaborator", {})}
    for group, values in groups.items():
        if "small_model" in values:
            changed += tiny.options(group, tiny.SMALL)
        if "foundation" in values:
            changed += tiny.options(f"{group}.foundation", tiny.VIT)
    changed += tiny.options("method", tiny.SERVER.get(config["method"]["class_path"], {}))
    if config["data"].get("public_classes") == 0:
        changed += ["--data.public_classes", "0"]
    return changed


def flat(values, path=""):
    """All options of nested groups, by their dotted names."""
    if not isinstance(values, dict):
        return {path: values}
    return {name: value for key, part in values.items() for name, value in flat(part, f"{path}.{key}").items()}


def kind(file):
    """The method, the nets it is built from, and what its file switches: options that are text, lists or zero."""
    config = yaml.safe_load(file.read_text())
    method = config["method"].get("init_args", {})
    replaced = {word.removeprefix("--") for word in shrunk(file)[::2]}
    nets = {name for name in ("small_model", "foundation") if name in method}
    switches = {
        (name, str(value))
        for name, value in flat(method, "method").items()
        if name not in replaced and (not value or type(value) not in (int, float))
    }
    return config["method"]["class_path"], frozenset(nets), frozenset(switches)


ONE_OF_A_KIND = list({kind(file): file for file in reversed(FILES)}.values())[::-1]
OTHERS = [file for file in FILES if file not in ONE_OF_A_KIND]


def name_in_configs(file):
    return str(file.relative_to(CONFIGS))


@pytest.mark.parametrize("file", OTHERS, ids=name_in_configs)
def test_what_a_configuration_names_can_be_built(file, tmp_path, monkeypatch):
    """By its command line, up to the first step; another file of its kind is trained."""
    built = []

    def build(trainer, method, data, seed, *_):
        trainer.setup(method, data, seed)
        built.append(len(trainer.clients))

    monkeypatch.setattr(FederatedTrainer, "fit", build)
    assert main(["fit", "--config", str(file), *shrunk(file), *tiny.inside(tmp_path)]) == 0
    assert built == [tiny.DATA["num_clients"]]


@pytest.mark.parametrize("file", ONE_OF_A_KIND, ids=name_in_configs)
def test_configuration_runs(file, tmp_path):
    assert main(["fit", "--config", str(file), *shrunk(file), *tiny.inside(tmp_path)]) == 0
    (results,) = tmp_path.glob("*/version_0/results.json")
    assert results.with_name("checkpoint.pt").is_file()


@pytest.mark.parametrize("name", ["cifar100.yaml", "imagenet_r.yaml"])
def test_the_papers_setting_is_stated_briefly(name):
    text = (CONFIGS / name).read_text()
    assert len(text.splitlines()) < 30
    config = yaml.safe_load(text)
    method, data = config["method"]["init_args"], config["data"]
    assert config["trainer"]["rounds_per_task"] == 5
    assert method["lr"] == 1e-3
    assert method["buffer_per_class"] == 20
    assert method["collaborator"]["foundation"]["name"] == "vit_base_patch16_224.augreg_in21k"
    assert (method["collaborator"]["small_model"], method["collaborator"]["block"]) == ("resnet18", 3)
    assert (data["num_clients"], data["num_tasks"]) == (5, 5)
    assert data["private_classes"] + data["public_classes"] == 40
    assert all(seed in text for seed in ("42", "1999", "2024"))


def test_configurations_of_a_data_set_agree_on_the_data():
    for folder in ("cifar100", "cifar100_deit_tiny", "imagenet_r", "digits"):
        files = [CONFIGS / f"{folder}.yaml", *sorted((CONFIGS / folder).glob("*.yaml"))]
        data = [yaml.safe_load(file.read_text())["data"] for file in files]
        assert len(files) > 5
        assert all(part == data[0] for part in data)
