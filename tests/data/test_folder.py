import numpy as np
import pytest
import torch
from PIL import Image

from fedlscl.data import load_images


@pytest.fixture
def load(tmp_path):
    def load(root, dataset="folder", **options):
        return load_images(dataset, str(root), cache_dir=str(tmp_path / "cache"), **({"image_size": 4} | options))

    return load


def test_single_tree_is_split_80_20_per_class(save_images, load):
    data = load(save_images({"dog": 10, "cat": 5, ".hidden": 3}))
    assert data.class_names == ("cat", "dog")
    assert data.train_labels.bincount().tolist() == [4, 8]
    assert data.test_labels.bincount().tolist() == [1, 2]
    # dog is the first folder of the fixture, with greys 0..9; cat has 20..24.
    greys = torch.cat([data.train_images, data.test_images])[:, 0, 0, 0]
    assert sorted(greys.tolist()) == [*range(10), *range(20, 25)]
    labels = torch.cat([data.train_labels, data.test_labels])
    assert torch.equal(labels == 0, greys >= 20)


@pytest.mark.parametrize("part", ["test", "val"])
def test_stored_parts_are_used(save_images, load, part):
    data = load(save_images({"train/a": 2, "train/b": 3, f"{part}/a": 1, f"{part}/b": 1}))
    assert data.train_images[:, 0, 0, 0].tolist() == [0, 1, 20, 21, 22]
    assert data.test_images[:, 0, 0, 0].tolist() == [40, 60]
    assert data.test_labels.tolist() == [0, 1]


def test_shorter_side_is_resized_and_the_centre_kept(tmp_path, load):
    # Three columns of width 8: the centre crop of a 24 x 8 image is the middle one.
    image = Image.fromarray(np.repeat(np.array([[10, 128, 250]], np.uint8), 8, axis=0).repeat(8, axis=1)).convert("RGB")
    for index in range(2):
        (tmp_path / "tree" / "a").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "tree" / "a" / f"{index}.png")
    data = load(tmp_path / "tree", image_size=8)
    assert data.train_images.shape == (1, 3, 8, 8)
    assert (data.train_images == 128).all()
    assert load(tmp_path / "tree", image_size=None).train_images.shape == (1, 3, 224, 224)


def test_images_are_decoded_once_until_a_file_changes(save_images, load, tmp_path, monkeypatch):
    root = save_images({"a": 4, "b": 4})
    first = load(root)
    cached = sorted((tmp_path / "cache").iterdir())
    assert len(cached) == 2 and all(path.suffix == ".npy" for path in cached)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        again = load(root)
    assert torch.equal(first.train_images, again.train_images)
    assert first.fingerprint == again.fingerprint

    again.train_images.zero_()
    assert torch.equal(load(root).train_images, first.train_images)

    for path in (root / "a").iterdir():
        Image.new("RGB", (30, 30), (255, 255, 255)).save(path)
    assert (load(root).train_images[:3] == 255).all()


def test_caps_choose_before_decoding(save_images, load):
    root = save_images({"a": 10, "b": 10})
    data = load(root, train_per_class=3, test_per_class=1)
    assert data.train_labels.tolist() == [0] * 3 + [1] * 3
    assert data.test_labels.tolist() == [0, 1]
    whole = load(root).train_images[:, 0, 0, 0].tolist()
    assert set(data.train_images[:, 0, 0, 0].tolist()) <= set(whole)


def test_a_corrupt_image_is_named_and_leaves_no_cache(save_images, load, tmp_path):
    root = save_images({"a": 6, "b": 6})
    broken = root / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"image .*b/3.png cannot be read \(.*\): replace or remove it") as caught:
        load(root)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".npy"]


def test_a_full_disk_is_noticed_before_writing(save_images, load, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match=r"cache_dir .* has 0.0 GB free, but 3 images need"):
        load(save_images({"a": 4}))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "tree is missing: set root"),
        ({"a": 3, "b": 1}, "tree/b is missing or has 1 images: add at least 2"),
        ({"train/a": 2}, "has train but neither test nor val"),
        ({"train/a": 2, "test/a": 1, "test/b": 1}, "test/b has no counterpart in .*train"),
        ({"train/a": 2, "train/b": 2, "test/a": 1}, "test/b is missing or has 0 images"),
        ({"train/.a": 1}, "train but neither"),
        ({".a": 1}, "tree is empty: put one folder"),
    ],
)
def test_incomplete_trees_are_named_in_one_line(save_images, load, counts, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(save_images(counts))
    assert "\n" not in str(caught.value)


def test_imagenet_r_needs_its_200_classes(save_images, load):
    root = save_images({f"imagenet-r/n{label:08d}": 2 for label in range(199)}, size=(4, 4))
    with pytest.raises(ValueError, match="has 199 class folders, but ImageNet-R has 200"):
        load(root, dataset="imagenet-r")
    save_images({"imagenet-r/n99999999": 2}, size=(4, 4))
    data = load(root, dataset="imagenet-r")
    assert data.name == "imagenet-r" and data.num_classes == 200
    assert len(data.train_images) == len(data.test_images) == 200
    assert load(root / "imagenet-r", dataset="imagenet-r").fingerprint == data.fingerprint
