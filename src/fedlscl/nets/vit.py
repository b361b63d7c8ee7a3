"""The frozen ViT, run in two parts, of which the first can be cached, with LoRA of each sample on its layers.

LoRA: Hu et al., ICLR 2022, arXiv 2106.09685.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import timm
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.nets.net import Net, Output, check_timm_name, explained, make_head, prepare, read_weights
from fedlscl.options import Count, check_options

GLYPH_WEIGHTS = Path(__file__).with_name("glyph_vit.safetensors")
"""In float16, without a classification head."""
PATCHES = "patch_embed.proj.weight"
"""A tensor of every ViT."""
QKV = "attn.qkv"
Block: TypeAlias = Any
"""A block of timm; torch does not know the types of its parts."""

default_cfgs = generate_default_cfgs({
    "vit_glyph_patch4_32.glyphs": {
        "file": str(GLYPH_WEIGHTS), "num_classes": 0, "input_size": (3, 32, 32), "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0, "interpolation": "bilinear",
        "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
    }
})  # fmt: skip


@register_model
def vit_glyph_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT with 12 blocks of width 80 on 64 patches of 4 x 4 pixels; (B, 3, 32, 32) -> CLS features (B, 80).

    Pre-trained on procedurally drawn glyphs (formula-driven pre-training: Kataoka et al., ACCV 2020), which needs no
    data set: benchmarks/pretrain_glyph_vit.py. Importing this module registers the model with timm; ``kwargs`` are
    arguments of timm's VisionTransformer.

    Example:
        >>> timm.create_model("vit_glyph_patch4_32", num_classes=0).num_features
        80
    """
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 80, "depth": 12, "num_heads": 4}
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(
        VisionTransformer, "vit_glyph_patch4_32", pretrained, feature_cfg=features, **{**shape, **kwargs}
    )


class LowRank(NamedTuple):
    """The update ``scale * up @ down`` of a linear layer, the same for a batch or with factors for each sample."""

    down: Tensor
    """(rank, in_features), or (B, rank, in_features)."""
    up: Tensor
    """(out_features, rank), or (B, out_features, rank)."""
    scale: float = 1.0
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
        return self.rank * (self.in_features + self.out_features)


def split_lora(lora: Tensor, shapes: list[LowRankShape], scale: float) -> list[LowRank]:
    """Cut generated weights W (B, lora_dim) into the factors of each adapted layer.

    Example:
        >>> (update,) = split_lora(torch.arange(10.0).view(1, 10), [LowRankShape(2, 3, 2)], 1.0)
        >>> update.down.shape, update.up.shape
        (torch.Size([1, 2, 2]), torch.Size([1, 3, 2]))
    """
    updates = []
    for shape, part in zip(shapes, lora.split([shape.size for shape in shapes], 1), strict=True):
        down, up = part.tensor_split([shape.down_size], 1)
        updates.append(LowRank(down.unflatten(1, (shape.rank, -1)), up.unflatten(1, (-1, shape.rank)), scale))
    return updates


def low_rank_update(x: Tensor, update: LowRank) -> Tensor:
    """Change of a layer's output, (B, N, in) to (B, N, out); the product of the factors is never formed."""
    return (x @ update.down.mT * update.scale) @ update.up.mT


@contextmanager
def adapted(updates: Iterable[tuple[nn.Linear, LowRank]]) -> Iterator[None]:
    """Add updates to the outputs of linear layers while the context is open; the layers themselves are unchanged."""

    def hook(update: LowRank) -> Callable[..., Tensor]:
        return lambda layer, inputs, output: output + low_rank_update(inputs[0], update)

    with ExitStack() as hooks:
        for layer, update in updates:
            hooks.enter_context(layer.register_forward_hook(hook(update)))
        yield


def is_plain(block: Block) -> bool:
    """Whether a block is timm's Block with its Attention and without gates, as `run_block` assumes."""
    return type(block).__name__ == "Block" and type(block.attn).__name__ == "Attention" and block.attn.gate is None


