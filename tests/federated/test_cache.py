from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric

from fedlscl.data import Batch
from fedlscl.federated import engine as module
from fedlscl.federated.engine import Engine, PrefixCache
from fedlscl.nets.collaborator import Collaborator
from fedlscl.nets.net import SmallClassifier

ROW_BYTES = 5 * 64 * 4
"""Five tokens of width 64 in single precision."""


@pytest.fixture(scope="module")
def data(make_data):
    """Six classes among two clients, and two classes that nobody has."""
    return make_data(fake_classes=8)


@pytest.fixture(scope="module")
def net(collaborator_config):
    return Collaborator(collaborator_config, 8)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 5)
        yield


def make(data, rows=10_000, dtype=torch.float32, folder=None):
    return PrefixCache(data, rows * ROW_BYTES, dtype, folder)


@pytest.fixture
def computed(monkeypatch):
    """Numbers of images in every pass of the frozen part."""
    sizes, original = [], Collaborator.frozen_prefix
    monkeypatch.setattr(Collaborator, "frozen_prefix", lambda self, x: sizes.append(len(x)) or original(self, x))
    return sizes


def attach(cache, ids, net):
    return cache.attach(cache.datamodule.fetch(torch.as_tensor(ids)), net, nullcontext).prefix


def own_ids(cache):
    return torch.cat(cache.chunks)


def test_chunks_hold_every_sample_of_the_streams_once(data):
    streams = [data.stream(client) for client in range(2)]
    expected = torch.cat([ids for s in streams for t in range(2) for ids in (s.train_ids(t), s.test_ids(t))]).unique()
    ids = own_ids(make(data))
    assert torch.equal(ids.sort().values, expected)
    assert len(expected) < len(data.data.train_labels) + len(data.data.test_labels)


def test_cached_prefixes_are_the_direct_ones(data, net):
    cache = make(data)
    for chunk in cache.chunks:
        assert torch.equal(attach(cache, chunk, net), net.frozen_prefix(data.fetch(chunk).images))
    ids = own_ids(cache)[torch.randperm(len(own_ids(cache)))]
    direct = net.frozen_prefix(data.fetch(ids).images)
    torch.testing.assert_close(attach(cache, ids, net), direct, rtol=1e-5, atol=1e-6)


def test_every_image_is_computed_once(data, net, computed):
    cache = make(data)
    for _ in range(2):
        for ids in own_ids(cache).split(7):
            attach(cache, ids, net)
    assert sum(computed) == len(own_ids(cache))


@settings(max_examples=8)
@given(st.data())
def test_neither_order_nor_budget_changes_a_bit(data, net, draw):
    """A resumed run asks for other samples first, and must get the same bits, and the same samples from the cache."""
    rows = draw.draw(st.sampled_from([3, 12, 30, 10_000]), "rows")
    first, second = make(data, rows), make(data, rows)
    ids = own_ids(first).tolist()
    batches = [torch.tensor(ids[start : start + 6]) for start in range(0, len(ids), 6)]
    skipped = draw.draw(st.permutations(range(len(batches))))
    expected = [attach(first, batch, net) for batch in batches]
    for index in skipped[: draw.draw(st.integers(1, len(batches)))]:
        prefix = attach(second, batches[index], net)
        assert (prefix is None) == (expected[index] is None)
        assert prefix is None or torch.equal(prefix, expected[index])


def test_beyond_the_budget_the_net_computes_for_itself(data, net):
    cache = make(data, rows=12)
    prefixes = [attach(cache, chunk, net) for chunk in cache.chunks]
    held = sum(len(prefix) for prefix in prefixes if prefix is not None)
    assert 12 - 5 < held <= 12
    assert prefixes[0] is not None and prefixes[-1] is None
    assert [attach(cache, chunk, net) is None for chunk in cache.chunks] == [prefix is None for prefix in prefixes]
    assert sum(store.values.nbytes for store in cache.stores.values()) <= 12 * ROW_BYTES


@pytest.mark.parametrize("rows", [0, 0.5])
def test_without_a_budget_nothing_is_kept(data, net, rows):
    cache = make(data, rows)
    assert all(attach(cache, chunk, net) is None for chunk in cache.chunks)


def test_samples_outside_the_streams_are_computed_directly(data, net):
    cache = make(data)
    total = len(data.data.train_labels) + len(data.data.test_labels)
    strangers = sorted(set(range(total)) - set(own_ids(cache).tolist()))
    inside = own_ids(cache)[:2].tolist()
    assert attach(cache, inside, net) is not None
    assert attach(cache, strangers[:2], net) is None
    assert attach(cache, [inside[0], strangers[0]], net) is None


