from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.data.loader import ImageData, names_hash

IMAGES, LABELS = torch.zeros(4, 3, 5, 6, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
VALID = {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES, "test_labels": LABELS}


def make(**changed):
    return ImageData(name="mine", class_names=("a", "b"), **(VALID | changed))


def test_valid_images_of_any_size_are_taken():
    for height, width in ((1, 1), (3, 3), (5, 3), (200, 1)):
        images = torch.zeros(4, 3, height, width, dtype=torch.uint8)
        assert make(train_images=images, test_images=images).num_classes == 2


FLAWS = [
    (IMAGES.float() * 255, "must be a uint8 tensor in 0..255, got torch.float32"),
    (IMAGES.half() / 255, "must be a uint8 tensor in 0..255, got torch.float16"),
    (IMAGES.long(), "must be a uint8 tensor in 0..255, got torch.int64"),
    (IMAGES.bool(), "must be a uint8 tensor in 0..255, got torch.bool"),
    (IMAGES.numpy(), "must be a uint8 tensor in 0..255, got ndarray"),
    ([1, 2], "must be a uint8 tensor in 0..255, got list"),
    (IMAGES.permute(0, 2, 3, 1), r"\(N, 3, height, width\), got \(4, 5, 6, 3\): use images.permute\(0, 3, 1, 2\)"),
    (IMAGES[:, :1], r"got \(4, 1, 5, 6\): repeat a single channel three times"),
    (IMAGES[:, 0], r"got \(4, 5, 6\): repeat a single channel three times"),
    (IMAGES[:, :2], r"must have shape \(N, 3, height, width\), got \(4, 2, 5, 6\)"),
    (IMAGES.repeat(1, 2, 1, 1)[:, :4], r"must have shape \(N, 3, height, width\), got \(4, 4, 5, 6\)"),
    (IMAGES[..., :0], r"must have shape \(N, 3, height, width\), got \(4, 3, 5, 0\)"),
]


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(("images", "message"), FLAWS)
def test_images_of_another_type_or_layout_are_refused(part, images, message):
    with pytest.raises(ValueError, match=f"^{part}_images of data set 'mine' .*{message}") as error:
        make(**{f"{part}_images": images})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS.float(), "must be an int64 tensor, got torch.float32"),
        (LABELS.int(), "must be an int64 tensor, got torch.int32"),
        (np.array([0, 1, 0, 1]), "must be an int64 tensor, got ndarray"),
        (LABELS[:, None], r"must have shape \(4,\), got \(4, 1\)"),
        (LABELS[:3], r"must have shape \(4,\), got \(3,\)"),
        (LABELS - 1, "must be 0 to 1, one for each class name, got -1: give every class a name"),
        (LABELS * 10**12, "must be 0 to 1, one for each class name, got 1000000000000: give"),
    ],
)
def test_labels_of_another_type_or_number_are_refused(part, labels, message):
    with pytest.raises(ValueError, match=f"^{part}_labels of data set 'mine' {message}") as error:
        make(**{f"{part}_labels": labels})
    assert "\n" not in str(error.value)


def test_train_and_test_images_have_one_size():
    with pytest.raises(
        ValueError, match=r"test_images of data set 'mine' must be \(5, 6\) like train_images, got \(6, 5\)"
    ):
        make(test_images=IMAGES.transpose(2, 3))


SIZES = {"train": 300, "test": 140}
PARTS = st.sampled_from(sorted(SIZES))


def scans(names=("bird", "cat", "dog")):
    draw = torch.Generator().manual_seed(0)
    parts = {}
    for part, size in SIZES.items():
        parts[f"{part}_images"] = torch.randint(256, (size, 3, 2, 2), dtype=torch.uint8, generator=draw)
        parts[f"{part}_labels"] = torch.arange(size) % 3
    return ImageData("scans", **parts, class_names=names)


DATA = scans()


@given(st.data())
def test_fingerprint_sees_every_pixel(draw):
    part = draw.draw(PARTS)
    place = draw.draw(st.integers(0, SIZES[part] * 12 - 1))
    images = getattr(DATA, f"{part}_images").clone()
    images.view(-1)[place] ^= 1 << draw.draw(st.integers(0, 7))
    assert replace(DATA, **{f"{part}_images": images}).fingerprint != DATA.fingerprint


@given(st.data())
def test_fingerprint_sees_every_label_and_the_order_of_images(draw):
    part = draw.draw(PARTS)
    first, second = (draw.draw(st.integers(0, SIZES[part] - 1)) for _ in range(2))
    order = torch.arange(SIZES[part])
    order[[first, second]] = order[[second, first]]
    for name in ("images", "labels"):
        before = getattr(DATA, f"{part}_{name}")
        is_same = torch.equal(before, before[order])
        changed = replace(DATA, **{f"{part}_{name}": before[order]})
        assert (changed.fingerprint == DATA.fingerprint) == is_same


@pytest.mark.parametrize(
    "names", [("cat", "bird", "dog"), ("bird", "cat", "wolf"), ("bird", "cat", "Dog"), ("bird", "cat", "dog", "eel")]
)
def test_names_in_another_order_or_number_are_another_meaning(names):
    assert names_hash(names) != names_hash(DATA.class_names)
    if len(names) == 3:
        assert scans(names).fingerprint != DATA.fingerprint


def test_lists_of_names_are_not_joined():
    assert len({names_hash(names) for names in (["a", "b"], ["ab"], ['a", "b'], ["a, b"], [])}) == 5


@pytest.mark.parametrize(
    ("left", "right"), [("é", "e\u0301"), ("dog ", "dog"), ("\tÅ", "A\u030a"), ("가", "\u1100\u1161")]
)
def test_unicode_form_and_surrounding_space_are_no_difference(left, right):
    assert left != right
    assert names_hash([left]) == names_hash([right])
    assert scans((left, "cat", "x")).fingerprint == scans((right, "cat", "x")).fingerprint


def test_memory_layout_and_the_name_of_the_data_set_are_no_difference():
    layout = DATA.train_images.contiguous(memory_format=torch.channels_last)
    assert replace(DATA, name="other", train_images=layout).fingerprint == DATA.fingerprint
