import json

import numpy as np
import pytest

from fedlscl.data import load_manifest, save_manifest, spatial_temporal_split
from fedlscl.data.split import preparation, read_manifest


@pytest.fixture
def splits():
    labels = np.repeat(np.arange(8), 6)
    kwargs = {"num_clients": 3, "num_tasks": 2, "private_classes": 2, "public_classes": 2}
    return spatial_temporal_split(labels, labels, **kwargs, seed=7)


NAMES = [f"class{n}" for n in range(8)]


@pytest.fixture
def saved(tmp_path, splits):
    path = tmp_path / "new" / "split.json"
    save_manifest(path, splits, NAMES, "abc", {"seed": 7})
    return path


def test_round_trip_gives_the_same_split(saved, splits):
    for loaded, original in zip(load_manifest(saved, "abc", NAMES), splits, strict=True):
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
    assert len(load_manifest(saved, "abc", NAMES)) == 3


def move_a_sample(content):
    content["clients"][0][0]["train"][0] += 1


def rename_a_class(content):
    content["class_names"][0] = "other"


def raise_the_format(content):
    content["format"] = 3


def drop_the_hash(content):
    del content["sha256"]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (move_a_sample, "was changed"),
        (rename_a_class, "was changed"),
        (raise_the_format, "must have format 2, got 3: draw and save the split again"),
        (drop_the_hash, "is not a split manifest"),
    ],
)
def test_changes_are_noticed(saved, tamper, message):
    content = json.loads(saved.read_text())
    tamper(content)
    saved.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_manifest(saved, "abc", NAMES)


def test_a_manifest_of_the_first_format_is_refused_with_the_remedy(saved):
    content = json.loads(saved.read_text()) | {"format": 1}
    saved.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must have format 2, got 1: draw and save the split again") as caught:
        load_manifest(saved, "abc", NAMES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NAMES[::-1], "must name class 0 'class7' as the data set does, got 'class0'"),
        ([*NAMES[:7], "melanoma"], "must name class 7 'melanoma' as the data set does, got 'class7'"),
        ([*NAMES[:7], "Class7"], "must name class 7 'Class7'"),
        (NAMES[:7], "must name class 7 None as the data set does, got 'class7'"),
        ([*NAMES, "class8"], "must name class 8 'class8' as the data set does, got None"),
    ],
)
def test_other_class_names_are_refused(saved, names, message):
    with pytest.raises(ValueError, match=message):
        load_manifest(saved, "abc", names)


def test_white_space_and_unicode_form_do_not_make_another_name(tmp_path, splits):
    save_manifest(tmp_path / "m.json", splits, ["\u00e9cran", "b"], "abc", {})
    assert len(load_manifest(tmp_path / "m.json", "abc", ["e\u0301cran", "b "])) == 3


def test_another_data_set_is_refused(saved):
    with pytest.raises(ValueError, match="fingerprint abc, this one has xyz"):
        load_manifest(saved, "xyz", NAMES)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "\x00"])
def test_other_files_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ValueError, match="is not a split manifest") as caught:
        load_manifest(tmp_path / "m.json", "abc", NAMES)
    assert "\n" not in str(caught.value)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.json cannot be read"):
        load_manifest(tmp_path / "none.json", "abc", NAMES)


NEW = {"dataset": "a.npz", "image_height": 16, "image_width": 48, "image_rule": "stored"}


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (NEW, (16, 48, False)),
        (NEW | {"dataset": "folder", "image_rule": "crop"}, (16, 48, True)),
        ({"dataset": "digits", "image_size": 8}, None),
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
