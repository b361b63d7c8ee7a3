import errno
import hashlib
import io
import os
import pickle
import random
import resource
import signal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlscl.federated import checkpoint
from fedlscl.federated.checkpoint import load_checkpoint, load_last_good, previous, save_checkpoint, write_atomically


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
    with pytest.raises(ValueError, match=r"cut\.pt' is (not a checkpoint of fedlscl, or cut short|damaged)"):
        load_checkpoint(cut)


@given(st.data())
def test_a_flipped_bit_anywhere_is_noticed(saved, draw):
    data, folder = saved
    place = draw.draw(st.integers(0, len(data) - 1) | st.integers(0, 50))
    flipped = bytearray(data)
    flipped[place] ^= 1 << draw.draw(st.integers(0, 7))
    (folder / "flipped.pt").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"flipped\.pt' is (not a checkpoint of fedlscl, or cut short|damaged)"):
        load_checkpoint(folder / "flipped.pt")


def test_bytes_after_the_end_are_noticed(saved):
    data, folder = saved
    (folder / "long.pt").write_bytes(data + b"x")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(folder / "long.pt")


@pytest.mark.parametrize("content", [b"", b"fedlscl\n", b"PK\x03\x04 some other file of more than forty bytes length"])
def test_another_file_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a checkpoint of fedlscl"):
        load_checkpoint(path)


def test_a_missing_file_is_refused(path):
    with pytest.raises(ValueError, match="does not exist: give --ckpt_path"):
        load_checkpoint(path)


