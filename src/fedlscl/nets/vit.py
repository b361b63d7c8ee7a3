"""The frozen ViT, run in two parts, of which the first can be cached, with LoRA of each sample on its layers.

LoRA: Hu et al., ICLR 2022, arXiv 2106.09685.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.nets.net import Classification, Net, check_timm_name, first_line, make_head, prepare

GLYPH_WEIGHTS = Path(__file__).with_name("glyph_vit.safetensors")
"""Weights in float16 without a classification head; they load strictly into the model with `num_classes=0`."""
PICKLED = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04")
"""First two bytes of files by torch.save and numpy.savez."""
WRAPPED = re.compile(r"((?:(?:\w+\.)*(?:module|model|backbone|encoder|_orig_mod|vit)\.)?)patch_embed\.proj\.weight")
"""A tensor of every ViT, with the prefixes of wrappers used in training."""
Block: TypeAlias = Any
"""A block of timm; torch does not know the types of its parts."""
Attention: TypeAlias = Any
"""The attention of a block."""

default_cfgs = generate_default_cfgs(
    {
        "vit_glyph_patch4_32.glyphs": {
            "file": str(GLYPH_WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_glyph_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT with 12 blocks of width 80 on 64 patches of 4 x 4 pixels; (B, 3, 32, 32) -> CLS features (B, 80).

    Pre-trained on procedurally drawn glyphs (formula-driven pre-training: Kataoka et al., ACCV 2020), which needs no
    data set: benchmarks/pretrain_glyph_vit.py. Importing this module registers the model with timm.

    Args:
        pretrained: load GLYPH_WEIGHTS.
        kwargs: arguments of timm's VisionTransformer, e.g. `num_classes=0` for features.

    Example:
        >>> import timm
        >>> net = timm.create_model("vit_glyph_patch4_32", num_classes=0)
        >>> len(net.blocks), net.num_features
        (12, 80)
    """
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 80, "depth": 12, "num_heads": 4}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_glyph_patch4_32",
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**shape, **kwargs},
    )


class LowRank(NamedTuple):
    """The update ``scale * up @ down`` of one linear layer, one pair of factors for each sample of a batch."""

    down: Tensor
    """(B, rank, in_features)."""
    up: Tensor
    """(B, out_features, rank)."""
    scale: float
    """alpha / rank."""


class LowRankShape(NamedTuple):
    """Sizes of the factors of one linear layer in a generated vector: A (down-projection), then B (up-projection)."""

    in_features: int
    out_features: int
    rank: int

    @property
    def down_size(self) -> int:
        """Entries of A."""
        return self.rank * self.in_features

    @property
    def size(self) -> int:
        """Entries of both factors."""
        return self.down_size + self.rank * self.out_features


def split_lora(lora: Tensor, shapes: list[LowRankShape], scale: float) -> list[LowRank]:
    """Cut generated weights W (B, lora_dim) into the factors of each adapted layer.

    Example:
        >>> (update,) = split_lora(torch.arange(10.0).view(1, 10), [LowRankShape(2, 3, 2)], 1.0)
        >>> update.down.shape, update.up.shape
        (torch.Size([1, 2, 2]), torch.Size([1, 3, 2]))
    """
    updates, start = [], 0
    for shape in shapes:
        middle, end = start + shape.down_size, start + shape.size
        down = lora[:, start:middle].unflatten(1, (shape.rank, shape.in_features))
        up = lora[:, middle:end].unflatten(1, (shape.out_features, shape.rank))
        updates.append(LowRank(down, up, scale))
        start = end
    return updates


def low_rank_update(x: Tensor, update: LowRank) -> Tensor:
    """Change of a layer's output: ``scale * (x @ down^T) @ up^T``, (B, N, in) to (B, N, out).

    The product of the factors, (B, out, in), is never formed.
    """
    return torch.bmm(torch.bmm(x, update.down.mT) * update.scale, update.up.mT)


def low_rank_hook(update: LowRank) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that adds the update to a linear layer's output; the layer itself is unchanged."""

    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + low_rank_update(inputs[0], update)

    return hook