def run_block(block: Block, x: Tensor, prefix: Tensor | None = None) -> Tensor:
    """Tokens (B, N, width) after a block; one with a ``prefix`` (2, B, length, width) must be plain: see `attend`.

    In bfloat16 on a CPU, with gradients, attention is explicit, since fused attention took twice the time on DeiT-tiny;
    the difference is rounding.
    """
    is_explicit = torch.is_grad_enabled() and x.device.type == "cpu" and _is_bfloat16(x) and is_plain(block)
    if prefix is None and not is_explicit:
        return block(x)
    x = x + block.ls1(attend(block.attn, block.norm1(x), prefix, is_explicit))
    return x + block.ls2(block.mlp(block.norm2(x)))


def attend(attention: Any, h: Tensor, prefix: Tensor | None = None, is_explicit: bool = False) -> Tensor:
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
    attention, h = block.attn, block.norm1(x)
    heads, size = attention.num_heads, attention.head_dim
    weight, bias, inner = attention.qkv.weight, attention.qkv.bias, heads * size
    q = F.linear(h[:, :1], weight[:inner], None if bias is None else bias[:inner])
    kv = F.linear(h, weight[inner:], None if bias is None else bias[inner:])
    if qkv is not None:
        q = q + low_rank_update(h[:, :1], qkv._replace(up=qkv.up[:, :inner]))
        kv = kv + low_rank_update(h, qkv._replace(up=qkv.up[:, inner:]))
    q = q.unflatten(-1, (heads, size)).transpose(1, 2)  # (B, heads, 1, size)
    k, v = kv.unflatten(-1, (2, heads, size)).permute(2, 0, 3, 1, 4)  # (B, heads, N, size) each
    out = F.scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v, scale=attention.scale)
    first = x[:, :1] + block.ls1(attention.proj(attention.norm(out.transpose(1, 2).flatten(-2))))
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
    """Name of a timm VisionTransformer, which determines the mean and std of its input too; vit_glyph_patch4_32 is part
    of this package."""
    weights: str = "timm"
    """'timm' (its download), 'bundled' (the packaged glyph model), 'random', or the path of a safetensors file."""
    image_size: Count | None = None
    """Input size in pixels; None is the model's default."""

    def __post_init__(self) -> None:
        check_options(self)


class Foundation:
    """A frozen ViT that is not an nn.Module, so that no state dict, optimizer, train mode or copy includes it."""

    def __init__(self, config: FoundationConfig) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.vit: Any = create_vit(config).eval().requires_grad_(False)
        vit, kind = self.vit, type(self.vit)
        self.width: int = vit.num_features
        self.depth = len(vit.blocks)
        self.image_size: int = vit.patch_embed.img_size[0]
        self.fingerprint = fingerprint(vit)
        self.mean, self.std = torch.tensor(vit.pretrained_cfg["mean"]), torch.tensor(vit.pretrained_cfg["std"])
        # The head of a subclass may read other tokens, as DeiT's distilled models do.
        is_usual = kind.forward_head is VisionTransformer.forward_head and kind.pool is VisionTransformer.pool
        reads_first = is_usual and vit.global_pool == "token" and vit.cls_token is not None
        self._needs_first_token = reads_first and is_plain(vit.blocks[-1])
        self._copies: tuple[Any, list[tuple[dict, dict]]] = None, []

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

        The results are the same bits; copies are made once per device and type.
        """
        if self._copies[0] != (self.mean.device, dtype):
            layers = [layer for layer in self.vit.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
            named = [(layer._parameters, layer.named_parameters(recurse=False)) for layer in layers]
            copies = [(own, {name: nn.Parameter(p.to(dtype), False) for name, p in found}) for own, found in named]
            self._copies = (self.mean.device, dtype), copies
        kept = [(own, own.copy()) for own, _ in self._copies[1]]
        for own, weights in self._copies[1]:
            own.update(weights)
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
        x = vit.blocks[:block](vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))))
        return x if block < self.depth else vit.forward_head(vit.norm(x))

    def features(
        self, tokens: Tensor, entry: int, updates: Mapping[tuple[int, str], LowRank] | None = None, whole: bool = False
    ) -> Tensor:
        """Features (B, width) from the tokens that enter block ``entry``.

        ``updates`` are of linear layers from that block on, by block and name, such as (3, 'attn.qkv'). Where the head
        reads the first token alone, so does the last block, without calling attn.qkv, unless it must run ``whole``.
        """
        if entry == self.depth:
            return tokens
        updates, last = dict(updates or {}), self.vit.blocks[-1]
        is_short = self._needs_first_token and not whole
        qkv = updates.pop((self.depth - 1, QKV), None) if is_short else None
        with adapted((self.linear(*place), update) for place, update in updates.items()):
            for block in self.vit.blocks[entry:-1]:
                tokens = run_block(block, tokens)
            tokens = first_token_only(last, tokens, qkv) if is_short else run_block(last, tokens)
        return self.vit.forward_head(self.vit.norm(tokens))


class FrozenViTNet(Net):
    """A net on the frozen ViT, whose blocks before ``entry`` are constant: their output can be cached.

    ``entry`` is the ViT's depth, where only its features are used, if None.
    """

    foundation: Foundation

    def __init__(self, model: Foundation, entry: int | None = None) -> None:
        super().__init__()
        self.foundation, self.entry = model, model.depth if entry is None else entry

    @property
    def prefix_key(self) -> str:
        """The ViT's weights, its input size and ``entry``."""
        return f"{self.foundation.fingerprint}/{self.foundation.image_size}/{self.entry}"

    def frozen_prefix(self, images: Tensor, block: int | None = None) -> Tensor:
        """Tokens (B, N, width) that enter a block, ``entry`` if None; features (B, width) at the depth."""
        model, block = self.foundation.to(images.device), self.entry if block is None else block
        return model.tokens(prepare(images, model.image_size, model.mean, model.std), block)


