import errno
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlscl.federated import checkpoint
from fedlscl.federated.checkpoint import load_checkpoint, save_checkpoint, write_atomically


def make_state(**changed):
    state = {
        "identity": "abc",
        "progress": [1, 2],
        "method": {"sums": {"gram": torch.randn(3, 3, dtype=torch.float64)}},
        "clients": [{"net": {"w": torch.randn(4), "counter": torch.tensor(3)}, "previous": None, "memory": {}}],
        "accuracy": 0.25,
    }
    return state | changed


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and left == right


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint's bytes and its folder."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint.pt"
    save_checkpoint(path, make_state())
    return path.read_bytes(), path.parent


def test_what_was_saved_comes_back(path):
    state = make_state()
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert loaded.pop("version") == checkpoint.VERSION
    assert equal(loaded, state)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_cut_short_anywhere_is_refused(saved, draw):
    data, folder = saved
    cut = folder / "cut.pt"
    cut.write_bytes(data[: draw.draw(st.integers(0, len(data) - 1))])
    with pytest.raises(ValueError, match=r"cut\.pt' is (not one of fedlscl, or cut short|damaged)"):
        load_checkpoint(cut)


@given(st.data())
def test_a_flipped_bit_anywhere_is_noticed(saved, draw):
    data, folder = saved
    place = draw.draw(st.integers(0, len(data) - 1) | st.integers(0, 50))
    flipped = bytearray(data)
    flipped[place] ^= 1 << draw.draw(st.integers(0, 7))
    (folder / "flipped.pt").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"flipped\.pt' is (not one of fedlscl, or cut short|damaged)"):
        load_checkpoint(folder / "flipped.pt")


def test_bytes_after_the_end_are_noticed(saved):
    data, folder = saved
    (folder / "long.pt").write_bytes(data + b"x")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(folder / "long.pt")


@pytest.mark.parametrize("content", [b"", b"fedlscl\n", b"PK\x03\x04 some other file of more than forty bytes length"])
def test_another_file_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not one of fedlscl"):
        load_checkpoint(path)


def test_a_missing_file_is_refused(path):
    with pytest.raises(ValueError, match="does not exist: give --ckpt_path"):
        load_checkpoint(path)


def test_a_newer_version_is_refused(path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
        save_checkpoint(path, make_state())
    with pytest.raises(ValueError, match=rf"has version {checkpoint.VERSION + 1}, .* reads up to {checkpoint.VERSION}"):
        load_checkpoint(path)


def test_another_configuration_is_refused(path):
    save_checkpoint(path, make_state(identity="abc/def"))
    assert load_checkpoint(path, "abc/def")["identity"] == load_checkpoint(path, "abc")["identity"] == "abc/def"
    with pytest.raises(ValueError, match="belongs to another configuration"):
        load_checkpoint(path, "abd")


def test_nothing_but_tensors_and_plain_values_is_ever_unpickled(path):
    """A checksum proves that a file is whole, not that it is harmless."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "sprung"),)

    save_checkpoint(path, make_state(trap=Trap()))
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(path)
    assert not (path.parent / "sprung").exists()


def test_equal_states_are_equal_bytes(path):
    """Whatever strings and storages they share, and whatever larger tensor they are a view of."""
    torch.manual_seed(0)
    state = make_state()
    save_checkpoint(path, state)
    first = path.read_bytes()
    whole = torch.cat([torch.zeros(2), state["clients"][0]["net"]["w"], torch.zeros(9)])
    state["clients"][0]["net"]["w"] = whole[2:6]
    state["".join(["ident", "ity"])] = "".join(["a", "bc"])
    save_checkpoint(path, state)
    assert path.read_bytes() == first


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch, step):
    save_checkpoint(path, make_state(accuracy=0.5))
    before = path.read_bytes()

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full_disk:
        owner = {"open": type(path), "fsync": checkpoint.os, "replace": checkpoint.os}[step]
        full_disk.setattr(owner, step, fail)
        with pytest.raises(OSError, match=r"could not write .*No space left.*intact") as error:
            save_checkpoint(path, make_state(accuracy=0.75))
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and load_checkpoint(path)["accuracy"] == 0.5
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_write_cut_short_by_a_crash_leaves_the_old_file(path):
    save_checkpoint(path, make_state(accuracy=0.5))
    path.with_name(".checkpoint.pt.tmp").write_bytes(b"half a checkpoi")
    assert load_checkpoint(path)["accuracy"] == 0.5
    save_checkpoint(path, make_state(accuracy=0.75))
    assert load_checkpoint(path)["accuracy"] == 0.75
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_data_reach_the_disk_before_the_name_does(path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            checkpoint.os, name, lambda *args, name=name, original=original: events.append(name) or original(*args)
        )
    write_atomically(path, b"one", memoryview(b"two"))
    assert path.read_bytes() == b"onetwo"
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder that holds the name
