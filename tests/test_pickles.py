"""Nothing that a client, or anybody else, can write is ever unpickled."""

import canaries


def test_the_canaries_are_alive(tmp_path):
    folder = tmp_path / "sprung"
    found = {name: canaries.spring(careless, folder) for name, careless in canaries.controls(folder)}
    assert len(found) == 10 and all(found.values()), found


def test_no_canary_is_sprung_by_anything_that_we_read(tmp_path):
    folder = tmp_path / "sprung"
    found = {name: canaries.spring(read, folder) for name, read in canaries.canaries(folder, tmp_path)}
    assert len(found) >= 50 and not any(found.values()), [name for name, sprung in found.items() if sprung]
