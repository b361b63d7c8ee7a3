import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import tiny
from fedlscl.__main__ import main
from fedlscl.cli import doctor
from fedlscl.nets.vit import FoundationConfig, foundation


def lines(capsys):
    """What is said, by the second word of each line."""
    found = {}
    for line in capsys.readouterr().out.splitlines():
        state, name, text = line.split(maxsplit=2)
        found.setdefault(name, []).append((state, text))
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "SIDE", 32)


def test_it_says_what_this_machine_has(capsys):
    assert main(["doctor"]) == 0
    said = lines(capsys)
    assert {"python", "versions", "devices", "precision", "memory", "disk"} <= set(said)
    assert all(state == "ok" for states in said.values() for state, _ in states)
    assert "torch " in said["versions"][0][1] and "timm " in said["versions"][0][1]
    assert "scikit-learn " in said["[digits]"][0][1]
    assert "GFLOP/s" in said["precision"][0][1] and "--trainer.precision" in said["precision"][0][1]
    assert " free of " in said["disk"][0][1]


def test_an_extra_that_is_absent_comes_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "EXTRAS", {"flower": ("no-such-package", "federations over a network")})
    assert main(["doctor"]) == 0
    assert "pip install 'fedlscl[flower]'" in lines(capsys)["[flower]"][0][1]


@pytest.mark.parametrize(("float32", "bf16", "words"), [(1, 50, "50 times slower"), (3, 1, "3.0 times faster")])
def test_the_faster_precision_is_named_from_times_that_are_measured(float32, bf16, words, monkeypatch, capsys):
    seconds = {"torch.float32": float32, "torch.bfloat16": bf16}
    monkeypatch.setattr(doctor, "_product", lambda device, dtype: seconds[str(dtype)])
    assert main(["doctor"]) == 0
    text = lines(capsys)["precision"][0][1]
    assert f"bf16 is {words} than fp32" in text
    assert f"--trainer.precision {'32-true' if bf16 > float32 else 'bf16-mixed'}" in text


def test_it_loads_what_lies_in_a_folder(tmp_path, capsys):
    labels = np.arange(4)
    arrays = {f"{part}_{kind}": value for part in ("train", "test")
              for kind, value in (("images", np.zeros((4, 8, 8), np.uint8)), ("labels", labels))}  # fmt: skip
    np.savez(tmp_path / "some.npz", **arrays)
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    config = FoundationConfig(**tiny.VIT | {"image_size": None})
    save_file(foundation(config).vit.state_dict(), tmp_path / "test_vit.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"")
    (tmp_path / "train" / "cats").mkdir(parents=True)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "train" / "cats" / "1.png")
    assert main(["doctor", "--data_root", str(tmp_path)]) == 1
    said = lines(capsys)
    assert ("ok", "some.npz: 4 + 4 images of 8x8, 4 classes") in said["data"]
    assert ("ok", "folder, train: 1 images, 1 classes") in said["data"]
    (broken,) = [text for state, text in said["data"] if state == "FAILS"]
    assert "broken.npz is not a readable .npz" in broken and "save it with numpy.savez" in broken
    assert [state for state, _ in said["weights"]] == ["FAILS", "ok"]
    assert said["weights"][1][1].startswith("test_vit.safetensors: 6 blocks of width 64")


@pytest.mark.parametrize("name", ["nothing", "absent"])
def test_a_folder_without_anything_is_a_fault(name, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert main(["doctor", "--data_root", str(tmp_path / name)]) == 1
    (found,) = lines(capsys)["data"]
    assert found[0] == "FAILS" and str(tmp_path / name) in found[1]


CONFIG = "method: {class_path: FedNCM, init_args: {foundation: {name: test_vit, weights: WEIGHTS, image_size: 32}}}\n"


def test_what_a_configuration_needs_is_made(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG.replace("WEIGHTS", "random") + "data: {dataset: digits}\n")
    assert main(["doctor", "--config", str(file)]) == 0
    said = lines(capsys)
    assert said["config"] == [("ok", f"{file} is understood: FedNCM on digits")]
    assert said["data"] == [("ok", "1,347 + 450 images of 8x8, 10 classes; 3 clients x 3 tasks")]
    assert said["nets"][0][1].endswith(f"test_vit, weights {foundation(FoundationConfig(**tiny.VIT)).fingerprint[:12]}")


def test_what_a_configuration_lacks_comes_with_a_remedy(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG.replace("WEIGHTS", "away.safetensors") + "data: {dataset: gone.npz}\n")
    assert main(["doctor", "--config", str(file), "--data_root", str(tmp_path)]) == 1
    said = lines(capsys)
    assert said["data"] == [
        ("FAILS", f"{tmp_path / 'gone.npz'} is missing: set root to its folder and dataset to its name")
    ]
    assert said["nets"][0][0] == "FAILS" and "give a safetensors file" in said["nets"][0][1]
    file.write_text("method: {class_path: FedNCM, init_args: {leraning_rate: 1}}\n")
    assert main(["doctor", "--config", str(file)]) == 1
    assert "leraning_rate is unknown" in lines(capsys)["config"][0][1]


def test_a_wrong_word_is_refused(capsys):
    assert main(["doctor", "--data", "x"]) == 2
    assert "fedlscl doctor [--data_root DIR] [--config FILE]" in capsys.readouterr().err
