"""Collaborator: small model, parameter generator and frozen ViT (Sec. 4.1, Eq. 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.nets.net import Output, ProjectedFeatures, SmallModel, make_head
from fedlscl.nets.vit import FoundationConfig, FrozenViTNet, LowRankShape, foundation, split_lora
from fedlscl.options import Count, Positive, Whole, check_options

GeneratorStart = Literal["split", "per_image"]
PHI_SCALE = 0.3
"""Standard deviation of Phi's start relative to that of b (ours)."""


class ParameterGenerator(nn.Linear):
    """phi of Eq. 2, a linear map of E (B, feature_dim) to LoRA weights W (B, lora_dim): W = Phi^T E + b.

    b is a LoRA that all images share, and Phi what each image changes; a ``feature_dim`` of 0 leaves b alone. The start
    is ours; the paper has none. Entries of B (up-projection) start as zeros, so that the adapted ViT equals the frozen
    one bit for bit; those of A (down-projection) with a variance of 1 / in_features in b, for E of unit norm, and a
    standard deviation of ``PHI_SCALE`` times that in Phi, or, with a ``start`` 'per_image', in Phi alone.
    """

    def __init__(self, feature_dim: int, shapes: list[LowRankShape], start: GeneratorStart = "split") -> None:
        self.shapes, self.start = shapes, start
        super().__init__(feature_dim, sum(shape.size for shape in shapes))

    @override
    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.zero_()
        self.bias.zero_()
        begin, scale = 0, PHI_SCALE if self.start == "split" else 1.0
        for shape in self.shapes:
            down = slice(begin, begin + shape.down_size)
            self.weight[down].normal_(std=scale * shape.in_features**-0.5)
            if self.start == "split":
                self.bias[down].normal_(std=shape.in_features**-0.5)
            begin += shape.size

    @property
    def matrix(self) -> Tensor:
        """Phi with the bias as last row, (feature_dim + 1, lora_dim): W = Phi^T [E; 1]."""
        return torch.cat([self.weight.mT, self.bias[None]]).detach()

    @torch.no_grad()
    def load_matrix(self, matrix: Tensor) -> None:
        """Load Phi from ``matrix``."""
        self.weight.copy_(matrix[:-1].mT)
        self.bias.copy_(matrix[-1])


@dataclass
class Collaboration(Output):
    """Output of a collaborator for a batch.

    ``features`` are E of the small model, (B, feature_dim), by default of unit norm; (B, 0) without collaboration.
    """

    lora: Tensor
    """W of the generator, (B, lora_dim); (B, 0) without collaboration."""
    tokens: Tensor
    """Features of the adapted foundation model, (B, width)."""

    @property
    @override
    def head_input(self) -> Tensor:
        return self.tokens


@dataclass(frozen=True, kw_only=True)
class CollaboratorConfig:
    """The shape of one client's collaborative model."""

    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT, shared by all clients."""
    small_model: str = "resnet18"
    """The client's CNN, any timm name with feature maps; it is never uploaded. 'none' leaves the static LoRA b alone: a
    control of what the CNN contributes (ours)."""
    small_image_size: Count = 224
    """Input size of the CNN in pixels, apart from the ViT's (ours; the paper has one size of 224)."""
    pretrained: bool = False
    """Start the CNN from timm's weights instead of from scratch."""
    small_weights: str = ""
    """Start the CNN from a safetensors file in timm's names; images are normalised as timm states for the name."""
    small_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model for the CNN, such as norm_layer: groupnorm for ResNets."""
    freeze_small: bool = False
    """Do not train the CNN; the projection of its features is trained (ours)."""
    feature_dim: Count = 512
    """Dimension of E, common to all small models (ours; not in the paper)."""
    unit_features: bool = True
    """Centre E over its dimensions and scale it to unit norm (ours); the paper's are raw projected features."""
    generator_start: GeneratorStart = "split"
    """'split': a random LoRA that all images share, plus a smaller part of each image; 'per_image': the latter alone
    (ours; not in the paper)."""
    blocks: Sequence[Whole] | Literal["all"] = "all"
    """The adapted ViT blocks, counted from 0; 'all' is ours, the paper adapts one (Fig. 3)."""
    targets: Sequence[str] = ("attn.qkv",)
    """Their adapted linear layers (ours; not in the paper)."""
    rank: Count = 4
    """LoRA rank (ours; not in the paper)."""
    alpha: Positive = 4.0
    """LoRA scale numerator, applied as alpha / rank (ours; not in the paper)."""
    head: Literal["cosine", "linear"] = "cosine"
    """'linear' is the paper's; 'cosine' with imprinted rows forgets far less (ours)."""
    collaboration: bool = True
    """If false, the net is the frozen ViT and the head (ablation)."""

    def __post_init__(self) -> None:
        check_options(self)


