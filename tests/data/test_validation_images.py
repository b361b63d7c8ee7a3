"""Images held out of training, on which hyper-parameters are chosen."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.data.split import held_out


@pytest.fixture(scope="module")
def make(make_data):
    return lambda **options: make_data(**({"validation_per_class": 3} | options))


def pooled(data, name):
    streams = [data.stream(client) for client in range(data.num_clients)]
    return torch.cat([getattr(stream, name)(task) for stream in streams for task in range(data.num_tasks)]).unique()


@pytest.mark.parametrize("options", [{}, {"protocol": "global", "private_classes": 0, "public_classes": 4}])
def test_no_client_trains_on_them_and_every_class_has_as_many(make, options):
    data = make(**options)
    data.setup()
    validation, train, test = (pooled(data, f"{name}_ids") for name in ("validation", "train", "test"))
    assert not torch.isin(validation, torch.cat([train, test])).any()
    counts = torch.bincount(data.data.labels(validation))
    assert set(counts[counts > 0].tolist()) == {3}
    assert torch.bincount(data.data.labels(train)).max() == 8 - 3
    for client in range(2):
        stream = data.stream(client)
        for task in range(2):
            labels = data.data.labels(stream.validation_ids(task)).unique()
            assert torch.equal(labels, stream.classes(task))


def test_none_changes_nothing(make, make_data):
    plain, zero = make_data(), make(validation_per_class=0)
    for left, right in zip(plain.splits, zero.splits, strict=True):
        assert left.classes == right.classes
        assert all(np.array_equal(*pair) for pair in zip(left.train, right.train, strict=True))
    ids = [torch.cat([batch.ids for batch in data.val_dataloader()]) for data in (plain, zero)]
    assert torch.equal(*ids) and torch.equal(ids[0], torch.cat([batch.ids for batch in plain.test_dataloader()]))


@given(st.integers(0, 2**32), st.lists(st.integers(2, 9), min_size=1, max_size=4), st.data())
def test_they_are_random_and_the_same_for_a_seed_in_any_number_of_clients(seed, sizes, data):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    per_class = data.draw(st.integers(1, min(sizes) - 1))
    names = list(map(str, range(len(sizes))))
    ids = held_out(labels, per_class, seed, names)
    assert np.bincount(labels[ids]).tolist() == [per_class] * len(sizes) and np.array_equal(ids, np.unique(ids))
    assert np.array_equal(ids, held_out(labels, per_class, seed, names))


def test_the_number_of_clients_and_tasks_does_not_move_them(make):
    few, many, other = make(), make(num_clients=1, num_tasks=2, private_classes=4, public_classes=2), make(seed=7)
    for data in (few, many, other):
        data.setup()
    assert np.array_equal(few._held_out, many._held_out)
    assert not np.array_equal(few._held_out, other._held_out)


def test_dataloaders_and_lightning_see_them(make):
    data = make()
    whole = torch.cat([batch.ids for batch in data.val_dataloader()])
    assert torch.equal(whole, pooled(data, "validation_ids"))
    part = torch.cat([batch.ids for batch in data.at(1, 0).val_dataloader()])
    assert torch.equal(part, data.stream(1).validation_ids(0))


def test_a_run_evaluates_on_them_if_asked(make, federate):
    from tiny_methods import METHODS

    on_test = federate(METHODS["FedNCM"](), make())
    on_validation = federate(METHODS["FedNCM"](), make(evaluate_on="validation"))
    assert torch.equal(on_test.clients[0].net.head.weight, on_validation.clients[0].net.head.weight)
    assert on_validation.run.data["evaluated_on"] == "validation" and "evaluated_on" not in on_test.run.data
    assert on_validation.run.data["test_samples"][0] == [6, 6] and on_test.run.data["test_samples"][0] == [8, 8]
    shares = on_validation.matrix.of("class_il")[:, 0, 0] * 6
    torch.testing.assert_close(shares, shares.round())


def test_a_saved_split_keeps_them_out(make, tmp_path):
    data = make()
    data.setup()
    data.save_manifest(str(tmp_path / "split.json"))
    again = make(manifest=str(tmp_path / "split.json"))
    assert torch.equal(pooled(again, "train_ids"), pooled(data, "train_ids"))
    plain = make(validation_per_class=0)
    plain.setup()
    plain.save_manifest(str(tmp_path / "plain.json"))
    removed = make(manifest=str(tmp_path / "plain.json"))
    assert not torch.isin(pooled(removed, "train_ids"), pooled(removed, "validation_ids")).any()


@settings(max_examples=20)
@given(st.integers(0, 5), st.integers(1, 30))
def test_a_saved_split_keeps_a_sample_of_every_class_of_every_client_or_is_refused(tmp_path_factory, seed, per_class):
    """The shares of a saved split were drawn before: small ones may consist of validation samples alone."""
    options: dict[str, Any] = {"dataset": "fake", "fake_classes": 6, "num_clients": 4, "num_tasks": 2, "image_size": 16}
    options |= {"private_classes": 0, "public_classes": 4, "dirichlet_alpha": 1.0, "train_per_class": 40, "seed": seed}
    plain = SpatialTemporalDataModule(**options)
    path = str(tmp_path_factory.mktemp("split") / "split.json")
    plain.save_manifest(path)
    data = SpatialTemporalDataModule(**options, manifest=path, validation_per_class=per_class)
    labels = plain.data.train_labels.numpy()
    mask = np.isin(np.arange(len(labels)), held_out(labels, per_class, seed, plain.class_names))
    parts = [ids for split in plain.splits for ids in split.train]
    if all(set(labels[ids]) == set(labels[ids[~mask[ids]]]) for ids in parts):
        kept = [ids for split in data.splits for ids in split.train]
        assert all(np.array_equal(*pair) for pair in zip(kept, (ids[~mask[ids]] for ids in parts), strict=True))
    else:
        with pytest.raises(
            ValueError, match=r"validation_per_class must leave client \d of manifest .* a train sample"
        ):
            data.setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_per_class": 8}, "validation_per_class must be less than the 8 train samples of class"),
        ({"validation_per_class": -1}, "validation_per_class must be >= 0, got -1"),
        ({"validation_per_class": 0, "evaluate_on": "validation"}, "validation_per_class must be >= 1 to evaluate"),
        ({"evaluate_on": "train"}, "evaluate_on must be one of test, validation, got 'train'"),
    ],
)
def test_impossible_values_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options).setup()


def test_public_classes_keep_a_sample_for_each_client():
    """After holding out, a public class still needs one sample for each client."""
    options = {"dataset": "fake", "fake_classes": 6, "num_clients": 3, "num_tasks": 2, "train_per_class": 5}
    options |= {"private_classes": 0, "public_classes": 4, "image_size": 16, "validation_per_class": 3}
    data = SpatialTemporalDataModule(**options)
    with pytest.raises(ValueError, match="must have at least 3 train samples, one per client, got 2"):
        data.setup()
