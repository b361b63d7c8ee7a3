import os
import signal
import subprocess
import sys

import pytest
import torch

from fedlscl.federated.engine import FileRows, MemoryRows, checksum

SHAPE = (3, 4)
CHUNKS = {0: slice(0, 5), 1: slice(5, 8)}


@pytest.fixture(params=["memory", "file"])
def rows(request, tmp_path):
    if request.param == "memory":
        return MemoryRows(8, SHAPE, torch.bfloat16, torch.device("cpu"))
    return FileRows(tmp_path / "deep" / "a.tokens", 2, 8, SHAPE, torch.bfloat16)


def values(rows, seed=0):
    size = rows.stop - rows.start
    return torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_rows_come_back_as_they_were_put(rows):
    assert len(rows) == 8 and not any(rows.has(chunk, place) for chunk, place in CHUNKS.items())
    for chunk, place in CHUNKS.items():
        rows.put(chunk, place, values(place, chunk))
    assert all(rows.has(chunk, place) for chunk, place in CHUNKS.items())
    expected = torch.cat([values(place, chunk) for chunk, place in CHUNKS.items()])
    order = torch.tensor([7, 0, 0, 5])
    assert torch.equal(rows.take(order), expected[order])


def reopened(folder, num_rows=8):
    return FileRows(folder / "a.tokens", 2, num_rows, SHAPE, torch.bfloat16)


def test_a_file_is_found_again_and_grows_with_the_budget(tmp_path):
    reopened(tmp_path, 5).put(0, CHUNKS[0], values(CHUNKS[0]))
    again = reopened(tmp_path)
    assert again.has(0, CHUNKS[0]) and not again.has(1, CHUNKS[1])
    again.put(1, CHUNKS[1], values(CHUNKS[1]))
    assert torch.equal(reopened(tmp_path, 5).take(torch.arange(5)), values(CHUNKS[0]))
    assert reopened(tmp_path).has(1, CHUNKS[1])


@pytest.mark.parametrize("damaged", ["a.tokens", "a.index"])
def test_one_changed_byte_and_the_chunk_does_not_count(tmp_path, damaged):
    reopened(tmp_path).put(0, CHUNKS[0], values(CHUNKS[0]))
    content = bytearray((tmp_path / damaged).read_bytes())
    content[3] ^= 1
    (tmp_path / damaged).write_bytes(content)
    assert not reopened(tmp_path).has(0, CHUNKS[0])


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from fedlscl.federated import engine as store
rows = store.FileRows(Path(sys.argv[1]) / "a.tokens", 2, 8, (3, 4), torch.bfloat16)
rows.put(0, slice(0, 5), torch.ones(5, 3, 4))
store.checksum = lambda values: os.kill(os.getpid(), signal.SIGKILL)
rows.put(1, slice(5, 8), torch.ones(3, 3, 4))
"""


def test_killed_between_rows_and_checksum_a_chunk_does_not_count(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    rows = reopened(tmp_path)
    assert rows.values[5:].eq(1).all()
    assert rows.has(0, CHUNKS[0]) and not rows.has(1, CHUNKS[1])


def test_no_room_is_said_in_one_line_and_takes_nothing(tmp_path, monkeypatch):
    reopened(tmp_path, 5).put(0, CHUNKS[0], values(CHUNKS[0]))

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"must have room for .* \(No space left on device\): lower trainer.cache_gb"):
        reopened(tmp_path)
    assert reopened(tmp_path, 5).has(0, CHUNKS[0])


def test_an_empty_chunk_never_has_the_checksum_of_an_empty_index():
    assert checksum(torch.zeros(2, 3)).any()
