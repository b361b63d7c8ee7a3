import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlscl.data import Buffer, lowest_loss


@st.composite
def samples(draw):
    """Ids, labels, losses; losses from a few values so that ties are common."""
    ids = draw(st.lists(st.integers(0, 99), unique=True, max_size=30))
    labels = draw(st.lists(st.integers(0, 3), min_size=len(ids), max_size=len(ids)))
    losses = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=len(ids), max_size=len(ids)))
    return (
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(losses, dtype=torch.float32),
    )


@settings(deadline=None, max_examples=40)
@given(samples(), st.integers(0, 5))
def test_lowest_loss_is_the_literal_choice(drawn, per_class):
    rows = list(zip(*(part.tolist() for part in drawn), strict=True))
    expected = []
    for label in sorted({label for _, label, _ in rows}):
        of_class = sorted((loss, id_) for id_, other, loss in rows if other == label)
        expected += [id_ for _, id_ in of_class[:per_class]]
    assert drawn[0][lowest_loss(*drawn, per_class)].tolist() == expected


@settings(deadline=None, max_examples=40)
@given(samples(), samples(), st.integers(1, 5), st.randoms())
def test_update_replaces_only_the_classes_it_brings(old, new, per_class, random):
    before = Buffer.empty().updated(*old, per_class)
    after = before.updated(*new, per_class)
    brought = set(new[1].tolist())

    def of(buffer, is_kept):
        rows = zip(buffer.ids.tolist(), buffer.labels.tolist(), buffer.losses.tolist(), strict=True)
        return [row for row in rows if is_kept(row[1])]

    assert of(after, lambda label: label not in brought) == of(before, lambda label: label not in brought)
    assert [row[0] for row in of(after, lambda label: label in brought)] == new[0][
        lowest_loss(*new, per_class)
    ].tolist()
    assert after.classes.tolist() == sorted(brought | set(old[1].tolist()))
    assert torch.equal(after.labels, after.labels.sort().values)

    order = torch.tensor(random.sample(range(len(new[0])), len(new[0])), dtype=torch.int64)
    assert torch.equal(before.updated(*(part[order] for part in new), per_class).ids, after.ids)


def test_update_leaves_the_previous_buffer_as_it_was():
    labels, losses = torch.tensor([0, 0]), torch.tensor([1.0, 2.0], requires_grad=True)
    before = Buffer.empty().updated(torch.tensor([1, 2]), labels, losses, 2)
    state = {name: part.clone() for name, part in before.state_dict().items()}
    after = before.updated(torch.tensor([3, 4]), labels, losses, 1)
    assert after.ids.tolist() == [3]
    assert len(after) == 1 and not after.losses.requires_grad
    assert all(torch.equal(before.state_dict()[name], part) for name, part in state.items())


def test_a_loss_that_is_not_a_number_comes_last():
    ids, labels, losses = torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([float("nan"), 5.0])
    assert lowest_loss(ids, labels, losses, 1).tolist() == [1]


def test_state_survives_a_file_of_tensors(tmp_path):
    buffer = Buffer.empty().updated(torch.tensor([4, 9]), torch.tensor([1, 0]), torch.tensor([0.1, 0.2]), 3)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    loaded = Buffer(**torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert loaded.ids.tolist() == [9, 4] and loaded.labels.tolist() == [0, 1]
    assert torch.equal(loaded.losses, buffer.losses)


def test_a_negative_size_is_refused():
    empty = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="per_class must be >= 0, got -1"):
        lowest_loss(empty, empty, torch.empty(0), -1)