def is_plain(block: Block) -> bool:
    """Whether a block is timm's Block with its Attention and without gates, as `run_block` assumes."""
    return type(block).__name__ == "Block" and type(block.attn).__name__ == "Attention" and block.attn.gate is None


def run_block(block: Block, x: Tensor, prefix: Tensor | None = None) -> Tensor:
    """Tokens (B, N, width) after a block; one with a ``prefix`` (2, B, length, width) must be plain: see `attend`.

    The backward pass of fused attention in bfloat16 is slow on a CPU (explicit products took half its time on
    DeiT-tiny), so there, with gradients, attention is explicit; the difference is rounding. In float32 fused attention
    took 0.8 of the time of explicit products.
    """
    is_explicit = torch.is_grad_enabled() and x.device.type == "cpu" and _is_bfloat16(x) and is_plain(block)
    if prefix is None and not is_explicit:
        return block(x)
    x = x + block.ls1(attend(block.attn, block.norm1(x), prefix, is_explicit))
    return x + block.ls2(block.mlp(block.norm2(x)))


def attend(attention: Attention, h: Tensor, prefix: Tensor | None = None, is_explicit: bool = False) -> Tensor:
    """Att(q, [p_K; k], [p_V; v]) on (B, N, width), same shape; the prefix (p_K, p_V) enters behind the projections."""
    heads, size = attention.num_heads, attention.head_dim
    q, k, v = attention.qkv(h).unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)  # (B, heads, N, size) each
    if prefix is not None:
        keys, values = prefix.to(v.dtype).unflatten(-1, (heads, size)).transpose(2, 3)
        k, v = torch.cat([keys, k.to(v.dtype)], 2), torch.cat([values, v], 2)
    out = (_explicit if is_explicit else F.scaled_dot_product_attention)(q, k, v, scale=attention.scale)
    return attention.proj(attention.norm(out.transpose(1, 2).flatten(-2)))


def first_token_only(block: Block, x: Tensor, qkv: LowRank | None = None) -> Tensor:
    """The first token's output (B, 1, width) of a plain block: its query, projection and MLP row suffice.

    ``qkv`` is an update of attn.qkv, which is not called; forward hooks of the other linear layers are.
    """
    attention = block.attn
    heads, size = attention.num_heads, attention.head_dim
    h = block.norm1(x)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    inner = heads * size
    q = F.linear(h[:, :1], weight[:inner], None if bias is None else bias[:inner])
    kv = F.linear(h, weight[inner:], None if bias is None else bias[inner:])
    if qkv is not None:
        q = q + low_rank_update(h[:, :1], qkv._replace(up=qkv.up[:, :inner]))
        kv = kv + low_rank_update(h, qkv._replace(up=qkv.up[:, inner:]))
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


@dataclass(frozen=True, kw_only=True)
class FoundationConfig:
    """Which frozen ViT all clients share."""

    name: str = "vit_base_patch16_224.augreg_in21k"
    """Name of a timm VisionTransformer, which also determines the mean and std of its input; vit_glyph_patch4_32 is
    part of this package."""
    weights: str = "timm"
    """'timm' (its download), 'bundled' (the packaged glyph model), 'random', or the path of a safetensors file."""
    image_size: int | None = None
    """Input size in pixels; None is the model's default."""


