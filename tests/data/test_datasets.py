import sys
import warnings

import numpy as np
import pytest
import torch

from fedlscl.data import load_images


def test_digits_are_kept_at_8_pixels_in_the_full_range():
    data = load_images("digits")
    assert data.train_images.shape[1:] == data.test_images.shape[1:] == (3, 8, 8)
    assert len(data.train_images) + len(data.test_images) == 1797
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.min() == 0 and data.train_images.max() == 255
    assert torch.equal(data.train_images[:, 0], data.train_images[:, 2])
    counts = data.train_labels.bincount(), data.test_labels.bincount()
    assert ((counts[0] / (counts[0] + counts[1]) - 0.75).abs() < 0.01).all()


def test_digits_show_their_label():
    data = load_images("digits")
    means = torch.stack([data.train_images[data.train_labels == n].float().mean(0) for n in range(10)]).flatten(1)
    nearest = torch.cdist(data.test_images.float().flatten(1), means).argmin(1)
    assert (nearest == data.test_labels).float().mean() > 0.85


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install fedlscl\[digits\]"):
        load_images("digits")


def test_fake_is_learnable_and_made_to_measure():
    data = load_images("fake", fake_classes=7, train_per_class=5, test_per_class=3, image_size=16)
    assert data.train_images.shape == (35, 3, 16, 16) and data.test_images.shape == (21, 3, 16, 16)
    means = torch.stack([data.train_images[data.train_labels == n].float().mean(0) for n in range(7)]).flatten(1)
    nearest = torch.cdist(data.test_images.float().flatten(1), means).argmin(1)
    assert torch.equal(nearest, data.test_labels)
    assert (
        data.fingerprint
        == load_images("fake", fake_classes=7, train_per_class=5, test_per_class=3, image_size=16).fingerprint
    )


def test_fetch_mixes_train_and_test_in_the_order_asked():
    data = load_images("fake", fake_classes=3, train_per_class=2, test_per_class=1)
    ids = torch.tensor([7, 0, 6, 5])  # 0..5 are train, 6..8 test
    batch = data.fetch(ids)
    assert torch.equal(batch.images[0], data.test_images[1])
    assert torch.equal(batch.images[3], data.train_images[5])
    assert batch.labels.tolist() == [1, 0, 0, 2]
    assert torch.equal(batch.ids, ids) and batch.prefix is None
    for some in (ids[:0], ids[[1, 3]], ids[[0, 2]]):
        assert torch.equal(data.fetch(some).images, torch.cat([data.train_images, data.test_images])[some])


def test_fingerprint_sees_labels_pixels_and_caps():
    data = load_images("fake", fake_classes=3)
    fingerprints = {data.fingerprint, data.capped(5, None, 0).fingerprint, data.capped(None, 5, 0).fingerprint}
    fingerprints.add(load_images("fake", fake_classes=3, seed=1).fingerprint)
    assert len(fingerprints) == 4
    assert data.capped(20, 10, 0) is data


def test_cifar_keeps_images_labels_and_names_as_torchvision_has_them(monkeypatch, tmp_path):
    class StoredCifar:
        classes = ("apple", "bear")

        def __init__(self, root, train, download=False):
            assert root == str(tmp_path)
            self.data = np.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).astype(np.uint8) + (0 if train else 1)
            self.targets = [1, 0] if train else [0, 1]

    monkeypatch.setattr("torchvision.datasets.CIFAR100", StoredCifar)
    data = load_images("cifar100", str(tmp_path))
    assert data.class_names == ("apple", "bear")
    assert data.train_labels.tolist() == [1, 0] and data.test_labels.tolist() == [0, 1]
    assert data.train_images[0, :, 0, 1].tolist() == [3, 4, 5]  # row 0, column 1
    assert torch.equal(data.test_images, data.train_images + 1)


def test_missing_cifar_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"root must hold cifar100, undamaged, got .*: set download=true") as caught:
        load_images("cifar100", str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "imagenet"}, "dataset must be 'cifar100', 'imagenet-r', .*, got 'imagenet'"),
        ({"dataset": "cifar100"}, "root must be the folder of data set 'cifar100', got None: set root"),
        ({"dataset": "folder", "root": ""}, "root must be the folder of data set 'folder', got '': set root"),
        ({"dataset": "folder", "root": __file__}, "image folder .*test_datasets.py is a file: set root to a folder"),
        (
            {"dataset": "digits", "image_size": 32},
            "image_size must be left out for 'digits', got 32: its images are kept as stored",
        ),
        ({"dataset": "fake", "seed": -1}, "seed must be >= 0, got -1"),
        ({"dataset": "fake", "fake_classes": 10**9}, "fake images must take at most 2,147,483,648 bytes, got"),
        ({"dataset": "fake", "train_per_class": 10**9}, "fake images must take at most 2,147,483,648 bytes, got"),
        ({"dataset": "fake", "image_size": 4096}, "fake images must take at most 2,147,483,648 bytes, got"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        load_images(**options)


@pytest.mark.parametrize("dataset", ["fake", "digits", "folder", "imagenet-r", "cifar100", "x.npz"])
@pytest.mark.parametrize("name", ["image_size", "train_per_class", "test_per_class", "fake_classes"])
@pytest.mark.parametrize("value", [0, -5, 1.5, float("nan"), True])
def test_a_number_that_no_data_set_can_have_is_refused_before_anything_is_read(dataset, name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} must be (an integer )?(>= 1|from 1 to 4096), got {value}\."):
        load_images(dataset, str(tmp_path), **{name: value})


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_in_0_to_1_are_pointed_out(part, save_npz):
    grey = {"train_images": np.full((4, 5, 6), 2, np.uint8), "test_images": np.full((2, 5, 6), 2, np.uint8)}
    dark = {f"{part}_images": grey[f"{part}_images"] // 2}
    path = save_npz(**grey | dark)
    with pytest.warns(UserWarning, match=rf"'small.npz': {part} images must be in 0..255, got no value above 1"):
        load_images(path.name, str(path.parent))
    with warnings.catch_warnings(action="error"):
        load_images(save_npz(**grey).name, str(path.parent))


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a "), ("caf\u00e9", "cafe\u0301"), ("a", "b", "a"), ("", " ")])
def test_class_names_that_read_alike_are_refused(names, save_npz):
    labels, images = np.arange(len(names)), np.zeros((len(names), 5, 6), np.uint8)
    parts = {
        f"{part}_{kind}": value
        for part in ("train", "test")
        for kind, value in (("labels", labels), ("images", images))
    }
    path = save_npz(**parts, class_names=np.array(names))
    with pytest.raises(ValueError, match=r"class_names of 'small.npz' must be different, got '.*' twice: rename one"):
        load_images(path.name, str(path.parent))