class FoundationClassifier(FrozenViTNet):
    """A frozen ViT with a trainable head (the paper's FedAvg+ViT)."""

    def __init__(self, config: FoundationConfig, num_classes: int, head: str = "linear") -> None:
        super().__init__(foundation(config))
        self.head = make_head(head, self.foundation.width, num_classes)

    @override
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Output:
        features = self.frozen_prefix(images) if prefix is None else prefix.float()
        return Output(features, self.head(features))


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


def create_vit(config: FoundationConfig) -> nn.Module:
    """A plain VisionTransformer of timm with its weights, on the CPU."""
    check_timm_name(config.name, "foundation")
    size: dict[str, Any] = {} if config.image_size is None else {"img_size": config.image_size}
    fix = "choose a name such as vit_* or deit_* whose timm class is VisionTransformer"
    ways = f"{fix}, or set weights to a safetensors file or 'random'" if config.weights == "timm" else fix
    with explained(f"foundation {config.name!r} with weights {config.weights!r} could not be created", ways):
        vit = timm.create_model(config.name, pretrained=config.weights == "timm", num_classes=0, **size)
    if not isinstance(vit, VisionTransformer) or type(vit).forward_features is not VisionTransformer.forward_features:
        kind = type(vit).__name__
        raise ValueError(f"foundation must be a plain VisionTransformer, got {config.name!r} of class {kind}: {fix}.")
    patch = vit.patch_embed.patch_size[0]
    if config.image_size is not None and config.image_size % patch:
        raise ValueError(f"image_size must be a multiple of the patch size {patch}, got {config.image_size}.")
    if config.weights not in ("timm", "random"):
        path = str(GLYPH_WEIGHTS) if config.weights == "bundled" else config.weights
        if not Path(path).is_file():
            raise ValueError(f"weights must be a safetensors file, 'timm', 'bundled' or 'random', got {path!r}.")
        state = without_wrapper(read_weights(path, "weights"), path)
        body = {name: value.float() for name, value in state.items() if not name.startswith(("head.", "head_dist."))}
        with explained(f"weights {path!r} do not fit {config.name!r}", "choose the timm name they were saved from"):
            vit.load_state_dict(checkpoint_filter_fn(body, vit))
    return vit


def without_wrapper(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Names without the prefix of a wrapper such as DistributedDataParallel."""
    prefixes = sorted(name.removesuffix(PATCHES) for name in state if name.endswith(PATCHES)) or [""]
    if len(prefixes) > 1:
        found = " and ".join(map(repr, prefixes))
        raise ValueError(f"weights must hold one model, got {path!r} with prefixes {found}: keep one model's tensors.")
    return {name.removeprefix(prefixes[0]): value for name, value in state.items()}
