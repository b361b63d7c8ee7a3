import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlscl.data import EvenBatches, batches, load_images


@pytest.fixture(scope="module")
def data():
    return load_images("fake", fake_classes=4, train_per_class=6, image_size=4)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 70), st.booleans())
def test_batches_are_even_and_complete(num_samples, batch_size, shuffle):
    sampler = EvenBatches(num_samples, batch_size, shuffle)
    drawn = list(sampler)
    sizes = [len(batch) for batch in drawn]
    assert len(sampler) == len(sizes) == -(-num_samples // batch_size)
    assert sorted(position for batch in drawn for position in batch.tolist()) == list(range(num_samples))
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert max(sizes, default=0) <= batch_size
    if num_samples > 1 and batch_size > 2:
        assert 1 not in sizes


def test_every_pass_has_a_new_order_from_the_given_generator(data):
    def passes(seed):
        loader = batches(data, torch.arange(20), 8, True, torch.Generator().manual_seed(seed))
        return [[batch.ids.tolist() for batch in loader] for _ in range(2)]

    first, second = passes(1)
    assert first != second
    assert passes(1) == [first, second]
    assert passes(2) != [first, second]


def test_evaluation_and_own_generators_leave_the_global_one_alone(data):
    state = torch.get_rng_state()
    list(batches(data, torch.arange(20), 8, shuffle=False))
    list(batches(data, torch.arange(20), 8, shuffle=True, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loader_yields_the_samples_of_its_ids(data):
    ids = torch.tensor([3, 30, 23, 24, 1])
    (batch,) = batches(data, ids, 8, shuffle=False)
    assert torch.equal(batch.ids, ids)
    assert torch.equal(batch.images, data.fetch(ids).images) and torch.equal(batch.labels, data.labels(ids))


def test_no_ids_give_no_batches(data):
    loader = batches(data, torch.empty(0, dtype=torch.int64), 8, shuffle=True)
    assert len(loader) == 0 and list(loader) == []


def test_workers_change_nothing(data):
    def ids(num_workers):
        loader = batches(data, torch.arange(20), 8, True, torch.Generator().manual_seed(0), num_workers)
        return [batch.ids.tolist() for _ in range(2) for batch in loader]

    assert ids(0) == ids(1)


def test_batch_size_must_be_positive(data):
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        batches(data, torch.arange(3), 0, shuffle=False)


@pytest.mark.parametrize("is_in_use", [True, False])
def test_batches_are_pinned_where_cuda_is_in_use(make_data, monkeypatch, is_in_use):
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: is_in_use)
    data = make_data()
    assert data.stream(0).loader(data.stream(0).train_ids(0), 4, shuffle=True).pin_memory is is_in_use
