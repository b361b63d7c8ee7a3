"""Interface of all nets (logits in a NamedTuple, a head with a row per class, a frozen part to cache), and heads."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

if TYPE_CHECKING:
    from fedlscl.nets.vit import Foundation


class Output(Protocol):
    """What teachers, objectives and evaluation need of a net's output."""

    @property
    def logits(self) -> Tensor:
        """Logits, (B, num_classes)."""
        ...

    @property
    def head_logits(self) -> Tensor:
        """Logits of the gradient-trained head (without closed-form heads), (B, num_classes)."""
        ...

    @property
    def head_input(self) -> Tensor:
        """The features that the head classifies, (B, width)."""
        ...


class Classification(NamedTuple):
    """Output of a net that is an encoder and a head."""

    features: Tensor
    """Input of the head, (B, width)."""
    logits: Tensor
    """(B, num_classes)."""

    @property
    def head_logits(self) -> Tensor:
        """The same: there is one head."""
        return self.logits

    @property
    def head_input(self) -> Tensor:
        """The features."""
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
    """Stored images (B, 3, h, w) as floats in 0..1 of (B, 3, size, size).

    Images are uint8 in 0..255, or floats in 0..1 as torchvision's ToTensor gives them.
    """
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
        del mode
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

    The variance of a single value is undefined, and BatchNorm refuses an input of (1, C) or (1, C, 1, 1). Such an
    input is normalised as in evaluation mode and leaves the running statistics as they are; the layer's weight and
    bias still get a gradient. Any other input gives the same bits as without this context.
    """

    def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layer.training = inputs[0].numel() > inputs[0].shape[1]

    def after(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer.training = True

    handles = []
    for layer in module.modules():
        if layer.training and getattr(layer, "running_var", None) is not None:
            handles += [
                layer.register_forward_pre_hook(before),
                layer.register_forward_hook(after, always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SmallMapPrecision(TorchFunctionMode):
    """Run padded convolutions whose stride exceeds the width of the feature map in float32 under CPU autocast.

    Their bf16 weight gradient has uninitialised entries on CPUs with AVX-512 (torch 2.15, oneDNN), in kernel columns
    that cover padding only. Other shapes and float32 gradients are not affected.
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

    A class whose row is imprinted with its mean feature begins at nearest-class-mean accuracy
    (Qi et al., CVPR 2018, arXiv 1712.07136), and no row can win by norm alone.
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
