import csv
import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

import tiny
from fedlscl.__main__ import main
from fedlscl.cli.commands import Predictor
from fedlscl.data import load_images
from fedlscl.data.split import read_manifest, save_manifest
from fedlscl.federated.checkpoint import load_last_good, save_checkpoint

SPLIT = {"num_clients": 2, "num_tasks": 1, "private_classes": 2, "public_classes": 2}
LEARN = {"local_epochs": 2, "batch_size": 8}


def pictures(height, width, per_class):
    """Six classes of pictures that differ at the left or upper border only, and their labels."""
    random, labels = np.random.default_rng(per_class), np.repeat(np.arange(6), per_class)
    images = random.normal(128, 8, (len(labels), height, width, 3))
    colours = np.array([[f >> 2 & 1, f >> 1 & 1, f & 1] for f in range(1, 7)]) * 255
    images[:, : height if width > height else 8, : 8 if width > height else width] = colours[labels][:, None, None]
    return np.clip(images, 0, 255).astype(np.uint8), labels


def make_npz(root, height, width):
    (train, train_labels), (test, test_labels) = pictures(height, width, 8), pictures(height, width, 4)
    names = np.array([f"k{label}" for label in range(6)])
    arrays = {"train_images": train, "train_labels": train_labels, "test_images": test, "test_labels": test_labels}
    np.savez(root / "small.npz", **arrays, class_names=names)
    return {"dataset": "small.npz", "root": str(root)}


