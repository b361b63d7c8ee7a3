"""Net, the interface of all nets; linear and cosine heads; the small model theta_i, a CNN of timm."""

import difflib
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

if TYPE_CHECKING:
    from fedlscl.nets.vit import Foundation


@dataclass
class Output:
    """What a net returns for a batch; a net with more to tell extends it."""

    features: Tensor
    """(B, width)."""
    logits: Tensor
    """(B, num_classes)."""

    @property
    def head_input(self) -> Tensor:
        """The features that the head classifies, (B, width)."""
        return self.features


class Net(nn.Module, ABC):
    """A plain torch module without clients, tasks or Lightning; ``head`` maps features to one row per class."""

    head: Any
    """A module with a `weight` of one row per class."""
    foundation: "Foundation | None" = None
    """The frozen ViT inside, if any; it is not part of the state dict."""

    if TYPE_CHECKING:  # for torch, a part is a tensor or any module

        def __getattr__(self, name: str) -> Any: ...

    @abstractmethod
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Output:
        """Classify stored images (B, 3, height, width), uint8; ``prefix`` is ``frozen_prefix(images)`` if cached."""

    @property
    def prefix_key(self) -> str | None:
        """Identifies the frozen computation on the images, if any: equal keys give equal prefixes."""
        return None

    def frozen_prefix(self, images: Tensor) -> Tensor:
        """Output of the frozen part, (B, ...), which is computed once per image and run."""
        raise NotImplementedError(f"{type(self).__name__} has no frozen part")


def prepare(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Stored images (B, 3, h, w) as normalised floats (B, 3, size, size)."""
    return (fit(images, size) - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def fit(images: Tensor, size: int) -> Tensor:
    """Stored images (B, 3, h, w), uint8 or floats in 0..1 as ToTensor gives them, as floats of (B, 3, size, size)."""
    x = images.to(torch.float32)  # a synthesizer's may be bf16, which is not interpolated on a CPU
    if not images.is_floating_point():
        x = x / 255
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp_(0, 1)
    return x


class Frozen(nn.Module):
    """A net without gradient and always in eval mode, part of its owner's state dict."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net.requires_grad_(False).eval()

    @override
    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    @override
    @torch.no_grad()
    def forward(self, *args: Tensor | None) -> Output:
        return self.net(*args)


def freeze_batch_norm(module: nn.Module) -> None:
    """Put BatchNorm in eval mode (running statistics alone can move old samples' features by their norm)."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


@contextmanager
def single_value_norms(module: nn.Module) -> Iterator[None]:
    """Let normalisation layers in training mode use running statistics for one value per channel (ours).

    BatchNorm refuses an input of (1, C) or (1, C, 1, 1), whose variance is undefined. Here it is normalised as in
    evaluation mode, and leaves the statistics as they are. Any other input gives the same bits as without the context.
    """

    def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layer.training = inputs[0].numel() > inputs[0].shape[1]

    def after(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer.training = True

    with ExitStack() as hooks:
        for layer in module.modules():
            if layer.training and getattr(layer, "running_var", None) is not None:
                hooks.enter_context(layer.register_forward_pre_hook(before))
                hooks.enter_context(layer.register_forward_hook(after, always_call=True))
        yield


class SmallMapPrecision(TorchFunctionMode):
    """Run padded convolutions whose stride exceeds the width of the feature map in float32 under CPU autocast.

    Their bf16 weight gradient has uninitialised entries on CPUs with AVX-512 (torch 2.15, oneDNN), in kernel columns
    that cover padding only.
    """

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _convolve if func is torch.conv2d and torch.is_autocast_enabled("cpu") else func
        return call(*args, **(kwargs or {}))


def _convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, *rest: Any, **kw: Any
) -> Tensor:
    step, pad = (value if isinstance(value, int) else value[-1] for value in (stride, padding))
    # Padding may also be "same", which needs a stride of 1, or "valid", which is none.
    if input.device.type != "cpu" or input.shape[-1] >= step or isinstance(padding, str) or not pad:
        return torch.conv2d(input, weight, bias, stride, padding, *rest, **kw)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        output = torch.conv2d(input.float(), weight.float(), bias, stride, padding, *rest, **kw)
    return output.to(torch.get_autocast_dtype("cpu"))


class LinearHead(nn.Linear):
    """The paper's head: features (B, width) to logits (B, num_classes)."""

    def imprint(self, classes: Tensor, means: Tensor) -> None:
        """Does nothing: a linear head starts from random rows."""


class UnitLinearHead(nn.Linear):
    """A linear head on features scaled to unit norm, as ridge regression solves it."""

    @override
    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features.float()), self.weight, self.bias)


