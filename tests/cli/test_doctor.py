import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import tiny
from fedlscl.__main__ import main
from fedlscl.cli import doctor
from fedlscl.data import load_images
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
    monkeypatch.setattr(doctor, "SIDES", {"cpu": 32})


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
    arrays = {f"{part}_labels": labels for part in ("train", "test")}
    arrays |= {"train_images": np.full((4, 8, 8), 14, np.uint8), "test_images": np.full((4, 8, 8), 13, np.uint8)}
    np.savez(tmp_path / "some.npz", **arrays)
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    config = FoundationConfig(**tiny.VIT | {"image_size": None})
    save_file(foundation(config).vit.state_dict(), tmp_path / "test_vit.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"")
    (tmp_path / "train" / "cats").mkdir(parents=True)
    (tmp_path / "test" / "cats").mkdir(parents=True)
    for name, grey in (("train/cats/1.png", 50), ("test/cats/2.png", 90)):
        Image.new("L", (16, 16), grey).save(tmp_path / name)
    assert main(["doctor", "--data_root", str(tmp_path)]) == 1
    said = lines(capsys)
    assert ("ok", "some.npz: 4 + 4 images of 8x8, 4 classes") in said["data"]
    assert ("ok", "folder: 1 + 1 images, 1 classes") in said["data"]
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


def spoil(root, fault):
    """An image folder of two classes with a fault."""
    parts = ["."] if fault.startswith("tree") else ["train", "test"]
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (9, 9), (90 * label, 40 * number, 9 * len(part))).save(
                    root / part / name / f"{number}.png"
                )
    last = root / parts[-1] / "dog"
    if "missing" in fault or "empty" in fault:
        shutil.rmtree(last)
    if "empty" in fault:
        last.mkdir()
    if "truncated" in fault:
        (last / "2.png").write_bytes((last / "2.png").read_bytes()[:40])
    if "one image" in fault:
        (last / "1.png").unlink()
        (last / "2.png").unlink()
    if "nested" in fault:
        (last / "deep").mkdir()
        for path in last.glob("*.png"):
            path.rename(last / "deep" / path.name)
    if "system" in fault:
        (last / "._0.png").write_bytes(b"no image")
        (root / "__MACOSX").mkdir()
    if "other" in fault:
        (last / "0.png").rename(last / "0.jfif")
    if "extra" in fault:
        shutil.copytree(last, last.with_name("owl"))
    if "Test" in fault:
        (root / "test").rename(root / "Test")
    if "Train" in fault:
        (root / "train").rename(root / "Train")
    if "valid" in fault:
        (root / "test").rename(root / fault.split()[-1])


ACCEPTED = ["none", "one image", "system", "other", "validation", "valid", "tree", "tree system", "tree other"]
REFUSED = ["missing", "empty", "truncated", "nested", "extra", "Test", "Train Test"]
REFUSED += ["tree one image", "tree empty", "tree truncated", "tree nested"]


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("fault", [*ACCEPTED, *REFUSED])
def test_a_folder_passes_if_and_only_if_fit_takes_it(fault, tmp_path, capsys):
    root = tmp_path / "pictures"
    spoil(root, fault)
    try:
        load_images("folder", str(root), 8, cache_dir=str(tmp_path / "cache"))
        refused = None
    except ValueError as error:
        refused = " ".join(str(error).split())
    assert main(["doctor", "--data_root", str(root)]) == (refused is not None)
    ((state, text),) = lines(capsys)["data"]
    assert (state == "ok") == (refused is None)
    assert refused is None or text.startswith(refused)
    assert ("left out 1 file" in text) == ("other" in fault)
    assert (refused is None) == (fault in ACCEPTED)


