import pytest
import torch
from timm.models.vision_transformer import Block

from fedlscl.nets import vit as blocks
from fedlscl.nets.vit import LowRank, adapted, first_token_only, is_plain, run_block

OPTIONS = [
    {"qkv_bias": True},
    {"qkv_bias": False},
    {"qkv_bias": True, "init_values": 0.5},
    {"qkv_bias": True, "qk_norm": True},
    {"qkv_bias": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    {"qkv_bias": True, "proj_drop": 0.5, "attn_drop": 0.5, "drop_path": 0.5},
]


@pytest.fixture(params=OPTIONS, ids="-".join)
def block(request):
    """A block of timm in evaluation mode, with weights large enough to tell its parts apart."""
    torch.manual_seed(0)
    block = Block(32, num_heads=4, **request.param).eval().requires_grad_(False)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert is_plain(block)
    return block


@pytest.fixture
def tokens():
    return torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))


def test_first_token_of_a_block_needs_only_its_own_row(block, tokens):
    torch.testing.assert_close(first_token_only(block, tokens), block(tokens)[:, :1], rtol=1e-5, atol=1e-5)


def test_first_token_of_an_adapted_block_is_that_of_the_whole_block_with_its_hook(block, tokens):
    """Outputs, and the gradients of both factors."""
    torch.manual_seed(2)
    factors = [torch.randn(3, 2, 32).requires_grad_(), torch.randn(3, 96, 2).requires_grad_()]
    update = LowRank(*factors, 0.1)
    found = first_token_only(block, tokens, update)
    with adapted([(block.attn.qkv, update)]):
        expected = block(tokens)[:, :1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - first_token_only(block, tokens)).abs().max() > 1e-3
    gradients = [torch.autograd.grad(output.square().sum(), factors) for output in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.fixture(params=["fused", "written out"])
def attention(request, monkeypatch):
    """Attention as in float32 and as in bfloat16 on a CPU, both computed in float32 here."""
    monkeypatch.setattr(blocks, "_is_bfloat16", lambda x: request.param == "written out")


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.usefixtures("attention")
def test_a_block_computes_what_timm_computes(block, tokens, with_gradient):
    """Outputs, and the gradient of what enters."""
    left, right = (tokens.clone().requires_grad_(with_gradient) for _ in range(2))
    with torch.set_grad_enabled(with_gradient):
        found, expected = run_block(block, left), block(right)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if with_gradient:
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-4 * right.grad.abs().max().item())


@pytest.mark.usefixtures("attention")
def test_hooks_on_a_block_are_called_on_either_path(block, tokens):
    """Low-rank updates are hooks on linear layers."""
    with torch.no_grad():
        plain = run_block(block, tokens)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        hook = block.get_submodule(name).register_forward_hook(lambda layer, inputs, output: output + 1)
        with torch.no_grad():
            fused = run_block(block, tokens)
        explicit = run_block(block, tokens)
        hook.remove()
        torch.testing.assert_close(fused, explicit, rtol=1e-4, atol=1e-4)
        assert name == "attn.qkv" or (fused - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("precision", "is_explicit"), [(torch.float32, False), (torch.bfloat16, True)])
def test_attention_is_written_out_in_bfloat16_only(block, tokens, monkeypatch, precision, is_explicit):
    """By autocast and by the tokens' own type; without gradients it is fused."""
    asked = []

    def attend(attention, h, prefix, is_explicit):
        asked.append(is_explicit)
        return h

    monkeypatch.setattr(blocks, "attend", attend)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_explicit):
        run_block(block, tokens)
        with torch.no_grad():
            run_block(block, tokens)
    run_block(block.to(precision), tokens.to(precision))
    assert asked == [True, True] * is_explicit


def test_mixed_precision_stays_near(block, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        left = tokens.clone().requires_grad_(True)
        found = run_block(block, left)
    torch.testing.assert_close(found.float(), block(tokens), rtol=0.1, atol=0.1 * block(tokens).abs().max().item())
