import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fedlscl.data import load_images
from fedlscl.data.images import find_images


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
        (
            {"a": 3, "b": 1},
            r"tree/b must hold 2 or more images \(.bmp, .*\), got 1: add images, or remove the class",
        ),
        ({"train/a": 2}, "has train but neither test nor val"),
        ({"train/a": 2, "test/a": 1, "test/b": 1}, "test/b has no counterpart in .*train"),
        ({"train/a": 2, "train/b": 2, "test/a": 1}, "test/b is missing: add it, or remove the class from train"),
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
    with pytest.raises(ValueError, match="must have the 200 class folders of ImageNet-R, got 199"):
        load(root, dataset="imagenet-r")
    save_images({"imagenet-r/n99999999": 2}, size=(4, 4))
    data = load(root, dataset="imagenet-r")
    assert data.name == "imagenet-r" and data.num_classes == 200
    assert len(data.train_images) == len(data.test_images) == 200
    assert load(root / "imagenet-r", dataset="imagenet-r").fingerprint == data.fingerprint


ENDINGS = r"images end in .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp"
SYSTEM = [
    "__MACOSX",
    "@eaDir",
    "lost+found",
    ".thumbs",
    ".ipynb_checkpoints",
    "$RECYCLE.BIN",
    "System Volume Information",
]


@pytest.mark.parametrize("counts", [{"a": 3, "b": 3}, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1}])
def test_what_a_system_adds_is_skipped_by_fit_and_predict_alike(save_images, load, counts):
    root = save_images(counts)
    before, images = load(root), find_images(root)
    assert images == sorted(root.rglob("*.png"))
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in SYSTEM:
            (folder / name).mkdir()
            (folder / name / "0.png").write_bytes(b"no image")
        for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"no image")
    with warnings.catch_warnings(action="error"):
        after, again = load(root), find_images(root)
    assert after.fingerprint == before.fingerprint and after.class_names == before.class_names
    assert again == images


def test_find_images_reads_linked_folders_once(save_images):
    root = save_images({"a": 2, "b/deep": 1})
    (root / "b" / "loop").symlink_to(root)
    (root / "c").symlink_to(root / "b")
    (root.parent / "elsewhere").mkdir()
    (root / "a" / "0.png").rename(root.parent / "elsewhere" / "9.PNG")
    (root / "d").symlink_to(root.parent / "elsewhere")
    assert [path.relative_to(root).as_posix() for path in find_images(root)] == ["a/1.png", "b/deep/0.png", "d/9.PNG"]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["b/x.heic"], r"1 file \(b/x.heic\)"),
        (["a/1.jfif", "a/2.jfif", "b/1.pgm", "b/2.ppm"], r"4 files \(a/1.jfif, a/2.jfif, b/1.pgm, ...\)"),
        (["b/more/deep.png"], r"1 folder \(b/more/\)"),
        (["b/more/deep.png", "b/png"], r"1 file and 1 folder \(b/more/, b/png\)"),
        (["beside.png"], r"1 file \(beside.png\)"),
    ],
)
def test_what_is_left_out_is_counted_and_named_in_one_line(save_images, load, extra, said):
    root = save_images({"a": 3, "b": 3})
    before = load(root).fingerprint
    for name in extra:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes((root / "a" / "0.png").read_bytes())
    with pytest.warns(UserWarning, match=rf"tree: left out {said}; {ENDINGS} and lie directly") as caught:
        assert load(root).fingerprint == before
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


@pytest.mark.parametrize("part", ["valid", "validation"])
def test_other_names_of_the_test_part_are_accepted(save_images, load, part):
    data = load(save_images({"train/a": 2, f"{part}/a": 1}))
    assert data.train_images[:, 0, 0, 0].tolist() == [0, 1] and data.test_images[:, 0, 0, 0].tolist() == [20]


def test_a_part_that_is_not_used_is_named(save_images, load):
    root = save_images({"train/a": 2, "test/a": 1, "val/a": 1})
    with pytest.warns(UserWarning, match=r"left out 1 folder \(val/\)"):
        load(root)


def test_a_class_may_be_called_train(save_images, load):
    data = load(save_images({"bus": 5, "train": 5, "valve": 5}))
    assert data.class_names == ("bus", "train", "valve") and len(data.train_images) == 12


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"Train/a": 2, "Test/a": 1}, "tree/Test must hold 2 or more images .* beside 1 folder .*: did you mean test"),
        ({"Training/a": 2, "Testing/a": 1}, "did you mean test. rename it"),
        ({"TRAIN/a": 2}, "did you mean train. rename it"),
        ({"train_images/a": 2, "val_images/a": 1}, "did you mean train. rename it"),
        ({"train/a": 2, "Test/a": 1}, "neither test nor val: did you mean test. rename Test"),
        ({"train/a": 2, "testing/a": 1}, "neither test nor val: did you mean test. rename testing"),
        ({"train": 3, "test": 3}, "train has 3 images but no folder: put one folder of images per class into it"),
        ({"train": 3, "Val": 3, "a": 3}, "neither test nor val: did you mean val. rename Val"),
        ({"Train": 3, "Test": 3}, "must hold one folder of images per class, got Test, Train: name these folders"),
        ({"a/deep": 3, "b": 3}, r"tree/a must hold .*, got 0 beside 1 folder \(deep/\): add images, or remove"),
    ],
)
def test_parts_that_are_named_or_nested_in_another_way_are_pointed_out(save_images, load, counts, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(save_images(counts))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["heic", "ppm", "jfif", "npy"])
def test_a_class_of_other_files_says_which_endings_count(save_images, load, suffix):
    root = save_images({"a": 3, "b": 3})
    for path in list((root / "b").iterdir()):
        path.rename(path.with_suffix(f".{suffix}"))
    said = rf"b must hold 2 or more images \(.bmp, .*\), got 0 beside 3 files \(0.{suffix}, 1.{suffix}, 2.{suffix}\)"
    with pytest.raises(ValueError, match=said):
        load(root)