def test_a_newer_version_is_refused(path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
        save_checkpoint(path, make_state())
    with pytest.raises(ValueError, match=rf"has version {checkpoint.VERSION + 1}, .* {checkpoint.VERSION}: upgrade it"):
        load_checkpoint(path)


def test_an_older_version_is_refused(path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(checkpoint, "VERSION", 1)
        save_checkpoint(path, make_state())
    with pytest.raises(ValueError, match=r"has version 1, .*: start a new run, or use the version that wrote it"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("identity", "part"),
    [("x-b-c", "configuration"), ("x-y-z", "configuration"), ("a-x", "data set or split"), ("a-b-x", "precision")],
)
def test_the_part_of_the_identity_that_differs_is_named(path, identity, part):
    save_checkpoint(path, make_state(identity="a-b-c"))
    with pytest.raises(ValueError, match=f"belongs to another {part}: {checkpoint.PARTS[part]}"):
        load_checkpoint(path, identity)


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
    with pytest.raises(ValueError, match=r"must contain tensors and plain values only .*: nothing in it was run"):
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
    assert sorted(file.name for file in path.parent.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]


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


def sealed(body):
    """Bytes with a true checksum: a file that somebody made up, not one that broke."""
    return checkpoint.MAGIC + hashlib.sha256(body).digest() + body


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200) | st.just(pickle.dumps({"version": 2, "identity": "abc"})))
def test_whatever_is_sealed_is_read_or_refused_in_one_line(tmp_path, body):
    (tmp_path / "sealed.pt").write_bytes(sealed(body))
    try:
        load_checkpoint(tmp_path / "sealed.pt")
    except ValueError as error:
        assert "sealed.pt" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "state", [[1], {"version": 1}, {"version": "1", "identity": "a"}, {"version": 1, "identity": 2}]
)
def test_a_state_that_says_nothing_of_itself_is_refused(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(sealed(buffer.getvalue()))
    with pytest.raises(checkpoint.DamagedError, match=r"must contain tensors|lacks version or identity"):
        load_checkpoint(path)


def test_the_one_before_is_kept_and_costs_a_link(path):
    for accuracy in (0.25, 0.5, 0.75):
        save_checkpoint(path, make_state(accuracy=accuracy))
        inode = path.stat().st_ino
        if accuracy < 0.75:
            kept = inode
    assert load_checkpoint(previous(path))["accuracy"] == 0.5 and previous(path).stat().st_ino == kept
    assert sorted(file.name for file in path.parent.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_where_there_are_no_links_all_else_goes_on(path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(checkpoint.os, "link", fail)
    for accuracy in (0.5, 0.75):
        save_checkpoint(path, make_state(accuracy=accuracy))
    assert load_last_good(path)["accuracy"] == 0.75 and not previous(path).exists()


def test_a_damaged_one_is_replaced_by_the_one_before_which_is_named(path, caplog):
    """And it stays the last good one until two more are written."""
    for accuracy in (0.25, 0.5):
        save_checkpoint(path, make_state(accuracy=accuracy))
    path.write_bytes(path.read_bytes()[:-9])
    assert load_last_good(path)["accuracy"] == 0.25
    (record,) = caplog.records
    assert f"{str(path)!r} is damaged" in record.message and f"Resuming from {str(previous(path))!r}" in record.message
    assert load_checkpoint(path)["accuracy"] == load_checkpoint(previous(path))["accuracy"] == 0.25
    save_checkpoint(path, make_state(accuracy=0.75))
    assert load_checkpoint(path)["accuracy"] == 0.75 and load_checkpoint(previous(path))["accuracy"] == 0.25
    assert sorted(file.name for file in path.parent.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]


@pytest.mark.parametrize("fault", ["both damaged", "of another configuration", "no other"])
def test_without_a_good_one_before_the_damage_is_reported(path, fault):
    save_checkpoint(path, make_state(identity="other" if fault == "of another configuration" else "abc"))
    save_checkpoint(path, make_state())
    path.write_bytes(b"damaged")
    if fault == "both damaged":
        previous(path).write_bytes(b"damaged")
    elif fault == "no other":
        previous(path).unlink()
    with pytest.raises(ValueError, match=r"checkpoint\.pt' is not a checkpoint of fedlscl") as raised:
        load_last_good(path, "abc")
    said = f"{str(previous(path))!r}, the one before it, is damaged, too: continue from a copy, or start a new run."
    assert (said in str(raised.value)) == (fault == "both damaged")
    assert path.read_bytes() == b"damaged"


def test_a_newer_version_is_never_taken_for_damage(path, monkeypatch):
    save_checkpoint(path, make_state())
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
        save_checkpoint(path, make_state())
    with pytest.raises(ValueError, match="has version"):
        load_last_good(path)


@pytest.mark.parametrize("seed", range(20))
def test_a_full_disk_at_any_moment_leaves_the_last_good_one(path, monkeypatch, seed):
    """The n-th write, flush, link or rename fails, as do all that follow."""
    picker = random.Random(seed)
    for accuracy in (0.25, 0.5):
        save_checkpoint(path, make_state(accuracy=accuracy))
    files, left = (path.read_bytes(), previous(path).read_bytes()), [picker.randint(0, 4)]

    def short(owner, name):
        original = getattr(owner, name)

        def called(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, called)

    short(type(path), "open")
    for name in ("fsync", "link", "replace"):
        short(checkpoint.os, name)
    try:
        save_checkpoint(path, make_state(accuracy=0.75))
        failed = False
    except OSError:
        failed = True
    monkeypatch.undo()
    if failed and path.read_bytes() == files[0]:
        assert load_last_good(path)["accuracy"] == 0.5
    else:
        assert load_last_good(path)["accuracy"] == 0.75 and load_checkpoint(previous(path))["accuracy"] == 0.5
    assert load_checkpoint(previous(path))["accuracy"] in (0.25, 0.5)


def test_a_file_that_must_not_grow_leaves_the_last_good_one(path):
    """A real refusal by the operating system, in a process of its own."""
    save_checkpoint(path, make_state(accuracy=0.5))
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            save_checkpoint(path, make_state(accuracy=0.75))
        except OSError as error:
            os._exit(7 if "is intact" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]
