"""Every YAML in configs/ runs, on tiny nets and fake data."""

from pathlib import Path

import pytest
import yaml

import tiny
from fedlscl.__main__ import main

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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
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