class Collaborator(FrozenViTNet):
    """theta_i, phi_i and H_i on the shared Theta (Sec. 4.2); its state dict is what the client owns."""

    def __init__(self, config: CollaboratorConfig, num_classes: int) -> None:
        model = foundation(config.foundation)
        blocks = range(model.depth) if config.blocks == "all" else sorted(set(config.blocks))
        if not blocks or not config.targets:
            fix = "name both, or set collaboration to false"
            raise ValueError(f"blocks and targets must not be empty, got {config.blocks} and {config.targets}: {fix}.")
        self.adapted = [(block, target) for block in blocks for target in config.targets]
        layers = [model.linear(block, target) for block, target in self.adapted]
        super().__init__(model, blocks[0] if config.collaboration else None)
        self.config, self.num_classes = config, num_classes
        self.shapes = [LowRankShape(layer.in_features, layer.out_features, config.rank) for layer in layers]
        self.has_small_model = config.collaboration and config.small_model != "none"
        self.feature_dim = config.feature_dim if self.has_small_model else 0
        if self.has_small_model:
            start = config.pretrained, config.small_weights, config.small_options
            self.small = SmallModel(config.small_model, config.small_image_size, *start)
            self.small.requires_grad_(not config.freeze_small)
            self.unit = ProjectedFeatures(self.small.width, config.feature_dim, config.unit_features)
        if config.collaboration:
            self.generator = ParameterGenerator(self.feature_dim, self.shapes, config.generator_start)
        self.head = make_head(config.head, self.foundation.width, num_classes)

    @override
    def train(self, mode: bool = True) -> "Collaborator":
        """Set the mode; a CNN that is not trained stays in eval mode, its dropout included."""
        super().train(mode)
        if self.has_small_model and self.config.freeze_small:
            self.small.eval()
        return self

    def generate(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """E = theta_i(x) and W = phi_i(E), Eq. 2: (B, feature_dim) and (B, lora_dim)."""
        features = self.embed(images)
        if not self.config.collaboration:
            return features, features
        # Casting Phi to bfloat16 and its gradient back takes longer than the product in float32.
        with torch.autocast(features.device.type, enabled=False):
            return features, self.generator(features)

    def embed(self, images: Tensor) -> Tensor:
        """E = theta_i(x), (B, feature_dim); (B, 0) without a small model."""
        if not self.has_small_model:
            return images.new_zeros((len(images), 0), dtype=torch.float32)
        return self.unit(self.small(images))

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Collaboration:
        """Classify stored images (B, 3, h, w), each with its generated LoRA."""
        features, lora = self.generate(images)
        entering = self.frozen_prefix(images) if prefix is None else prefix
        scale = self.config.alpha / self.config.rank
        factors = split_lora(lora, self.shapes, scale) if self.config.collaboration else []
        updates = dict(zip(self.adapted, factors, strict=False))
        tokens = self.foundation.to(images.device).features(entering, self.entry, updates)
        return Collaboration(features, self.head(tokens), lora, tokens)
