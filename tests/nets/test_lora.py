import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import LayerScale
from timm.models.vision_transformer import Block

from fedlscl.nets.vit import LowRank, LowRankShape, adapted, low_rank_update, split_lora
from reference import lora as literal


def random_update(layer, size, rank=3, scale=0.5):
    return LowRank(torch.randn(size, rank, layer.in_features), torch.randn(size, layer.out_features, rank), scale)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_update_adds_a_weight_of_its_own_to_each_sample(size, tokens, rank, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    layer = torch.nn.Linear(4, 6).double()
    x = torch.randn(size, tokens, 4, generator=random, dtype=torch.float64)
    down = torch.randn(size, rank, 4, generator=random, dtype=torch.float64)
    update = LowRank(down, torch.randn(size, 6, rank, generator=random, dtype=torch.float64), 0.25)
    wrapper = torch.nn.Sequential(layer)
    expected = literal.adapted(wrapper, x, {"0": update})
    torch.testing.assert_close(layer(x) + low_rank_update(x, update), expected)


@pytest.mark.parametrize("targets", [["attn.qkv"], ["attn.proj"], ["mlp.fc1"], ["mlp.fc2"], ["attn.qkv", "mlp.fc1"]])
def test_hooks_on_a_real_block_equal_a_loop_over_its_samples(targets):
    """Outputs and the gradients of the factors."""
    torch.manual_seed(0)
    block = Block(32, num_heads=2, qkv_bias=True, init_values=0.3).eval().requires_grad_(False)
    assert isinstance(block.ls1, LayerScale)
    x = torch.randn(3, 5, 32)
    updates = {name: random_update(block.get_submodule(name), 3) for name in targets}
    factors = [part.requires_grad_(True) for update in updates.values() for part in (update.down, update.up)]
    expected = literal.adapted(block, x, updates)
    expected_gradients = torch.autograd.grad(expected.square().sum(), factors)

    with adapted((block.get_submodule(name), update) for name, update in updates.items()):
        found = block(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for gradient, other in zip(torch.autograd.grad(found.square().sum(), factors), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3)
    assert (found - block(x)).abs().max() > 0.1


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3), st.integers(1, 3))
def test_a_generated_vector_is_cut_without_gap_or_overlap(layers, rank):
    shapes = [LowRankShape(inputs, outputs, rank) for inputs, outputs in layers]
    lora = torch.arange(2 * sum(shape.size for shape in shapes)).view(2, -1)
    updates = split_lora(lora, shapes, 2.0)
    assert [update.down.shape for update in updates] == [(2, rank, shape.in_features) for shape in shapes]
    assert [update.up.shape for update in updates] == [(2, shape.out_features, rank) for shape in shapes]
    joined = torch.cat([part.flatten(1) for update in updates for part in (update.down, update.up)], 1)
    assert torch.equal(joined, lora)
    assert all(update.scale == 2.0 for update in updates)