def test_images_without_an_id_are_never_taken_for_others(data, net):
    """A stock loader gives ids of -1, and a folder to predict has none either."""
    cache = make(data)
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for ids in ([-1, -1], [int(own_ids(cache)[0]), -1]):
        batch = Batch(images, torch.zeros(2, dtype=torch.int64), torch.tensor(ids))
        assert cache.attach(batch, net, nullcontext).prefix is None


def test_nets_of_one_frozen_part_share_what_is_kept(data, net, collaborator_config):
    cache = make(data)
    first = attach(cache, cache.chunks[0], net)
    other = Collaborator(collaborator_config, 3)
    assert torch.equal(attach(cache, cache.chunks[0], other), first)
    assert len(cache.stores) == 1


def test_nets_of_another_frozen_part_get_their_own(data, net, collaborator_config):
    cache = make(data)
    other = Collaborator(replace(collaborator_config, blocks=(1,)), 3)
    images = data.fetch(cache.chunks[0]).images
    for each in (net, other, net):
        assert torch.equal(attach(cache, cache.chunks[0], each), each.frozen_prefix(images))


def test_a_net_without_a_frozen_part_and_a_batch_that_has_its_prefix_pass_through(data, net):
    cache = make(data)
    batch = data.fetch(cache.chunks[0])
    engine = Engine(Fabric(accelerator="cpu"), cache)
    assert engine.prepare(batch, SmallClassifier("test_resnet", 3, 16)).prefix is None
    given_one = batch._replace(prefix=torch.zeros(1))
    assert cache.attach(given_one, net, nullcontext) is given_one


def test_prefixes_are_kept_in_the_given_precision(data, net):
    prefix = attach(make(data, dtype=torch.bfloat16), make(data).chunks[0], net)
    assert prefix.dtype == torch.bfloat16
    torch.testing.assert_close(
        prefix.float(), net.frozen_prefix(data.fetch(make(data).chunks[0]).images), rtol=1e-2, atol=1e-2
    )


def test_images_that_were_changed_at_random_are_never_taken_for_the_stored_ones(data, net):
    cache = make(data)
    batch = data.fetch(cache.chunks[0])
    assert cache.attach(batch._replace(augmented=True), net, nullcontext).prefix is None
    assert cache.attach(batch, net, nullcontext).prefix is not None


@pytest.mark.parametrize("rows", [12, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_hold_the_same_bits_as_memory_and_serve_the_next_process(data, net, tmp_path, computed, rows, dtype):
    chunks = make(data).chunks
    in_memory = [attach(cache, chunk, net) for cache in [make(data, rows, dtype)] for chunk in chunks]
    for _ in range(2):
        cache = make(data, rows, dtype, tmp_path)
        computed.clear()
        for chunk, expected in zip(chunks, in_memory, strict=True):
            found = attach(cache, chunk, net)
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)
    assert not computed
    assert len(list(tmp_path.glob("*.tokens"))) == sum(found is not None for found in in_memory)


def test_a_damaged_file_is_computed_and_written_again(data, net, tmp_path, computed):
    first = attach(make(data, folder=tmp_path), make(data).chunks[0], net)
    (path,) = tmp_path.glob("*.tokens")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    computed.clear()
    assert torch.equal(attach(make(data, folder=tmp_path), make(data).chunks[0], net), first)
    assert len(computed) == 1 and path.read_bytes() == content


def test_without_a_budget_no_file_is_written(data, net, tmp_path):
    cache = make(data, 0, folder=tmp_path)
    assert attach(cache, cache.chunks[0], net) is None and not list(tmp_path.iterdir())


def test_a_file_is_for_one_set_of_weights_block_resolution_dtype_split_and_code(
    data, net, tmp_path, make_data, collaborator_config, monkeypatch
):
    foundation = replace(collaborator_config.foundation, image_size=64)
    variants = [
        (data, net, torch.float32),
        (data, net, torch.bfloat16),
        (data, Collaborator(replace(collaborator_config, blocks=(1,)), 8), torch.float32),
        (data, Collaborator(replace(collaborator_config, foundation=foundation), 8), torch.float32),
        (make_data(fake_classes=8, seed=7), net, torch.float32),
    ]
    for number, (given_data, given_net, dtype) in enumerate(variants, start=1):
        cache = make(given_data, 10_000, dtype, tmp_path)
        attach(cache, cache.chunks[0], given_net)
        assert len(list(tmp_path.glob("*.tokens"))) == number
    for facts in ({"mean": net.foundation.mean + 1}, {"fingerprint": "other"}):
        with monkeypatch.context() as patch:
            for name, value in facts.items():
                patch.setattr(net.foundation, name, value)
            cache = make(data, folder=tmp_path)
            attach(cache, cache.chunks[0], net)
        number += 1
        assert len(list(tmp_path.glob("*.tokens"))) == number