def make_folder(root, height, width):
    for part, per_class in (("train", 8), ("test", 4)):
        for index, (image, label) in enumerate(zip(*pictures(height, width, per_class), strict=True)):
            (root / f"photos/{part}/k{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / f"photos/{part}/k{label}/{index:03}.png")
    return {"dataset": "folder", "root": str(root / "photos"), "image_size": 16, "cache_dir": str(root / "cache")}


def make_digits(root, height, width):
    return {"dataset": "digits", "train_per_class": 8, "test_per_class": 4}


def make_fake(root, height, width):
    return {"dataset": "fake", "fake_classes": 6, "image_size": 20, "train_per_class": 8, "test_per_class": 4}


KINDS = [
    (make_npz, 16, 16),
    (make_npz, 16, 48),
    (make_npz, 48, 16),
    (make_npz, 17, 31),
    (make_folder, 16, 48),
    (make_folder, 48, 16),
    (make_digits, 8, 8),
    (make_fake, 20, 20),
]


def fit(data, folder):
    """The run directory of FedAvg on this data set."""
    options = tiny.options("data", SPLIT | data) + tiny.options("method", tiny.SMALL | LEARN)
    assert (
        main(["fit", "--method", "FedAvg", *tiny.options("trainer", tiny.TRAINER), *options, *tiny.inside(folder)]) == 0
    )
    return folder / "FedAvg/version_0"


@pytest.mark.parametrize(("make", "height", "width"), KINDS)
def test_predict_on_the_test_images_is_test(make, height, width, tmp_path, monkeypatch, capsys, caplog):
    """Files as stored, and the data set's images saved as PNG: the same bits reach the net as in `test`."""
    data = make(tmp_path, height, width)
    run = fit(data, tmp_path)
    capsys.readouterr()
    assert main(["test", "--ckpt_path", str(run)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = {int(row[1]): float(row[2]) for row in rows if row and row[0] == "class-IL" and row[1] != "mean"}

    stored = load_images(**data)
    for index, (image, label) in enumerate(zip(stored.test_images, stored.test_labels, strict=True)):
        of_class = tmp_path / "png" / stored.class_names[int(label)]
        of_class.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(of_class / f"{index:03}.png")
    seen_by_the_net = []
    original = Predictor.probabilities

    def probabilities(self, images):
        seen_by_the_net.append(images)
        return original(self, images)

    monkeypatch.setattr(Predictor, "probabilities", probabilities)
    manifest = json.loads((run / "manifest.json").read_text())
    for folder in ("png", "photos/test") if make is make_folder else ("png",):
        for client in range(2):
            seen_by_the_net.clear()
            out = tmp_path / "out.csv"
            asked = ["--images", tmp_path / folder, "--client", client, "--top", 1, "--out", out]
            assert main(["predict", "--ckpt_path", str(run), *map(str, asked)]) == 0
            order = [path.stem for path in sorted((tmp_path / folder).rglob("*.png"))]
            if folder == "png":
                found = np.concatenate([images.numpy() for images in seen_by_the_net])
                assert (found == stored.test_images[[int(stem) for stem in order]].numpy()).all()
            (classes,) = [task["classes"] for task in manifest["clients"][client]]
            names = {manifest["class_names"][label] for label in classes}
            answers = [(row["image"].split("/")[-2], row["class"]) for row in csv.DictReader(out.open())]
            right = [truth == answer for truth, answer in answers if truth in names]
            assert round(100 * np.mean(right), 1) == expected[client]
    assert not caplog.records


def test_images_of_another_aspect_ratio_are_counted_in_one_line(tmp_path, capsys, caplog):
    """Nothing is known about how the arrays of an .npz were made; of folders it is."""
    for make in (make_npz, make_folder):
        (tmp_path / "images").mkdir(exist_ok=True)
        for index, size in enumerate([(48, 16), (96, 32), (33, 16), (30, 30)]):
            Image.new("RGB", size).save(tmp_path / f"images/{index}.png")
        data = make(tmp_path, 16, 48)
        run = str(fit(data, tmp_path / make.__name__))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert main(["predict", "--ckpt_path", run, "--images", str(tmp_path / "images")]) == 0
        said = [record.getMessage() for record in caplog.records]
        if make is make_npz:
            assert len(said) == 1 and said[0].startswith("2 of 4 images do not have the data set's aspect ratio")
        else:
            assert said == []


def test_a_manifest_that_does_not_say_how_images_were_prepared_is_refused(tmp_path, capsys):
    file = fit(make_npz(tmp_path, 16, 48), tmp_path) / "manifest.json"
    old = read_manifest(file)
    meta = {name: value for name, value in old.meta.items() if not name.startswith("image_")} | {"image_size": 16}
    save_manifest(file, old.splits, old.class_names, old.fingerprint, meta)
    Image.new("RGB", (48, 16)).save(tmp_path / "x.png")
    capsys.readouterr()
    assert main(["predict", "--ckpt_path", str(tmp_path), "--images", str(tmp_path / "x.png")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "must record image_height" in printed.err.splitlines()[-1]


@pytest.fixture(scope="module")
def with_readouts(tmp_path_factory):
    """A run with readouts of two kinds of features, and the test images as PNG in folders of their classes."""
    folder = tmp_path_factory.mktemp("readouts")
    data = make_fake(folder, 20, 20)
    asked = {"readouts.heads": "[lda, ncm]", "readouts.features": "[adapted, frozen+small]"}
    assert main(["fit", *tiny.FEDLSCL, *tiny.options("data", SPLIT | data), *tiny.options("trainer", asked),
                 *tiny.inside(folder)]) == 0  # fmt: skip
    stored = load_images(**data)
    for index, (image, label) in enumerate(zip(stored.test_images, stored.test_labels, strict=True)):
        of_class = folder / "png" / stored.class_names[int(label)]
        of_class.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(of_class / f"{index:03}.png")
    return folder / "FedLSCL/version_0", folder / "png"


@pytest.mark.parametrize("readout", ["adapted/lda", "adapted/ncm", "frozen+small/lda", "frozen+small/ncm"])
def test_predict_with_a_readout_has_the_accuracy_of_the_run(readout, with_readouts, tmp_path):
    """Every fake image of a class is for all clients that have the class, so each client's test set is known."""
    run, png = with_readouts
    results = json.loads((run / "results.json").read_text())
    manifest = read_manifest(run / "manifest.json")
    expected = results["readouts"][readout]["class_il"]
    for client, split in enumerate(manifest.splits):
        out = tmp_path / "out.csv"
        asked = ["--images", png, "--client", client, "--top", 1, "--out", out, "--readout", readout]
        assert main(["predict", "--ckpt_path", str(run), *map(str, asked)]) == 0
        own = {int(index) - len_train(manifest) for index in split.test[0]}
        answers = {int(row["image"].split("/")[-1][:3]): row for row in csv.DictReader(out.open())}
        right = [answers[index]["class"] == answers[index]["image"].split("/")[-2] for index in sorted(own)]
        assert np.mean(right) == expected[client][0][0]


def len_train(manifest):
    """Positions of test images continue those of training images."""
    return min(int(split.test[0].min()) for split in manifest.splits)


@pytest.mark.parametrize("readout", ["adapted/ridge", "small/lda", "", "lda"])
def test_a_readout_that_the_run_does_not_have_is_refused(readout, with_readouts, capsys):
    run, png = with_readouts
    assert main(["predict", "--ckpt_path", str(run), "--images", str(png), "--readout", readout]) == 2
    known = "own, adapted/lda, adapted/ncm, frozen+small/lda, frozen+small/ncm"
    assert f"readout must be one of {known}, got {readout!r}." in capsys.readouterr().err


def test_a_run_without_readouts_names_the_option_that_makes_them(tmp_path, capsys):
    run = fit(make_fake(tmp_path, 20, 20), tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    asked = ["--images", str(tmp_path / "x.png"), "--readout", "adapted/lda"]
    assert main(["predict", "--ckpt_path", str(run), *asked]) == 2
    error = capsys.readouterr().err
    assert "readout must be one of own, got 'adapted/lda': train with --trainer.readouts.heads" in error


def test_a_readout_is_not_of_a_task_that_has_only_begun(with_readouts, tmp_path, capsys):
    """Its head knows neither the classes nor the features of that task."""
    run, png = with_readouts
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint.pt"
    state = load_last_good(file)
    save_checkpoint(file, {**state, "progress": [1, 1]})
    asked = ["predict", "--ckpt_path", str(tmp_path / "run"), "--images", str(png), "--readout"]
    assert main([*asked, "adapted/lda"]) == 2
    assert "readout must be own while task 2 is not finished, got 'adapted/lda'" in capsys.readouterr().err
    assert main([*asked, "own"]) == 0


def test_a_run_chosen_on_validation_images_is_tested_on_test_images(tmp_path, capsys):
    options = {"validation_per_class": 2, "evaluate_on": "validation"}
    assert main(["fit", *tiny.FEDAVG, *tiny.options("data", options), *tiny.inside(tmp_path)]) == 0
    run, found = str(tmp_path / "FedAvg/version_0"), []
    for images in ("validation", "test"):
        capsys.readouterr()
        assert main(["test", "--ckpt_path", run, "--data.evaluate_on", images]) == 0
        first, *rest = capsys.readouterr().out.splitlines()
        assert f"accuracy on {images} images in percent" in first
        found.append(rest)
    assert found[0] != found[1]
    resumed = ["fit", *tiny.FEDAVG, "--data.validation_per_class", "2", *tiny.inside(tmp_path), "--ckpt_path", run]
    assert main(resumed) == 2
