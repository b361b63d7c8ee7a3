"""What every net promises: logits in a NamedTuple, a head by class, and a frozen part that may be cached."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from fedlscl.nets.vit import Foundation


class Output(Protocol):
    """The least that a net returns; teachers, objectives and evaluation need no more."""

    @property
    def logits(self) -> Tensor:
        """Scores, (B, num_classes)."""
        ...

    @property
    def head_logits(self) -> Tensor:
        """Scores of the trained head: the same, unless a head of another origin answers."""
        ...


class Classification(NamedTuple):
    """Output of a net that is an encoder and a head."""

    features: Tensor
    """What the head reads, (B, width)."""
    logits: Tensor
    """(B, num_classes)."""

    @property
    def head_logits(self) -> Tensor:
        """The trained head is the only one."""
        return self.logits


class Net(nn.Module, ABC):
    """A plain torch module without clients, tasks or Lightning; ``head`` maps features to one row per class."""

    head: Any
    """A module with a `weight` of one row per class."""
    foundation: "Foundation | None" = None
    """The frozen ViT inside, where there is one; it is no part of the state dict."""

    if TYPE_CHECKING:
        # torch says that a part is a tensor or a module of any kind; which one it is, each net knows of its own.
        def __getattr__(self, name: str) -> Any: ...

    @abstractmethod
    def forward(self, images: Tensor, prefix: Tensor | None = None) -> Output:
        """Classify stored images (B, 3, height, width), uint8; ``prefix`` is ``frozen_prefix(images)`` where known."""

    @property
    def prefix_key(self) -> str | None:
        """Names the frozen computation on the images; None where there is none. Equal keys give equal prefixes."""
        return None

    def frozen_prefix(self, images: Tensor) -> Tensor:
        """The part of the forward pass that never changes, (B, ...): it is computed once per image and run."""
        raise NotImplementedError(f"{type(self).__name__} has no frozen part")


def prepare(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Turn stored images (B, 3, h, w) into normalised floats (B, 3, size, size): each net owns its transform."""
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
    """A net that never trains again: no gradient, evaluation mode for ever, part of its owner's state dict."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in evaluation mode."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Tensor | None) -> Output:
        """Run the net without gradient."""
        return self.net(*args)


def freeze_batch_norm(module: nn.Module) -> None:
    """Stop running statistics from drifting (they alone can move old samples' features by their own norm)."""
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

    Their bf16 weight gradient has uninitialised entries on CPUs with AVX-512 (torch 2.15, oneDNN), which belong to
    kernel columns that see padding alone. Other shapes and float32 gradients are not affected.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the affected convolutions."""
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
