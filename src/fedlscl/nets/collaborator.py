"""Collaborator: small model, parameter generator and frozen ViT (Sec. 4.1, Eq. 2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedlscl.nets.cnn import SmallModel, UnitFeatures
from fedlscl.nets.heads import AnalyticHead, make_head
from fedlscl.nets.lora import LowRankShape, split_lora
from fedlscl.nets.net import Net, prepare
from fedlscl.nets.vit import Foundation, FoundationConfig, foundation

# The parameter generator phi: a linear map from a client's features to the LoRA weights of the frozen ViT (Eq. 2).


class ParameterGenerator(nn.Linear):
    """phi: E (B, feature_dim) to W (B, lora_dim).

    With unit-norm features, entries for the reading factor start as N(0, 1 / in_features) and those for the writing
    factor as exact zeros, so that the adapted ViT begins as the frozen one, bit for bit (ours; not in the paper).
    """

    def __init__(self, feature_dim: int, shapes: list[LowRankShape]) -> None:
        self.shapes = shapes
        super().__init__(feature_dim, sum(shape.size for shape in shapes))

    def reset_parameters(self) -> None:
        """Draw the reading factors, zero the writing ones and the bias."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        start = 0
        for shape in self.shapes:
            with torch.no_grad():
                self.weight[start : start + shape.down_size].normal_(std=shape.in_features**-0.5)
            start += shape.size

    @property
    def matrix(self) -> Tensor:
        """Phi with the bias as last row, (feature_dim + 1, lora_dim): W = Phi^T [E; 1]."""
        return torch.cat([self.weight.mT, self.bias[None]]).detach()

    @torch.no_grad()
    def load_matrix(self, matrix: Tensor) -> None:
        """Take over Phi as ``matrix`` gives it."""
        self.weight.copy_(matrix[:-1].mT)
        self.bias.copy_(matrix[-1])


# The large-small collaborative model: CNN features drive a generator of LoRA weights for a frozen ViT (Sec. 4.2).

HEADS = {"analytic": "frozen", "adapted": "tokens"}
"""Closed-form heads of a collaborator, by the parts that hold them, and the output that each reads."""


class Collaboration(NamedTuple):
    """What the collaborator computes for a batch."""

    features: Tensor
    """E of the small model, (B, feature_dim), unit norm; (B, 0) without collaboration."""
    lora: Tensor
    """W of the generator, (B, lora_dim); (B, 0) without collaboration."""
    tokens: Tensor
    """Features of the adapted foundation model, (B, width): what the head reads."""
    frozen: Tensor
    """Features of the frozen ViT, (B, width), where there is an analytic head to read them."""
    head_logits: Tensor
    """Logits of the trained head, (B, num_classes)."""
    logits: Tensor
    """(B, num_classes): the trained head's, and in evaluation mode the analytic heads' added."""


@dataclass(frozen=True, kw_only=True)
class CollaboratorConfig:
    """The shape of one client's collaborative model."""

    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    """The frozen ViT, shared by all clients."""
    small_model: str = "resnet18"
    """The client's CNN, any timm name with feature maps; it is never uploaded."""
    small_image_size: int = 224
    """Input size of the CNN in pixels, apart from the ViT's (ours; the paper has one size of 224)."""
    pretrained: bool = False
    """Start the CNN from timm's weights instead of from scratch."""
    feature_dim: int = 512
    """Dimension of E, common to all small models (ours; the paper does not say how sizes meet)."""
    block: int = 3
    """The adapted ViT block, counted from 0 (Fig. 3)."""
    targets: Sequence[str] = ("attn.qkv",)
    """Its adapted linear layers (ours; not in the paper)."""
    rank: int = 4
    """LoRA rank (ours; not in the paper)."""
    alpha: float = 4.0
    """LoRA scale numerator, applied as alpha / rank (ours; not in the paper)."""
    head: Literal["cosine", "linear"] = "cosine"
    """'linear' is the paper's; 'cosine' with imprinted rows forgets far less (ours)."""
    analytic_weight: float = 2.0
    """Weight at evaluation of a closed-form head on the frozen ViT's features beside the trained head's logits; with 0
    there is none, as in the paper (ours)."""
    adapted_weight: float = 2.0
    """The same for a closed-form head on the adapted features (ours)."""
    collaboration: bool = True
    """Without it the frozen ViT and the head remain (ablation)."""