class CosineHead(nn.Module):
    """Scaled cosine between features and one unit row per class (ours; not in the paper).

    A class whose row is imprinted with its mean feature begins at nearest-class-mean accuracy (Qi et al., CVPR 2018,
    arXiv 1712.07136), and no row can win by norm alone.
    """

    def __init__(self, width: int, num_classes: int, scale: float = 20.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(num_classes, width) * width**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) to (B, num_classes)."""
        return self.scale * F.linear(F.normalize(features.float()), F.normalize(self.weight))

    @torch.no_grad()
    def imprint(self, classes: Tensor, means: Tensor) -> None:
        """Set the rows of ``classes`` (C,) to the directions of ``means`` (C, width)."""
        self.weight[classes] = F.normalize(means.to(self.weight))


def make_head(kind: str, width: int, num_classes: int) -> nn.Module:
    """A head by its name in the configuration: linear, cosine or unit."""
    heads = {"linear": LinearHead, "cosine": CosineHead, "unit": UnitLinearHead}
    if kind not in heads:
        raise ValueError(f"head must be one of {', '.join(heads)}, got {kind!r}.")
    return heads[kind](width, num_classes)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet; pretrained weights have their own."""


class SmallModel(nn.Module):
    """A CNN of timm by name, pooled: stored uint8 images (B, 3, h, w) to (B, width).

    The model must return one tensor of features with ``num_features`` channels for images of ``image_size`` pixels.
    Images are normalised with ImageNet's mean and std, or with those of the weights: timm's if ``pretrained``, or a
    safetensors file in timm's names, whose head is ignored. ``options`` are arguments of ``timm.create_model``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, image_size: int, pretrained: bool = False, weights: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if pretrained and weights:
            raise ValueError(f"pretrained must be false with small_weights {weights!r}, got true: choose one of them.")
        check_timm_name(name, "small_model")
        self.name, self.image_size = name, image_size
        model = f"small_model {name!r}"
        fix = "choose a name from timm.list_models(pretrained=True), connect to the network, or set pretrained to false"
        with explained(f"{model} could not be created", fix if pretrained else "choose another name"):
            self.cnn: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **(options or {}))
        if weights:
            state = read_weights(weights, "small_weights")
            with explained(f"small_weights must be of {name}, got {weights!r}", "choose its file"):
                self.cnn.load_state_dict({part: state[part] for part in self.cnn.state_dict() if part in state})
        fix = "choose another small_image_size or a CNN"
        with explained(f"{model} cannot take images of {image_size} pixels", fix):
            maps = drop_unused(self.cnn, image_size)
        self.pooled_axes, self.width = layout(self.cnn, maps, model)
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
    it lambda of Eq. 5 does not depend on the small model, since the trace of every client's second moment is one.
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
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Output:
        features = self.small(images)
        return Output(features, self.head(features))


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


def layout(cnn: Any, maps: Any, model: str) -> tuple[tuple[int, ...], int]:
    """Axes to average over and number of channels of ``cnn``'s feature maps; ``model`` names it in errors.

    Maps are (B, C, h, w) unless ``cnn.output_fmt`` says 'NHWC'; three axes are tokens (B, N, C).
    """
    fix = "choose another timm model"
    if not isinstance(maps, Tensor):
        raise ValueError(f"{model} must return one tensor of features, got a {type(maps).__name__}: {fix}.")
    order = getattr(cnn, "output_fmt", None) or "NCHW"
    channels = order.index("C") if maps.dim() == len(order) else maps.dim() - 1
    width = maps.shape[channels] if 2 <= maps.dim() <= 4 else None
    declared = getattr(cnn, "num_features", width)
    if width is None or width != declared:
        raise ValueError(f"{model} must return features with {declared} channels, got shape {[*maps.shape]}: {fix}.")
    return tuple(axis for axis in range(1, maps.dim()) if axis != channels), width


def check_timm_name(name: str, option: str) -> None:
    """Raise ValueError for a name that timm does not know, with the nearest known ones."""
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5))
        hint = f"did you mean {near}" if near else "see timm.list_models()"
        raise ValueError(f"{option} {name!r} is unknown to timm: {hint}.")


def read_weights(path: str, option: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, which must be finite; ``option`` names it in errors."""
    fix = "download it again or convert it to safetensors, as docs/own_models.md shows"
    with explained(f"{option} must be a safetensors file, got {path!r}", fix):
        state = load_file(path)
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{option} must be finite, got NaN or infinity in {name} of {path!r}: choose other weights."
            )
    return state


@contextmanager
def explained(problem: str, fix: str) -> Iterator[None]:
    """Turn any error of the block, as other libraries raise them, into a ValueError of one line that names a fix."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        line = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
        reason = textwrap.shorten(line.rstrip("."), 160, placeholder=" ...")
        raise ValueError(f"{problem} ({reason}): {fix}.") from error
