"""Forward passes of timm's plain transformer blocks that leave out what nobody reads, or suit a CPU better."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's Block around its Attention, without gates or anything else to mind."""
    return type(block).__name__ == "Block" and type(block.attn).__name__ == "Attention" and block.attn.gate is None


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """Tokens (B, N, width) through a block.

    Fused attention is slow to differentiate on a CPU (explicit products took half its time on DeiT-tiny in bfloat16),
    so there, and only under gradients, attention is written out; the difference is rounding.
    """
    if not (x.requires_grad or torch.is_grad_enabled()) or x.device.type != "cpu" or not is_plain(block):
        return block(x)
    h = block.norm1(x)
    x = x + block.ls1(_attend(block.attn, h))
    return x + block.ls2(block.mlp(block.norm2(x)))


def first_token_only(block: nn.Module, x: Tensor) -> Tensor:
    """The first token's output (B, 1, width) of a plain block: its query, projection and MLP row suffice."""
    attention = block.attn
    heads, size = attention.num_heads, attention.head_dim
    h = block.norm1(x)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    inner = heads * size
    q = F.linear(h[:, :1], weight[:inner], None if bias is None else bias[:inner])
    kv = F.linear(h, weight[inner:], None if bias is None else bias[inner:])
    q = attention.q_norm(q.unflatten(-1, (heads, size)).transpose(1, 2))  # (B, heads, 1, size)
    k, v = kv.unflatten(-1, (2, heads, size)).permute(2, 0, 3, 1, 4)  # (B, heads, N, size) each
    out = F.scaled_dot_product_attention(q, attention.k_norm(k), v, scale=attention.scale)
    out = attention.norm(out.transpose(1, 2).flatten(-2))
    first = x[:, :1] + block.ls1(attention.proj(out))
    return first + block.ls2(block.mlp(block.norm2(first)))


def _attend(attention: nn.Module, h: Tensor) -> Tensor:
    heads, size = attention.num_heads, attention.head_dim
    q, k, v = attention.qkv(h).unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    with torch.autocast("cpu", enabled=False):  # a softmax in float32 would double the memory that is moved
        q, k, v = (part.to(v.dtype).flatten(0, 1) for part in (q, k, v))  # (B * heads, N, size) each
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=attention.scale)
        out = torch.bmm(scores.softmax(-1), v)
    out = out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(-2)  # (B, N, heads * size)
    return attention.proj(attention.norm(out))
