import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import nn

from fedlscl.nets.net import Frozen, SmallMapPrecision, freeze_batch_norm, prepare, single_value_norms

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.5])


@given(st.integers(0, 255), st.integers(1, 40), st.integers(1, 40))
def test_a_plain_image_stays_plain_at_any_size(value, stored, wanted):
    images = torch.full((1, 3, stored, stored), value, dtype=torch.uint8)
    expected = ((value / 255 - MEAN) / STD).view(1, 3, 1, 1).expand(1, 3, wanted, wanted)
    torch.testing.assert_close(prepare(images, wanted, MEAN, STD), expected, rtol=1e-4, atol=1e-5)


def test_stored_bytes_and_floats_in_0_to_1_are_the_same_image():
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    for size in (8, 16, 5):
        assert torch.equal(prepare(images, size, MEAN, STD), prepare(images.float() / 255, size, MEAN, STD))


def test_resizing_does_not_overshoot():
    """Bicubic kernels ring at edges: values stay in 0..1 before normalisation, and the input is not changed."""
    images = (torch.arange(64).view(8, 8) // 4 % 2 * 255).to(torch.uint8).expand(1, 3, 8, 8)
    floats = images.float() / 255
    copy = floats.clone()
    resized = prepare(floats, 21, torch.zeros(3), torch.ones(3))
    assert resized.min() == 0 and resized.max() == 1
    assert torch.equal(floats, copy)


def test_a_frozen_net_never_trains_again():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    owner = nn.ModuleDict({"frozen": Frozen(net), "live": nn.Linear(1, 1)})
    owner.train()
    assert owner["live"].training
    assert not any(module.training for module in owner["frozen"].modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    before = net[1].running_mean.clone()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    first = owner["frozen"](x)
    assert not first.requires_grad and torch.equal(first, owner["frozen"](x))
    assert torch.equal(net[1].running_mean, before)


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_weights():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    freeze_batch_norm(net)
    before = net[1].running_mean.clone(), net[1].running_var.clone(), net[1].num_batches_tracked.clone()
    net(torch.randn(4, 3, 5, 5)).sum().backward()
    after = net[1].running_mean, net[1].running_var, net[1].num_batches_tracked
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert net[1].weight.grad is not None
    assert net[2].training


def test_a_synthesizers_bf16_images_are_scaled_in_float32():
    images = torch.rand(2, 3, 8, 8).bfloat16()
    mean, std = torch.zeros(3), torch.ones(3)
    assert torch.equal(prepare(images, 16, mean, std), prepare(images.float(), 16, mean, std))


NORMS = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "act": BatchNormAct2d, "evo": EvoNorm2dB0}


def make_norm(name):
    """A layer in training mode with statistics of earlier batches."""
    torch.manual_seed(0)
    norm = NORMS[name](4)
    norm(torch.randn(8, 4) if name == "1d" else torch.randn(8, 4, 3, 3))
    return norm


@pytest.mark.parametrize("name", NORMS)
def test_a_single_value_per_channel_is_normalised_by_running_statistics(name):
    norm = make_norm(name)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = torch.randn(1, 4) if name == "1d" else torch.randn(1, 4, 1, 1)
    with single_value_norms(norm):
        output = norm(x)
    output.sum().backward()
    assert norm.training and norm.bias.grad.any()
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    assert torch.equal(output, norm.eval()(x))
    assert not norm._forward_pre_hooks and not norm._forward_hooks


@given(st.sampled_from(["1d", "2d", "act"]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_all_other_inputs_are_normalised_to_the_same_bits(name, batch, height, width):
    if batch * height * width == 1 or (name == "1d" and batch == 1):
        batch = 2
    x = torch.randn(batch, 4) if name == "1d" else torch.randn(batch, 4, height, width)
    plain, guarded = make_norm(name), make_norm(name)
    with single_value_norms(guarded):
        assert torch.equal(guarded(x), plain(x))
    pairs = zip(plain.state_dict().values(), guarded.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_frozen_layers_stay_frozen_and_an_error_keeps_training_mode():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(5))
    net[0].eval()
    with pytest.raises(RuntimeError), single_value_norms(net):
        net(torch.randn(1, 4, 1, 1))
    assert not net[0].training and net[1].training


def weight_gradient(shape, kernel, stride, padding, groups=1, bias=False):
    """Output and weight gradient of a convolution under bf16 autocast, where free memory is full of NaN."""
    torch.manual_seed(0)
    conv = nn.Conv2d(shape[1], 32, kernel, stride, padding, groups=groups, bias=bias)
    conv, x = conv.to(memory_format=torch.channels_last), torch.randn(shape).to(memory_format=torch.channels_last)
    exact = conv(x)
    upstream = torch.randn_like(exact)
    (expected,) = torch.autograd.grad(exact, conv.weight, upstream)
    blocks = [torch.full((size,), torch.nan) for size in (64, 1024, 4096, 16384, 65536) for _ in range(6)]
    del blocks
    with torch.autocast("cpu", torch.bfloat16), SmallMapPrecision():
        output = conv(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)
    return torch.autograd.grad(output, conv.weight, upstream.bfloat16())[0], expected


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize(
    ("height", "width", "kernel", "stride", "padding"),
    [
        (1, 1, 3, 2, 1), (1, 1, 2, 2, 1), (1, 1, 5, 2, 2), (1, 1, 7, 2, 3), (1, 1, 3, 4, 1), (2, 2, 3, 3, 1),
        (2, 2, 7, 4, 3), (3, 3, 3, 4, 1), (3, 3, 7, 4, 3), (7, 7, 7, 8, 3), (2, 1, 3, 2, 1), (1, 2, 3, 4, 1),
    ],
)  # fmt: skip
def test_the_bf16_weight_gradient_is_defined_where_the_stride_exceeds_the_width(
    height, width, kernel, stride, padding, groups, batch
):
    for _ in range(3):
        found, expected = weight_gradient((batch, 16, height, width), kernel, stride, padding, groups)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("options", [{"bias": True}, {"padding": (0, 1)}, {"stride": (1, 2)}])
def test_bias_and_unequal_strides_and_paddings_are_covered(options):
    shape = (4, 16, 3, 1)
    found, expected = weight_gradient(**({"shape": shape, "kernel": 3, "stride": 2, "padding": 1} | options))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("height", "width", "kernel", "stride", "padding"),
    [(2, 2, 3, 2, 1), (1, 8, 3, 2, 1), (1, 1, 3, 1, 1), (1, 1, 1, 2, 0), (1, 1, 3, 1, "same"), (8, 8, 3, 2, 1)],
)
def test_other_convolutions_keep_their_bits(height, width, kernel, stride, padding):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 32, kernel, stride, padding), torch.randn(4, 16, height, width)
    with torch.autocast("cpu", torch.bfloat16):
        plain = conv(x)
        with SmallMapPrecision():
            guarded = conv(x)
    assert torch.equal(plain, guarded)
    upstream = torch.ones_like(plain)
    gradients = (torch.autograd.grad(output, conv.weight, upstream)[0] for output in (plain, guarded))
    assert torch.equal(*gradients)
