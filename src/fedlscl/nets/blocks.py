"""Forward passes of timm's plain transformer blocks that leave out what nobody reads, or suit a CPU better."""

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Block: TypeAlias = Any
"""timm's; torch says of none of its parts what type it has."""
Attention: TypeAlias = Any
"""The same of its attention."""


def is_plain(block: Block) -> bool:
    """Whether a block is timm's Block around its Attention, without gates or anything else to mind."""
    return type(block).__name__ == "Block" and type(block.attn).__name__ == "Attention" and block.attn.gate is None


def run_block(block: Block, x: Tensor, prefix: Tensor | None = None) -> Tensor:
    """Tokens (B, N, width) through a block, plain where it gets a ``prefix`` (2, B, length, width): see `attend`.

    Fused attention in bfloat16 is slow to differentiate on a CPU (explicit products took half its time on DeiT-tiny),
    so there, and only under gradients, attention is written out; the difference is rounding. In float32 fused attention
    took 0.8 of the time of explicit products.
    """
    is_explicit = torch.is_grad_enabled() and x.device.type == "cpu" and _is_bfloat16(x) and is_plain(block)
    if prefix is None and not is_explicit:
        return block(x)
    x = x + block.ls1(attend(block.attn, block.norm1(x), prefix, is_explicit))
    return x + block.ls2(block.mlp(block.norm2(x)))


def attend(attention: Attention, h: Tensor, prefix: Tensor | None = None, is_explicit: bool = False) -> Tensor:
    """Att(q, [p_K; k], [p_V; v]) on (B, N, width): N stays, and no projection sees the prefix (p_K, p_V)."""
    heads, size = attention.num_heads, attention.head_dim
    q, k, v = attention.qkv(h).unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)  # (B, heads, N, size) each
    if prefix is not None:
        keys, values = prefix.to(v.dtype).unflatten(-1, (heads, size)).transpose(2, 3)
        k, v = torch.cat([keys, k.to(v.dtype)], 2), torch.cat([values, v], 2)
    out = (_explicit if is_explicit else F.scaled_dot_product_attention)(q, k, v, scale=attention.scale)
    return attention.proj(attention.norm(out.transpose(1, 2).flatten(-2)))


def first_token_only(block: Block, x: Tensor) -> Tensor:
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


def _is_bfloat16(x: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") is torch.bfloat16
    return x.dtype is torch.bfloat16


def _explicit(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    heads = q.shape[1]
    with torch.autocast("cpu", enabled=False):  # a softmax in float32 would double the memory that is moved
        q, k, v = (part.to(v.dtype).flatten(0, 1) for part in (q, k, v))  # (B * heads, N, size) each
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=scale)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, heads))
