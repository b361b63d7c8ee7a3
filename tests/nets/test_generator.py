import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.nets.collaborator import PHI_SCALE, ParameterGenerator
from fedlscl.nets.vit import LowRankShape, split_lora

SHAPES = [LowRankShape(6, 9, 2), LowRankShape(5, 4, 2)]


def test_generated_updates_begin_at_exactly_zero():
    generator = ParameterGenerator(8, SHAPES)
    for update in split_lora(generator(torch.randn(3, 8)), SHAPES, 1.0):
        assert torch.equal(update.up, torch.zeros_like(update.up))
        assert update.down.abs().min() > 0


def test_reading_factors_of_unit_features_have_variance_one_over_in_features():
    """Measured over 400 x 512 draws per layer: 1 % is four standard errors of a variance and more."""
    torch.manual_seed(0)
    shapes = [LowRankShape(100, 7, 4), LowRankShape(25, 3, 4)]
    generator = ParameterGenerator(512, shapes, "per_image")
    start = 0
    for shape in shapes:
        rows = generator.weight[start : start + shape.down_size]
        assert abs(rows.var().item() * shape.in_features - 1) < 0.03
        start += shape.size
    assert torch.equal(generator.bias, torch.zeros_like(generator.bias))


def test_a_split_start_is_a_shared_lora_plus_a_smaller_one_of_each_image():
    """Per image A has the variance of b's share, 1 / in_features, plus 0.09 times that; B is zero in both parts."""
    torch.manual_seed(0)
    shape = LowRankShape(1000, 7, 40)
    generator = ParameterGenerator(64, [shape])
    down, up = generator.matrix.split([shape.down_size, shape.size - shape.down_size], dim=1)
    assert not up.any()
    assert abs(down[-1].var().item() * 1000 - 1) < 0.03
    assert abs(down[:-1].var().item() * 1000 - PHI_SCALE**2) < 0.03 * PHI_SCALE**2


def test_without_features_the_bias_is_the_lora_of_all_images():
    torch.manual_seed(0)
    generator = ParameterGenerator(0, SHAPES)
    assert generator.matrix.shape == (1, sum(shape.size for shape in SHAPES))
    assert torch.equal(generator(torch.empty(3, 0)), generator.bias.expand(3, -1))


@given(st.integers(0, 2**32))
def test_matrix_is_the_map_with_the_bias_as_last_row(seed):
    """W = Phi^T [E; 1]."""
    torch.manual_seed(seed)
    generator = ParameterGenerator(8, SHAPES).double()
    torch.nn.init.normal_(generator.weight)
    torch.nn.init.normal_(generator.bias)
    features = torch.randn(3, 8, dtype=torch.float64)
    extended = torch.cat([features, torch.ones(3, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(extended @ generator.matrix, generator(features))
    assert not generator.matrix.requires_grad

    other = ParameterGenerator(8, SHAPES).double()
    other.load_matrix(generator.matrix)
    assert torch.equal(other.weight, generator.weight) and torch.equal(other.bias, generator.bias)
