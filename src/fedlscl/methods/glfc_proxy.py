"""GLFC's proxy server: which classes there are, images that it inverts from gradients, and the best model on them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedlscl.inversion import infer_labels, reconstruct
from fedlscl.nets.net import Net
from fedlscl.nets.prototype_encoder import PrototypeEncoder

CHUNK = 128
"""Images per forward pass."""


class Proxy:
    """What the proxy knows, as tensors by name in ``state``.

    ``met`` (num_classes,) is the first task of each class, -1 before it; ``images`` (n, 3, size, size) in 0..1 and
    ``labels`` (n,) are the monitor of task ``task``, on which the best model so far had accuracy ``best``.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def meet(self, class_counts: Iterable[Tensor], task: int) -> Tensor:
        """Take note of the classes that somebody has samples of; returns a copy of ``met``."""
        present = torch.stack([counts > 0 for counts in class_counts]).any(0)
        met = self.state.get("met", torch.full(present.shape, -1))
        self.state["met"] = torch.where(present & (met < 0), task, met)
        return self.state["met"].clone()

    def watch(self, gradients: Tensor, encoder: PrototypeEncoder, task: int, steps: int, keep: int) -> bool:
        """Invert gradients (n, num_weights) into images to monitor; the first ones of a task replace those before.

        Returns:
            whether they are the first: the best model of the task before then becomes everybody's old model.
        """
        is_first = int(self.state.get("task", torch.tensor(-1))) < task
        labels = infer_labels(gradients, encoder.num_classes, encoder.width)
        found = []
        for gradient, label in zip(gradients, labels, strict=True):
            start = torch.rand(3, encoder.size, encoder.size)
            found.append(reconstruct(encoder, gradient, label, start, steps, keep))
        labels = labels.repeat_interleave(torch.tensor([len(images) for images in found]))
        images = torch.cat(found)
        if not is_first:
            images, labels = torch.cat([self.state["images"], images]), torch.cat([self.state["labels"], labels])
        # Accuracies on different images do not compare: the released code keeps an older task's best score for ever.
        self.state |= {"images": images, "labels": labels, "task": torch.tensor(task), "best": torch.tensor(-1.0)}
        return is_first

    @torch.no_grad()
    def is_best(self, net: Net) -> bool:
        """Whether no model of this task did better than ``net`` on the monitor; False as long as there is none."""
        if "best" not in self.state:
            return False
        net.eval()
        classes = (self.state["met"] >= 0).nonzero().flatten()
        logits = torch.cat([net(images).logits for images in self.state["images"].split(CHUNK)])
        accuracy = (classes[logits[:, classes].argmax(1)] == self.state["labels"]).float().mean()
        if accuracy < self.state["best"]:
            return False
        self.state["best"] = accuracy
        return True
