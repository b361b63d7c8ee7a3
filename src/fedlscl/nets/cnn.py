"""The small model theta_i: a timm CNN with a private projection to the common feature space."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fedlscl.nets.net import Classification, LinearHead, Net, prepare
from fedlscl.nets.vit import check_timm_name, first_line

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet; pretrained weights have their own."""


class SmallModel(nn.Module):
    """A CNN of timm by name, pooled: stored uint8 images (B, 3, h, w) to (B, width).

    Images are normalised with ImageNet's mean and std, pretrained models with those of their weights.

    Args:
        name: of the model.
        image_size: side of its input in pixels.
        pretrained: start from timm's weights.
        weights: start from a safetensors file in timm's names instead; its head is ignored.
        options: further arguments of ``timm.create_model``, such as norm_layer.

    Raises:
        ValueError: if timm has no such model or no weights for it, if the file does not fit, or if the model does not
            return one tensor of features with ``num_features`` channels for images of ``image_size`` pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        image_size: int,
        pretrained: bool = False,
        weights: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        import timm

        if pretrained and weights:
            raise ValueError(
                f"pretrained must be false with small_weights, got true and {weights!r}: choose one of them."
            )
        check_timm_name(name, "small_model")
        self.name, self.image_size = name, image_size
        try:
            self.cnn: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **(options or {}))
        except Exception as error:  # missing weights and failed downloads raise errors of the client library
            fix = "choose a name from timm.list_models(pretrained=True), connect to the network, or set pretrained to "
            raise ValueError(
                f"small_model {name!r} could not be created ({first_line(error)}): "
                f"{fix + 'false' if pretrained else 'choose another name'}."
            ) from error
        if weights:
            load_cnn(self.cnn, name, Path(weights))
        try:
            maps = drop_unused(self.cnn, image_size)
        except Exception as error:  # models raise any error for an input of another size or kind
            raise ValueError(
                f"small_model {name!r} cannot take images of {image_size} pixels ({first_line(error)}): choose another "
                "small_image_size or a CNN."
            ) from error
        try:
            self.pooled_axes, self.width = layout(self.cnn, maps)
        except ValueError as error:
            raise ValueError(f"small_model {name!r} {error}: choose another timm model.") from error
        cfg = getattr(self.cnn, "pretrained_cfg", {}) if pretrained or weights else {}
        self.normalisation = {"mean": list(cfg.get("mean", MEAN)), "std": list(cfg.get("std", STD))}
        for statistic, values in self.normalisation.items():
            self.register_buffer(statistic, torch.tensor(values), persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps averaged over the image, token sequences over all tokens, without timm's head."""
        x = prepare(images, self.image_size, self.mean, self.std)
        return self.pool(self.cnn.forward_features(x.contiguous(memory_format=torch.channels_last)))

    def pool(self, maps: Tensor) -> Tensor:
        """Feature maps (B, width, h, w) or (B, h, w, width), tokens (B, N, width) or features to (B, width)."""
        return maps.mean(self.pooled_axes) if self.pooled_axes else maps


class ProjectedFeatures(nn.Module):
    """E: pooled features projected to feature_dim and, with ``unit_norm``, centred and scaled to norm 1 (ours).

    Without this scale one Adam step moves every generated weight by about 0.4, which destroys the ViT's features; with
    it the trace of every client's second moment is one, so that lambda of Eq. 5 does not depend on the small model.
    """

    def __init__(self, width: int, feature_dim: int, unit_norm: bool = True) -> None:
        super().__init__()
        self.feature_dim, self.unit_norm = feature_dim, unit_norm
        self.project = nn.Identity() if width == feature_dim else nn.Linear(width, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) to (B, feature_dim), float32."""
        x = self.project(x).float()
        return F.layer_norm(x, (self.feature_dim,)) * self.feature_dim**-0.5 if self.unit_norm else x


class SmallClassifier(Net):
    """A small model with a linear head, as in FedAvg."""

    def __init__(self, name: str, num_classes: int, image_size: int, pretrained: bool = False) -> None:
        super().__init__()
        self.small = SmallModel(name, image_size, pretrained)
        self.head = LinearHead(self.small.width, num_classes)

    @override
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Classification:
        features = self.small(images)
        return Classification(features, self.head(features))


def load_cnn(cnn: Any, name: str, path: Path) -> None:
    """Load a safetensors file in timm's names into a CNN without a head, in float32.

    Raises:
        ValueError: if the file cannot be read, or does not have all weights of the CNN in its shapes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"small_weights must be a safetensors file, got {str(path)!r}: give the path of one.")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"small_weights must be a safetensors file, got {str(path)!r} ({first_line(error)}): convert it."
        ) from error
    expected = cnn.state_dict()
    for part, value in expected.items():
        if part not in found:
            if part.endswith("num_batches_tracked"):
                continue
            raise ValueError(f"small_weights must be of {name}, got {str(path)!r} without {part}: choose its file.")
        if found[part].shape != value.shape or not found[part].isfinite().all():
            raise ValueError(
                f"small_weights must be of {name}, got {str(path)!r} with {part} of shape {tuple(found[part].shape)} "
                "or values that are not finite: choose its file."
            )
    cnn.load_state_dict(
        {part: found[part].to(value) for part, value in expected.items() if part in found}, strict=False
    )


def drop_unused(cnn: Any, image_size: int) -> Any:
    """Drop the parts that ``forward_features`` does not use (120 M of vgg16's weights); returns its output."""
    cnn.eval()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        maps = cnn.forward_features(torch.randn(1, 3, image_size, image_size))
        if isinstance(maps, Tensor):
            maps.sum().backward()
            for name, child in list(cnn.named_children()):
                parameters = list(child.parameters())
                if parameters and all(p.grad is None for p in parameters):
                    setattr(cnn, name, nn.Identity())
    cnn.zero_grad(set_to_none=True)
    cnn.train()
    return maps


def layout(cnn: Any, maps: Any) -> tuple[tuple[int, ...], int]:
    """Axes to average over and number of channels of ``cnn``'s feature maps.

    Maps are (B, C, h, w) unless ``cnn.output_fmt`` says 'NHWC'; three axes are tokens (B, N, C).

    Raises:
        ValueError: without the model's name, if ``maps`` is not one tensor or has not ``cnn.num_features`` channels.
    """
    if not isinstance(maps, Tensor):
        raise ValueError(f"must return one tensor of features, got a {type(maps).__name__}")
    order = getattr(cnn, "output_fmt", None) or "NCHW"
    channels = order.index("C") if maps.dim() == len(order) else maps.dim() - 1
    width = maps.shape[channels] if 2 <= maps.dim() <= 4 else None
    declared = getattr(cnn, "num_features", width)
    if width is None or width != declared:
        raise ValueError(f"must return features with {declared} channels, got shape {tuple(maps.shape)}")
    return tuple(axis for axis in range(1, maps.dim()) if axis != channels), width
