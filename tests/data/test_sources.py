import json
import sys

import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

import tiny
from fedlscl.__main__ import main
from fedlscl.data import Fake, ImageData, ImageSource, SpatialTemporalDataModule, TorchDatasets, load_images

SOURCE = """
import torch
from fedlscl.data import ImageData, ImageSource


class Stripes(ImageSource):
    '''Six classes of stripes.'''

    def __init__(self, width: int = 8, shade: int = 40):
        self.width, self.shade = width, shade

    def load(self):
        labels = torch.arange(6).repeat_interleave(4)
        images = (self.shade * labels + 1).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, self.width)
        return ImageData("stripes", images, labels, images, labels, tuple("abcdef"))
"""
SPLIT = {"num_clients": 2, "num_tasks": 2, "private_classes": 2, "public_classes": 2}


@pytest.fixture
def stripes(tmp_path, monkeypatch):
    """Options of FedAvg, without those of the data set, and a module of a data set beside the working directory."""
    (tmp_path / "my_stripes.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield [*tiny.options("method", tiny.SMALL | tiny.METHOD), *tiny.options("trainer", tiny.TRAINER), "--method=FedAvg"]
    sys.modules.pop("my_stripes", None)


def run(folder, *options):
    assert main(["fit", *options, *tiny.options("data", SPLIT), *tiny.inside(folder)]) == 0
    return folder / "FedAvg" / "version_0"


@pytest.mark.parametrize("form", ["option", "class_path", "file"])
def test_a_data_set_is_added_by_one_class(form, stripes, tmp_path, capsys):
    options = {
        "option": ["--data.dataset", "my_stripes.Stripes", "--data.dataset.width", "6"],
        "class_path": ["--data.dataset.class_path", "my_stripes.Stripes", "--data.dataset.init_args.width=6"],
        "file": ["--config", str(tmp_path / "data.yaml")],
    }[form]
    source = {"class_path": "my_stripes.Stripes", "init_args": {"width": 6}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"dataset": source}}))
    folder = run(tmp_path / "runs", *stripes, *options)
    assert json.loads((folder / "results.json").read_text())["data"]["dataset"] == "Stripes"
    meta = json.loads((folder / "manifest.json").read_text())["meta"]
    assert (meta["dataset"], meta["image_width"], meta["image_rule"]) == ("Stripes", 6, "stored")
    saved = yaml.safe_load((folder / "config.yaml").read_text())["data"]["dataset"]
    assert saved["class_path"] == "my_stripes.Stripes" and saved["init_args"]["width"] == 6
    capsys.readouterr()
    assert main(["test", "--ckpt_path", str(folder)]) == 0
    # Other pixels are another run.
    assert main(["test", "--ckpt_path", str(folder), "--data.dataset.shade", "30"]) == 2
    assert "belongs to another data set or split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--data.dataset my_stripes.Stripes --data.dataset.widht 6", "did you mean data.dataset.width?"),
        ("--data.dataset my_stripes.Stripes --data.dataset.width x", "data.dataset.width must be int, got 'x'."),
        ("--data.dataset my_stripes.Stripes --data.image_size 8", "image_size must be left out for"),
        ("--data.dataset my_stripes.Plain", "dataset must be 'cifar100', "),
    ],
)
def test_errors_name_the_option_of_the_class(options, said, stripes, tmp_path, capsys):
    assert main(["fit", *stripes, *options.split(), *tiny.inside(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_file_name_is_never_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans.py").write_text("open('imported', 'w')")
    assert main(["fit", *tiny.FEDAVG, "--data.dataset", "scans.npz", "--data.image_size", "null"]) == 2
    assert "scans.npz is missing" in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()


def test_an_object_serves_in_python_and_limits_hold_for_it():
    streams = SpatialTemporalDataModule(dataset=Fake(num_classes=6, image_size=8), train_per_class=5, **SPLIT)
    assert streams.dataset == "Fake" and len(streams.data.train_labels) == 30
    named = load_images("fake", image_size=8, fake_classes=6)
    assert load_images(Fake(num_classes=6, image_size=8)).fingerprint == named.fingerprint


class Pictures(Dataset):
    """PIL images and numbers."""

    classes = ("cat", "dog")

    def __init__(self, *sizes, first=0):
        self.items = [(Image.new("L", size, 40 * n + 9), (n + first) % 2) for n, size in enumerate(sizes)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_two_datasets_of_pil_images_become_a_data_set():
    source = TorchDatasets(Pictures((6, 5), (6, 5)), Pictures((6, 5), (6, 5), first=1), title="pets")
    data = SpatialTemporalDataModule(dataset=source, num_clients=1, num_tasks=1, private_classes=2, public_classes=0)
    assert data.dataset == data.data.name == "pets" and data.class_names == ("cat", "dog")
    assert data.data.train_images.shape == (2, 3, 5, 6) and not data.data.is_cropped
    assert data.data.train_images[:, 2, 0, 0].tolist() == [9, 49] and data.data.test_labels.tolist() == [1, 0]
    cropped = TorchDatasets(Pictures((6, 5), (7, 9)), Pictures((6, 5), (6, 4)), image_size=4).load()
    assert cropped.train_images.shape == (2, 3, 4, 4) and cropped.is_cropped and cropped.name == "Pictures"


def test_a_torchvision_dataset_is_named_in_a_file(stripes, tmp_path):
    for part in ("train", "test"):
        for label in range(6):
            (tmp_path / part / f"k{label}").mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (9, 9), (40 * label + number, 0, 90)).save(tmp_path / part / f"k{label}/{number}.png")
    parts = {
        part: {"class_path": "torchvision.datasets.ImageFolder", "init_args": {"root": str(tmp_path / part)}}
        for part in ("train", "test")
    }
    source = {"class_path": "TorchDatasets", "init_args": parts}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"dataset": source}}))
    folder = run(tmp_path / "runs", *stripes, "--config", str(tmp_path / "data.yaml"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["meta"]["dataset"] == "ImageFolder" and manifest["class_names"][5] == "k5"
    source = TorchDatasets(ImageFolder(str(tmp_path / "train")), ImageFolder(str(tmp_path / "test")))
    assert manifest["fingerprint"] == source.load().fingerprint


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([(torch.zeros(3, 4, 4), 0)], "image 0 of train must be a PIL image or a uint8 tensor .*, got torch.float32"),
        ([(torch.zeros(2, 4, 4, dtype=torch.uint8), 0)], r"got torch.uint8 \(2, 4, 4\): leave out transforms"),
        (["ab"], "got str"),
        (Pictures((6, 5), (7, 5)), r"train images of 'Pictures' must have one size, got \(5, 6\) and \(5, 7\)"),
        (Pictures(), "must have one size, got none"),
    ],
)
def test_datasets_of_another_kind_are_refused(train, message):
    with pytest.raises(ValueError, match=message):
        TorchDatasets(train, train).load()


def test_a_source_that_returns_something_else_is_named():
    class Wrong(ImageSource):
        def load(self):
            return {"images": []}

    with pytest.raises(ValueError, match=r"Wrong.load must return ImageData, got dict"):
        load_images(Wrong())
    assert not isinstance(Wrong().load(), ImageData)
