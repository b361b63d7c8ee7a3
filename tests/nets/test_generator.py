import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.nets.collaborator import ParameterGenerator
from fedlscl.nets.lora import LowRankShape, split_lora

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
    generator = ParameterGenerator(512, shapes)
    start = 0
    for shape in shapes:
        rows = generator.weight[start : start + shape.down_size]
        assert abs(rows.var().item() * shape.in_features - 1) < 0.03
        start += shape.size
    assert torch.equal(generator.bias, torch.zeros_like(generator.bias))


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
