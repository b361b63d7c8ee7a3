"""Prompts and prefixes one image, one head and one query at a time."""

import torch


def attention_with_prefix(attention, x, prefix):
    """Att(q, [p_K; k], [p_V; v]) of one image: x (N, width), prefix (2, length, width); no projection of the prefix."""
    heads, size = attention.num_heads, attention.head_dim
    q, k, v = (attention.qkv(x)[:, i * heads * size : (i + 1) * heads * size] for i in range(3))
    k, v = torch.cat([prefix[0], k]), torch.cat([prefix[1], v])
    out = torch.zeros_like(q)
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        for row in range(len(x)):
            scores = torch.stack([q[row, columns] @ key for key in k[:, columns]]) * size**-0.5
            weights = scores.exp() / scores.exp().sum()
            out[row, columns] = sum(weight * value for weight, value in zip(weights, v[:, columns], strict=True))
    return attention.proj(out)


def block_with_prefix(block, x, prefix):
    """A transformer block of one image (N, width)."""
    x = x + block.ls1(attention_with_prefix(block.attn, block.norm1(x), prefix))
    return x + block.ls2(block.mlp(block.norm2(x)))


def prompted_features(vit, image, prompts):
    """L2P of one prepared image (3, h, w): prompts (P, width) stand at the class token's position; their mean."""
    patches = vit.patch_embed(image[None]).reshape(-1, vit.embed_dim)
    first, *rest = vit.pos_embed[0]
    tokens = [vit.cls_token[0, 0] + first, *(prompt + first for prompt in prompts)]
    tokens += [patch + position for patch, position in zip(patches, rest, strict=True)]
    x = vit.norm_pre(torch.stack(tokens)[None])
    for block in vit.blocks:
        x = block(x)
    outputs = vit.norm(x)[0]
    return sum(outputs[1 + i] for i in range(len(prompts))) / len(prompts)


def vote(choices, size, top):
    """The ``top`` ids that most samples chose; among equals the lowest."""
    counts = [sum(row.count(i) for row in choices) for i in range(size)]
    return sorted(sorted(range(size), key=lambda i: (-counts[i], i))[:top])
