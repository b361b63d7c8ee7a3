"""The parameter generator phi: a linear map from a client's features to the LoRA weights of the frozen ViT (Eq. 2)."""

import torch
from torch import Tensor, nn

from fedlscl.nets.lora import LowRankShape


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
