import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedlscl.federated.engine import Rows, read_tensor, write_tensor


def values(size, seed=0):
    return torch.randn(size, 3, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "a.tokens"


def test_rows_are_taken_by_index():
    rows = Rows(8, values(5))
    assert rows.values.shape == (8, 3, 4) and rows.values.dtype == torch.bfloat16 and not rows.filled
    rows.values[:] = values(8)
    order = torch.tensor([7, 0, 0, 5])
    assert torch.equal(rows.take(order, torch.device("cpu")), values(8)[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_comes_back_as_it_was_written(path, dtype):
    assert read_tensor(path) is None
    for seed in range(2):
        write_tensor(path, values(5, seed).to(dtype))
        assert torch.equal(read_tensor(path), values(5, seed).to(dtype)) and read_tensor(path).dtype == dtype


@pytest.mark.parametrize("place", [3, 40, 200, -1])
def test_one_changed_byte_and_the_file_does_not_count(path, place):
    write_tensor(path, values(5))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert read_tensor(path) is None


@pytest.mark.parametrize("size", [0, 10, 32, 100, -1])
def test_a_file_cut_short_does_not_count(path, size):
    write_tensor(path, values(5))
    path.write_bytes(path.read_bytes()[:size])
    assert read_tensor(path) is None


KILLED = """
import os, resource, sys, torch
from pathlib import Path
from fedlscl.federated.engine import write_tensor
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
write_tensor(Path(sys.argv[1]), torch.ones(10_000))
"""


def test_killed_while_it_is_written_a_file_does_not_count(path):
    """The kernel ends a process that writes beyond its limit."""
    code = f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n{KILLED}"
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ)
    assert done.returncode == -signal.SIGXFSZ
    assert path.stat().st_size == 10_000 and read_tensor(path) is None
    write_tensor(path, values(5))
    assert torch.equal(read_tensor(path), values(5))


def test_no_room_is_said_in_one_line_and_leaves_nothing(path, monkeypatch):
    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"must have room for .* \(No space left on device\): lower trainer.cache_gb"):
        write_tensor(path, values(5))
    assert list(path.parent.iterdir()) == []
