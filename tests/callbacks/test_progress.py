import re

import pytest

from fedlscl.callbacks.formatting import in_bytes
from fedlscl.callbacks.progress import MANY_CLIENTS
from fedlscl.methods import FedAvg, FedNCM

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture(scope="module")
def quick(foundation_config):
    return lambda: FedAvg(foundation=foundation_config, local_epochs=2, batch_size=8)


def test_introduction_says_what_is_about_to_be_done(whole):
    first = whole.screen.splitlines()
    assert first[0] == "FedLSCL on fake: 2 clients, 2 tasks of 2 classes per client, 2 rounds per task"
    parts = dict(line.split(maxsplit=1) for line in first[1:6])
    # 2 clients x 2 tasks x 2 classes; the two public classes are divided, so that 6 classes in all make 2 + 4 shares.
    assert parts["images"] == "48 for training, 32 for testing, of all clients"
    assert re.fullmatch(
        r"[\d,]+ trainable of [\d,]+ \([\d,]+ in the shared frozen ViT\), per client", parts["parameters"]
    )
    assert parts["foundation"].startswith("test_vit, weights ")
    assert parts["device"] == "cpu, precision 32-true, seed 42"
    assert parts["run"] == str(whole.folder)


def test_plain_mode_has_a_line_per_stage_round_and_task(whole):
    text = whole.screen
    assert "\x1b" not in text and "\r" not in text
    assert len(re.findall(r"^task 1/2, round 1/2, client 0, collaborative: loss \S+ \(", text, re.M)) == 1
    assert len(re.findall(r"client \d, continual: loss \S+ = cross_entropy \S+ (\+ \w+ \S+ )+\(", text)) == 4
    assert len(re.findall(r"^task \d/2, round \d/2: [\d.]+ kB up, [\d.]+ kB down", text, re.M)) == 4
    assert (
        len(re.findall(r"^after task \d/2: class-IL average [\d.]+ %, current task [\d.]+ %, forgetting", text, re.M))
        == 2
    )
    assert "100% done, 0:00:00 left" in text


def test_bytes_and_time_of_the_whole_run_are_estimated_after_two_rounds(whole):
    """As those of the first task's two rounds, twice: bytes of a round do not depend on the task."""
    lines = whole.screen.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("  estimate ")]
    assert lines[place - 1].startswith("task 1/2, round 2/2: ")
    up, down = (in_bytes(2 * int(whole.trainer.run.traffic[way][:, 0].sum())) for way in ("up", "down"))
    assert re.fullmatch(rf"  estimate    {up} up, {down} down, 0:0\d:\d\d for the whole run", lines[place])
    assert int(whole.trainer.run.traffic["up"].sum()) == 2 * int(whole.trainer.run.traffic["up"][:, 0].sum())


def test_share_done_never_falls(whole):
    shares = [int(share) for share in re.findall(r"(\d+)% done", whole.screen)]
    assert shares == sorted(shares) and len(shares) > 10


def test_resumed_run_says_from_where(resumed):
    stopped, again = resumed
    assert stopped.screen.rstrip().endswith("stopped in task 2/2, round 2/2")
    assert "resuming    from task 2/2, round 2/2" in again.screen
    assert int(re.search(r"(\d+)% done", again.screen)[1]) >= 75


def test_many_clients_get_no_lines_of_their_own(observe, quick, make_data):
    many = MANY_CLIENTS + 1
    data = make_data(num_clients=many, fake_classes=4, private_classes=0, public_classes=4, train_per_class=many)
    text = observe(quick(), data=data, rounds_per_task=1).screen
    assert "client 0" not in text and "task 2/2, round 1/1: " in text


def test_method_without_training_reaches_its_end(observe, foundation_config):
    assert "100% done" in observe(FedNCM(foundation=foundation_config)).screen


def test_terminal_has_bars_and_gets_its_cursor_back(observe, quick, capsys):
    text = observe(quick(), is_terminal=True).screen
    for bar in ("Run", "Task", "Round", "Client", "Batch"):
        assert f"{bar} " in text
    assert "━" in text and "% done" in text and "after task 2/2" in text
    assert text.count(HIDE_CURSOR) == text.count(SHOW_CURSOR) == 1
    assert "FedAvg on fake: accuracy in percent" in capsys.readouterr().out


def test_terminal_is_restored_when_the_run_is_interrupted(observe, quick):
    text = observe(quick(), is_terminal=True, stop_at=1).screen
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    assert "stopped in task 1/2, round 2/2" in text


def test_a_client_without_samples_is_named_as_one(observe, quick, make_data):
    data = make_data(protocol="global", private_classes=0, public_classes=4, num_clients=2, dirichlet_alpha=0.01)
    lines = observe(quick(), data=data, rounds_per_task=1).screen.splitlines()
    samples = [[len(split.train[task]) for task in range(2)] for split in data.splits]
    assert [0 in row for row in samples].count(True) == 1
    (found,) = [line for line in lines if ": no samples (" in line]
    client = 0 if 0 in samples[0] else 1
    assert found.startswith(f"task {samples[client].index(0) + 1}/2, round 1/1, client {client}, train: no samples (")
