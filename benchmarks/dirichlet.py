"""The global protocol of the federated class-incremental literature: one test set, Dirichlet shares, ten clients.

    python benchmarks/dirichlet.py --preset cpu --data_root DATA
    python benchmarks/dirichlet.py --preset paper --configs cifar100 --only lorm_b0.5 lorm_b0.1 lorm_b0.05

The second line is LoRM's own setting on CIFAR-100 (ICLR 2025, arXiv 2410.17961; ViT-B/16, ten tasks of ten classes),
where it publishes 86.95, 81.75 and 82.76 % for concentrations 0.5, 0.1 and 0.05.
"""

import argparse
import sys

from presets import Run, configuration, once
from sweep import drive

CONCENTRATIONS = (0.5, 0.1, 0.05)
METHODS = ("lorm", "pilora", "fedncm", "fedridge")
"""Beside Fed-LSCL."""
LORM = {0.5: (1, 3e-3), 0.1: (16, 3e-4), 0.05: (16, 5e-4)}
"""Rank and learning rate of LoRM's authors by concentration, at every preset."""
CLASSES = {"cpu": (40, 5), "gpu": (40, 5), "paper": (100, 10)}
"""Classes and tasks."""


def protocol(dirichlet_alpha: float, options: argparse.Namespace) -> list[str]:
    """The same classes in the same order for ten clients, each with a Dirichlet share of every class."""
    classes, tasks = CLASSES[options.preset]
    values = {"protocol": "global", "dirichlet_alpha": dirichlet_alpha, "num_clients": 10, "num_tasks": tasks}
    values |= {"private_classes": 0, "public_classes": classes}
    return [text for name, value in values.items() for text in (f"--data.{name}", str(value))]


def experiments(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Every method at every concentration."""
    rows = []
    for dirichlet_alpha in CONCENTRATIONS:
        shared = protocol(dirichlet_alpha, options)
        rows.append(Run(f"fedlscl_b{dirichlet_alpha}", options.base, shared, once(options)))
        for method in METHODS:
            changes = list(shared)
            if method == "lorm":
                rank, lr = LORM[dirichlet_alpha]
                changes += ["--method.rank", str(rank), "--method.lr", str(lr), "--method.batch_size", "16"]
            rows.append(
                Run(f"{method}_b{dirichlet_alpha}", configuration(options.data, method), changes, once(options))
            )
    return {"dirichlet": rows}


if __name__ == "__main__":
    sys.exit(drive("Fed-LSCL, LoRM, PILoRA and the controls under the global protocol.", experiments))
