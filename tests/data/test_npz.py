import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.data import load_images


def load(path, **options):
    return load_images(path.name, str(path.parent), **options)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3)])
@pytest.mark.parametrize("label_shape", [(-1,), (-1, 1)])
def test_every_medmnist_shape_becomes_three_channels(save_npz, shape, label_shape):
    train = np.random.default_rng(0).integers(0, 256, (4, *shape), np.uint8)
    test = np.zeros((2, *shape), np.uint8)
    labels = np.array([0, 1, 0, 1], np.uint8).reshape(label_shape)
    data = load(save_npz(train_images=train, test_images=test, train_labels=labels))
    expected = np.broadcast_to(train.reshape(4, 5, 6, -1), (4, 5, 6, 3))
    assert data.train_images.shape == (4, 3, 5, 6)
    assert (data.train_images.permute(0, 2, 3, 1).numpy() == expected).all()
    assert data.train_labels.tolist() == [0, 1, 0, 1]
    assert data.class_names == ("0", "1")


def test_class_names_and_validation_part_are_optional(save_npz):
    data = load(save_npz(class_names=np.array(["cat", "dog"]), val_images=np.zeros(1), val_labels=np.zeros(1)))
    assert data.class_names == ("cat", "dog")
    assert len(data.train_images) == 4 and len(data.test_images) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_labels": None}, "must have test_labels, got train_images, train_labels, test_images: use"),
        ({"train_images": np.zeros((4, 5), np.uint8)}, r"train_images of .* must have shape .*, got \(4, 5\)"),
        (
            {"train_images": np.zeros((4, 5, 6, 2), np.uint8)},
            r"train_images of .* must have shape .*, got \(4, 5, 6, 2\)",
        ),
        ({"test_images": np.zeros((2, 5, 6))}, "test_images of .* must be uint8 in 0..255, got float64"),
        (
            {"test_images": np.zeros((2, 9, 9), np.uint8)},
            r"test_images of .* must be \(5, 6\) like train_images, got \(9, 9\)",
        ),
        ({"train_labels": np.zeros((4, 3), int)}, r"train_labels of .* must have shape \(4,\), got \(4, 3\)"),
        ({"train_labels": np.zeros(3, int)}, r"train_labels of .* must have shape \(4,\), got \(3,\)"),
        ({"train_labels": np.zeros(4)}, "train_labels of .* must be integers, got float64"),
        ({"train_labels": np.array([0, 1, 0, -1])}, r"train_labels of .* must be 0 to 2, .*, got -1"),
        ({"class_names": np.array(["cat"])}, r"train_labels of .* must be 0 to 0, .*, got 1: give every class a name"),
        ({"class_names": np.array(["cat", "dog", "owl"])}, "has no train image of class 'owl'"),
        (
            {"class_names": np.array([["cat", "dog"]])},
            r"class_names of .* must be one string per class, got <U3 \(1, 2\)",
        ),
        ({"test_labels": np.array([1, 1])}, "has no test image of class '0'"),
        (
            {"test_labels": np.array([0, 2])},
            r"test_labels of .* must be 0 to 1, .*, got 2: give every class a name and train images",
        ),
        ({"test_labels": np.array([0, 10**12])}, r"test_labels of .* must be 0 to 1, .*, got 1000000000000"),
        ({"train_labels": np.array([0, 1, 0, 2**64 - 1], np.uint64)}, "from 0, got 18446744073709551615: correct"),
        (
            {"train_labels": np.array([0, 1, 0, 10**12]), "class_names": np.array(["cat", "dog"])},
            r"train_labels of .* must be 0 to 1, .*, got 1000000000000: give every class a name",
        ),
        ({"train_images": np.array([None, "x"], object)}, "is not a readable .npz .*: save it with numpy.savez"),
    ],
)
def test_wrong_arrays_are_named_in_one_line(save_npz, changed, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(save_npz(**changed))
    assert "\n" not in str(caught.value)


def test_broken_and_missing_files_are_named_in_one_line(save_npz, tmp_path):
    path = save_npz()
    path.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "array", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("small", "text", "empty", "array"):
        with pytest.raises(ValueError, match=rf"{name}.npz is not a readable .npz") as caught:
            load(tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"none.npz is missing: set root"):
        load(tmp_path / "none.npz")


def test_real_cifar_loads(cifar_root):
    data = load_images("cifar100_100x30.npz", str(cifar_root), train_per_class=4)
    assert data.train_images.shape == (400, 3, 32, 32) and data.test_images.shape == (3000, 3, 32, 32)
    assert data.class_names[0] == "apple" and data.num_classes == 100
    assert data.train_labels.bincount().tolist() == [4] * 100


@given(st.sets(st.integers(0, 2**62), min_size=1, max_size=9), st.booleans())
def test_labels_need_not_be_sorted_but_have_no_gaps(tmp_path_factory, labels, is_named):
    found = sorted(labels)
    images = np.full((len(found), 2, 2), 200, np.uint8)
    arrays = {"train_images": images, "test_images": images, "train_labels": found[::-1], "test_labels": found}
    names = {"class_names": np.array([f"c{label}" for label in range(len(found))])} if is_named else {}
    path = tmp_path_factory.mktemp("labels") / "small.npz"
    np.savez(path, **arrays, **names)
    if found == list(range(len(found))):
        assert load(path).train_labels.tolist() == found[::-1]
    else:
        with pytest.raises(ValueError, match=rf"must be 0 to {len(found) - 1}, .*, got {found[-1]}: .*, or renumber"):
            load(path)