@pytest.mark.parametrize("kind", ["npz", "folder"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_images_in_both_parts_are_counted(kind, count, tmp_path, capsys):
    images = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4)
    test = images + 100
    test[:count] = images[:count]
    if kind == "npz":
        labels = np.arange(6) % 2
        np.savez(tmp_path / "x.npz", train_images=images, test_images=test, train_labels=labels, test_labels=labels)
    else:
        for part, pixels in (("train", images), ("test", test)):
            (tmp_path / part / "cat").mkdir(parents=True)
            for number, image in enumerate(pixels):
                Image.fromarray(image).save(tmp_path / part / "cat" / f"{part}{number}.png")
    assert main(["doctor", "--data_root", str(tmp_path)]) == 0
    ((_, text),) = lines(capsys)["data"]
    said = f"; test images also in train: {count} (remove them from one part)"
    assert text.endswith(said) if count else "also in train" not in text


def test_a_fault_and_a_warning_make_one_sentence(tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    for number in range(2):
        (tmp_path / "cat" / f"{number}.png").write_bytes(b"no image")
    (tmp_path / "stray.png").write_bytes(b"")
    assert main(["doctor", "--data_root", str(tmp_path)]) == 1
    (text,) = (text for state, text in lines(capsys)["data"] if state == "FAILS")
    assert f"replace or remove it; {tmp_path}: left out 1 file (stray.png)" in text


def test_dark_images_are_pointed_out(tmp_path, capsys):
    labels, images = np.arange(2), np.ones((2, 4, 4), np.uint8)
    np.savez(tmp_path / "x.npz", train_images=images, test_images=images * 0, train_labels=labels, test_labels=labels)
    assert main(["doctor", "--data_root", str(tmp_path)]) == 0
    ((_, text),) = lines(capsys)["data"]
    assert "train images must be in 0..255, got no value above 1" in text and "test images must be" in text


CONFIG = "method: {class_path: FedNCM, init_args: {foundation: {name: test_vit, weights: WEIGHTS, image_size: 32}}}\n"


def test_what_a_configuration_needs_is_made(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG.replace("WEIGHTS", "random") + "data: {dataset: digits}\n")
    assert main(["doctor", "--config", str(file)]) == 0
    said = lines(capsys)
    assert said["config"] == [("ok", f"{file} is valid: FedNCM on digits")]
    assert said["data"] == [("ok", "1,347 + 450 images of 8x8, 10 classes; 3 clients x 3 tasks")]
    assert said["nets"][0][1].endswith(f"test_vit, weights {foundation(FoundationConfig(**tiny.VIT)).fingerprint[:12]}")


def test_what_a_configuration_lacks_comes_with_a_remedy(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG.replace("WEIGHTS", "away.safetensors") + "data: {dataset: gone.npz}\n")
    assert main(["doctor", "--config", str(file), "--data_root", str(tmp_path)]) == 1
    said = lines(capsys)
    assert said["data"] == [
        ("FAILS", f"{tmp_path / 'gone.npz'} is missing: set root to its folder and dataset to its name.")
    ]
    assert said["nets"][0][0] == "FAILS" and "must be a safetensors file" in said["nets"][0][1]
    file.write_text("method: {class_path: FedNCM, init_args: {leraning_rate: 1}}\n")
    assert main(["doctor", "--config", str(file)]) == 1
    assert "leraning_rate is unknown" in lines(capsys)["config"][0][1]


def test_a_wrong_word_is_refused(capsys):
    assert main(["doctor", "--data", "x"]) == 2
    assert "fedlscl doctor [--data_root DIR] [--config FILE ...]" in capsys.readouterr().err


def test_several_files_compose_as_for_fit(tmp_path, capsys):
    """The last file decides, as on the command line of ``fit``."""
    data, method = tmp_path / "data.yaml", tmp_path / "method.yaml"
    data.write_text("data: {dataset: digits, num_tasks: 2}\n")
    method.write_text(CONFIG.replace("WEIGHTS", "random"))
    assert main(["doctor", "--config", str(data), "--config", str(method)]) == 0
    said = lines(capsys)
    assert said["config"] == [("ok", f"{data} + {method} is valid: FedNCM on digits")]
    assert said["data"][0][1].endswith("3 clients x 2 tasks")