class Foundation:
    """A frozen ViT that is not an nn.Module, so that no state dict, optimizer, train mode or copy includes it."""

    def __init__(self, config: FoundationConfig) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.vit: Any = _create(config).eval().requires_grad_(False)
        self.width: int = self.vit.num_features
        self.depth = len(self.vit.blocks)
        self.image_size: int = self.vit.patch_embed.img_size[0]
        self.fingerprint = fingerprint(self.vit)
        cfg = self.vit.pretrained_cfg
        self.mean, self.std = torch.tensor(cfg["mean"]), torch.tensor(cfg["std"])
        self._copies: tuple[Any, list[tuple[dict[str, Any], dict[str, Any]]]] = None, []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Foundation":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return foundation, (self.config,)

    def to(self, device: torch.device) -> "Foundation":
        """Move to the images' device, if elsewhere."""
        if self.mean.device != device:
            self.vit.to(device)
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @contextmanager
    def cast(self, dtype: torch.dtype) -> Iterator[None]:
        """Keep weights of linear layers and convolutions in ``dtype`` where autocast would cast them in every pass.

        The results are the same bits. The layers are as before at the end; copies are made once per device and type.
        """
        if self._copies[0] != (self.mean.device, dtype):
            layers = [layer for layer in self.vit.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
            kinds = [(layer._parameters, dict(layer.named_parameters(recurse=False))) for layer in layers]
            copies = [(own, {n: nn.Parameter(p.to(dtype), False) for n, p in of.items()}) for own, of in kinds]
            self._copies = (self.mean.device, dtype), copies
        kept = [(own, {name: own[name] for name in copies}) for own, copies in self._copies[1]]
        for own, copies in self._copies[1]:
            own.update(copies)
        try:
            yield
        finally:
            for own, weights in kept:
                own.update(weights)

    def block(self, index: int) -> nn.Module:
        """Block ``index``, counted from 0."""
        if not 0 <= index < self.depth:
            raise ValueError(f"block must be 0 to {self.depth - 1} for {self.config.name}, got {index}.")
        return self.vit.blocks[index]

    def linear(self, block: int, target: str) -> nn.Linear:
        """The linear layer ``target`` (such as attn.qkv) of a block."""
        layers = {name: layer for name, layer in self.block(block).named_modules() if isinstance(layer, nn.Linear)}
        if target not in layers:
            raise ValueError(f"target must be one of {', '.join(layers)} in block {block}, got {target!r}.")
        return layers[target]

    @torch.no_grad()
    def tokens(self, images: Tensor, block: int) -> Tensor:
        """Tokens (B, N, width) that enter ``block``, from prepared images; features (B, width) at the depth."""
        vit = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for layer in vit.blocks[: min(block, self.depth)]:
            x = layer(x)
        return x if block < self.depth else vit.forward_head(vit.norm(x))

    def features(self, tokens: Tensor, entry: int, updates: Mapping[tuple[int, str], LowRank] | None = None) -> Tensor:
        """Features (B, width) from the tokens that enter block ``entry``.

        ``updates`` are of linear layers from that block on, by block and name, such as (3, 'attn.qkv').
        """
        if entry == self.depth:
            return tokens
        found: list[dict[str, LowRank]] = [{} for _ in range(self.depth)]
        for (index, target), update in (updates or {}).items():
            self.block(index)
            found[index][target] = update
        x, last = tokens, self.depth - 1
        for index in range(entry, self.depth):
            block = self.vit.blocks[index]
            with self._adapted(index, found[index]):
                if index == last and is_plain(block) and _reads_first_token(self.vit):
                    x = first_token_only(block, x, found[index].get("attn.qkv"))
                else:
                    x = run_block(block, x)
        return self.vit.forward_head(self.vit.norm(x))

    @contextmanager
    def _adapted(self, block: int, updates: dict[str, LowRank]) -> Iterator[None]:
        hooks = [
            self.linear(block, target).register_forward_hook(low_rank_hook(update))
            for target, update in updates.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class FrozenViTNet(Net):
    """A net on the frozen ViT, whose blocks before ``entry`` are constant: their output can be cached.

    Args:
        model: the frozen ViT.
        entry: the first block that is not constant; the depth of the ViT, where only its features are used, if None.
    """

    foundation: Foundation

    def __init__(self, model: Foundation, entry: int | None = None) -> None:
        super().__init__()
        self.foundation, self.entry = model, model.depth if entry is None else entry

    @property
    def prefix_key(self) -> str:
        """The ViT's weights, its input size and ``entry``."""
        return f"{self.foundation.fingerprint}/{self.foundation.image_size}/{self.entry}"

    def frozen_prefix(self, images: Tensor) -> Tensor:
        """Tokens (B, N, width) that enter block ``entry``; features (B, width) at the depth."""
        model = self.foundation.to(images.device)
        return model.tokens(prepare(images, model.image_size, model.mean, model.std), self.entry)


class FoundationClassifier(FrozenViTNet):
    """A frozen ViT with a trainable head (the paper's FedAvg+ViT)."""

    def __init__(self, config: FoundationConfig, num_classes: int, head: str = "linear") -> None:
        super().__init__(foundation(config))
        self.head = make_head(head, self.foundation.width, num_classes)

    @override
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Classification:
        features = self.frozen_prefix(images) if prefix is None else prefix.float()
        return Classification(features, self.head(features))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_shared: dict[tuple[FoundationConfig, float | None], Foundation] = {}


def foundation(config: FoundationConfig) -> Foundation:
    """The process's one object for this configuration; a weights file that changed on disk is read again."""
    path = Path(config.weights)
    key = config, path.stat().st_mtime if path.is_file() else None
    if key not in _shared:
        _shared[key] = Foundation(config)
    return _shared[key]


def _reads_first_token(vit: Any) -> bool:
    """Whether the head reads the class token only; a subclass may read others, as DeiT's distilled models do."""
    from timm.models.vision_transformer import VisionTransformer

    plain = all(getattr(type(vit), name) is getattr(VisionTransformer, name) for name in ("forward_head", "pool"))
    return plain and vit.global_pool == "token" and vit.cls_token is not None


def _create(config: FoundationConfig) -> nn.Module:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    check_timm_name(config.name, "foundation")
    size: dict[str, Any] = {} if config.image_size is None else {"img_size": config.image_size}
    suitable = "choose a name such as vit_* or deit_* whose timm class is VisionTransformer"
    try:
        vit = timm.create_model(config.name, pretrained=config.weights == "timm", num_classes=0, **size)
    except TypeError as error:
        raise ValueError(f"foundation {config.name!r} does not support image_size: {suitable}.") from error
    except Exception as error:  # failed downloads raise whatever the client library raises
        fix = "name a safetensors file in weights, or 'random'" if config.weights == "timm" else suitable
        raise ValueError(
            f"foundation {config.name!r} with weights {config.weights!r} could not be created ({first_line(error)}): "
            f"{fix}."
        ) from error
    if not isinstance(vit, VisionTransformer) or type(vit).forward_features is not VisionTransformer.forward_features:
        raise ValueError(
            f"foundation must be a plain VisionTransformer, got {config.name!r}, whose timm class is "
            f"{type(vit).__name__}: {suitable}."
        )
    patch = vit.patch_embed.patch_size[0]
    if config.image_size is not None and config.image_size % patch:
        raise ValueError(f"image_size must be a multiple of the patch size {patch}, got {config.image_size}.")
    if config.weights not in ("timm", "random"):
        _load(vit, GLYPH_WEIGHTS if config.weights == "bundled" else Path(config.weights), config)
    for name, value in vit.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(
                f"weights must be finite, got NaN or infinity in {name} of {config.weights!r}: choose another file."
            )
    return vit


def _load(vit: Any, path: Path, config: FoundationConfig) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from timm.models.vision_transformer import checkpoint_filter_fn

    if not path.is_file():
        raise ValueError(f"weights must be a safetensors file, 'timm', 'bundled' or 'random', got {str(path)!r}.")
    try:
        state = load_file(path)
    except SafetensorError as error:
        with path.open("rb") as file:
            pickled = file.read(2) in PICKLED
        raise ValueError(
            f"weights must be a safetensors file, got {str(path)!r} "
            + (
                "in the format of torch.save or numpy.savez: convert it to safetensors, as docs/own_models.md shows."
                if pickled
                else f"({first_line(error)}): download it again or convert it."
            )
        ) from error
    state = {
        name: value.float()
        for name, value in _without_prefix(state, path).items()
        if not name.startswith(("head.", "head_dist."))
    }
    try:
        vit.load_state_dict(checkpoint_filter_fn(state, vit), strict=True)
    except Exception as error:  # timm's conversion of a file in another layout may fail in any way
        raise ValueError(
            f"weights {str(path)!r} do not fit {config.name!r} ({first_line(error)}): "
            "choose the timm name that they were saved from."
        ) from error


def _without_prefix(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers such as DistributedDataParallel."""
    found = sorted({match[1] for name in state if (match := WRAPPED.fullmatch(name))})
    if len(found) > 1:
        raise ValueError(
            f"weights must hold one model, got {str(path)!r} with {' and '.join(map(repr, found))} before the names of "
            "tensors: keep one model's."
        )
    return {name.removeprefix(found[0]): value for name, value in state.items()} if found else state
