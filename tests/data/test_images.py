from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.data import ImageData
from fedlscl.data.images import names_hash

SIZES = {"train": 300, "test": 140}
PARTS = st.sampled_from(sorted(SIZES))


def make(names=("bird", "cat", "dog")):
    draw = torch.Generator().manual_seed(0)
    parts = {}
    for part, size in SIZES.items():
        parts[f"{part}_images"] = torch.randint(256, (size, 3, 2, 2), dtype=torch.uint8, generator=draw)
        parts[f"{part}_labels"] = torch.arange(size) % 3
    return ImageData("scans", **parts, class_names=names)


DATA = make()


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
        assert make(names).fingerprint != DATA.fingerprint


def test_lists_of_names_are_not_joined():
    assert len({names_hash(names) for names in (["a", "b"], ["ab"], ['a", "b'], ["a, b"], [])}) == 5


@pytest.mark.parametrize(
    ("left", "right"), [("é", "e\u0301"), ("dog ", "dog"), ("\tÅ", "A\u030a"), ("가", "\u1100\u1161")]
)
def test_unicode_form_and_surrounding_space_are_no_difference(left, right):
    assert left != right
    assert names_hash([left]) == names_hash([right])
    assert make((left, "cat", "x")).fingerprint == make((right, "cat", "x")).fingerprint


def test_memory_layout_and_the_name_of_the_data_set_are_no_difference():
    layout = DATA.train_images.contiguous(memory_format=torch.channels_last)
    assert replace(DATA, name="other", train_images=layout).fingerprint == DATA.fingerprint