class Collaborator(Net):
    """theta_i, phi_i and H_i over the shared Theta; its state dict is what the client owns."""

    foundation: Foundation

    def __init__(self, config: CollaboratorConfig, num_classes: int) -> None:
        super().__init__()
        if config.rank < 1:
            raise ValueError(f"rank {config.rank} makes no adapter: choose 1 or more.")
        if config.feature_dim < 1:
            raise ValueError(f"feature_dim {config.feature_dim} leaves no features: choose 1 or more.")
        self.config, self.num_classes = config, num_classes
        self.foundation = foundation(config.foundation)
        self.foundation.block(config.block)
        layers = [self.foundation.linear(config.block, target) for target in config.targets]
        self.shapes = [LowRankShape(layer.in_features, layer.out_features, config.rank) for layer in layers]
        if config.collaboration:
            self.small = SmallModel(config.small_model, config.small_image_size, config.pretrained)
            self.unit = UnitFeatures(self.small.width, config.feature_dim)
            self.generator = ParameterGenerator(config.feature_dim, self.shapes)
        self.head = make_head(config.head, self.foundation.width, num_classes)
        self.analytic = AnalyticHead(self.foundation.width, num_classes)
        if config.collaboration:
            self.adapted = AnalyticHead(self.foundation.width, num_classes)

    @property
    def prefix_key(self) -> str:
        """The ViT's weights, its input size, the block at which cached tokens enter, and what comes with them."""
        extra = "+frozen" if self._keeps_frozen else ""
        return f"{self.foundation.fingerprint}/{self.foundation.image_size}/{self._entry}{extra}"

    @property
    def has_adapted_head(self) -> bool:
        """Whether there is an analytic head on the adapted features."""
        return self.config.collaboration and self.config.adapted_weight > 0

    @property
    def _entry(self) -> int:
        return self.config.block if self.config.collaboration else self.foundation.depth

    @property
    def _keeps_frozen(self) -> bool:
        return self.config.collaboration and self.config.analytic_weight > 0

    def frozen_prefix(self, images: Tensor) -> Tensor:
        """Tokens (B, N, width) that enter the adapted block; the blocks before it see no adapter.

        With an analytic head on the frozen path, the frozen ViT's features follow as one more token, (B, N + 1, width).
        """
        model = self.foundation.to(images.device)
        tokens = model.tokens(prepare(images, model.image_size, model.mean, model.std), self._entry)
        if not self._keeps_frozen:
            return tokens
        with torch.no_grad():
            return torch.cat([tokens, model.features(tokens, self._entry)[:, None]], 1)

    def generate(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """E = theta_i(x) and W = phi_i(E), Eq. 2: (B, feature_dim) and (B, lora_dim)."""
        if not self.config.collaboration:
            empty = images.new_zeros((len(images), 0), dtype=self.head.weight.dtype)
            return empty, empty
        features = self.embed(images)
        return features, self.generator(features)

    def embed(self, images: Tensor) -> Tensor:
        """E = theta_i(x), (B, feature_dim)."""
        return self.unit(self.small(images))

    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Collaboration:
        """Classify stored images (B, 3, h, w) with a LoRA of their own each."""
        features, lora = self.generate(images)
        entering = self.frozen_prefix(images) if prefix is None else prefix
        frozen = entering[:, -1] if self._keeps_frozen else entering
        if self._keeps_frozen:
            entering = entering[:, :-1]
        scale = self.config.alpha / self.config.rank
        factors = split_lora(lora, self.shapes, scale) if lora.shape[1] else []
        updates = dict(zip(self.config.targets, factors, strict=False))
        tokens = self.foundation.to(images.device).features(entering, self._entry, updates)
        trained = logits = self.head(tokens)
        if not self.training and self.config.analytic_weight > 0:
            logits = logits + self.config.analytic_weight * self.analytic(frozen)
        if not self.training and self.has_adapted_head:
            logits = logits + self.config.adapted_weight * self.adapted(tokens)
        return Collaboration(features, lora, tokens, frozen, trained, logits)
