"""Per-sample LoRA as it is written: each sample goes alone through a layer of weight W0 + scale * up @ down."""

import torch
from torch.func import functional_call


def adapted(module, inputs, updates):
    """Outputs of ``module`` for each sample of ``inputs`` with weights of its own; ``updates`` is by layer name."""
    rows = []
    for sample in range(len(inputs)):
        weights = {
            f"{name}.weight": module.get_submodule(name).weight + update.scale * update.up[sample] @ update.down[sample]
            for name, update in updates.items()
        }
        rows.append(functional_call(module, weights, (inputs[sample : sample + 1],)))
    return torch.cat(rows)
