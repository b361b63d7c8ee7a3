import json

import numpy as np
import pytest

from fedlscl.data import load_manifest, save_manifest, spatial_temporal_split
from fedlscl.data.manifest import preparation, read_manifest


@pytest.fixture
def splits():
    labels = np.repeat(np.arange(8), 6)
    kwargs = {"num_clients": 3, "num_tasks": 2, "private_classes": 2, "public_classes": 2}
    return spatial_temporal_split(labels, labels, **kwargs, seed=7)


@pytest.fixture
def saved(tmp_path, splits):
    path = tmp_path / "new" / "split.json"
    save_manifest(path, splits, [f"class{n}" for n in range(8)], "abc", {"seed": 7})
    return path


def test_round_trip_gives_the_same_split(saved, splits):
    for loaded, original in zip(load_manifest(saved, "abc"), splits, strict=True):
        assert loaded.classes == original.classes
        for a, b in zip(loaded.train + loaded.test, original.train + original.test, strict=True):
            assert a.dtype == b.dtype == np.int64
            assert (a == b).all()


def test_saving_leaves_one_file_and_replaces_it_whole(saved, splits):
    before = saved.read_bytes()
    save_manifest(saved, splits[:1], ["a"], "abc", {})
    assert [path.name for path in saved.parent.iterdir()] == ["split.json"]
    assert saved.read_bytes() != before


def test_layout_does_not_count(saved):
    saved.write_text(json.dumps(json.loads(saved.read_text()), indent=2))
    assert len(load_manifest(saved, "abc")) == 3


def move_a_sample(content):
    content["clients"][0][0]["train"][0] += 1


def rename_a_class(content):
    content["class_names"][0] = "other"


def raise_the_format(content):
    content["format"] = 2


def drop_the_hash(content):
    del content["sha256"]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (move_a_sample, "was changed"),
        (rename_a_class, "was changed"),
        (raise_the_format, "has format 2, this version reads 1"),
        (drop_the_hash, "is not a split manifest"),
    ],
)
def test_changes_are_noticed(saved, tamper, message):
    content = json.loads(saved.read_text())
    tamper(content)
    saved.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_manifest(saved, "abc")


def test_another_data_set_is_refused(saved):
    with pytest.raises(ValueError, match="fingerprint abc, this one has xyz"):
        load_manifest(saved, "xyz")


@pytest.mark.parametrize("text", ["", "[1]", "{}", "\x00"])
def test_other_files_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ValueError, match="is not a split manifest") as caught:
        load_manifest(tmp_path / "m.json", "abc")
    assert "\n" not in str(caught.value)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.json cannot be read"):
        load_manifest(tmp_path / "none.json", "abc")


NEW = {"dataset": "a.npz", "image_height": 16, "image_width": 48, "image_rule": "stored"}


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (NEW, (16, 48, False)),
        (NEW | {"dataset": "folder", "image_rule": "crop"}, (16, 48, True)),
        ({"dataset": "folder", "image_size": 32}, (32, 32, True)),
        ({"dataset": "imagenet-r", "image_size": 224}, (224, 224, True)),
        ({"dataset": "digits", "image_size": 8}, (8, 8, False)),
        ({"dataset": "cifar100", "image_size": 32}, (32, 32, False)),
        ({"dataset": "a.npz", "image_size": 16}, None),
        ({"dataset": "digits"}, None),
        ({"image_size": 16}, None),
        ({}, None),
        (NEW | {"image_rule": "other"}, None),
        (NEW | {"image_height": 0}, None),
        (NEW | {"image_width": "48"}, None),
        ({name: value for name, value in NEW.items() if name != "image_width"}, None),
    ],
)
def test_the_preparation_of_images_is_read_or_refused(tmp_path, splits, meta, expected):
    save_manifest(tmp_path / "m.json", splits, ["a"], "abc", meta)
    manifest = read_manifest(tmp_path / "m.json")
    if expected is None:
        with pytest.raises(ValueError, match=r"the manifest must record image_height, .*: save it again") as error:
            preparation(manifest)
        assert "\n" not in str(error.value)
    else:
        assert preparation(manifest) == expected
