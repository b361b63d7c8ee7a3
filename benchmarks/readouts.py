"""Every method on a frozen ViT, on one split, budget and seed, with the same readout beside its own head.

    python benchmarks/readouts.py --preset cpu --data_root DATA

The rows are those files in configs/method whose method has a ViT, on a data set of configs/data
(`presets.configuration`), the controls of Fed-LSCL, and methods as they were before a repair. See docs/readouts.md.
"""

import argparse
import sys

import yaml
from presets import Run, configuration, methods, once
from sweep import drive

REPEATED = ("fedlscl", "fedlscl_exact", "fedlscl_pretrained", "fedlscl_static", "lorm", "frozenlda")
"""What the cpu preset repeats over `TWO`: Fed-LSCL, its controls, LoRM, and the control without training."""
TWO = (42, 1999)
READOUTS = ("--trainer.readouts.heads", "[lda]", "--trainer.readouts.features")
SMALL = ("fedlscl", "fedlscl_pretrained", "fedlscl_random")
"""Rows with readouts on the small model's features, too."""
PRETRAINED = {"small_model": "tf_efficientnet_lite0", "small_weights": "tf_efficientnet_lite0.safetensors"}
CONTROLS: dict[str, dict[str, str]] = {
    "fedlscl_static": {"collaborator.small_model": "none"},
    "fedlscl_exact": {"upload_rank": "exact"},
    "fedlscl_random": {"collaborator.freeze_small": "true"},
    "fedlscl_pretrained": {
        **{f"collaborator.{name}": value for name, value in PRETRAINED.items()},
        "collaborator.small_image_size": "96",
        "lr": "0.00001",
    },
}
"""Fed-LSCL without a small model, with a random one that is not trained, and with a pretrained one, trained slowly."""
BEFORE = {"pilora": {"competing": "task"}, "fedmgp": {"prefix_of": "label"}}
"""Rows of how a method was before its repair."""


def experiments(options: argparse.Namespace) -> dict[str, list[Run]]:
    """A row for each method of the preset, Fed-LSCL and its controls first."""
    rows: list[Run] = []
    for name in sorted(methods(options.data), key=lambda name: name != "fedlscl"):
        # JointLSCL trains a new net in every task: sums of earlier tasks are of nets that are gone.
        if not has_vit(name, options) or name == "joint_lscl":
            continue
        rows.append(row(name, name, {}, options))
        if name == "fedlscl":
            rows += [row(control, name, changes, options) for control, changes in CONTROLS.items()]
        if name in BEFORE:
            rows.append(row(f"{name}_before", name, BEFORE[name], options))
    return {"readouts": rows}


def has_vit(method: str, options: argparse.Namespace) -> bool:
    """Whether a method's configuration names a frozen ViT."""
    fields = yaml.safe_load(configuration(options.data, method)[1].read_text())["method"]["init_args"]
    return bool({"foundation", "collaborator"} & fields.keys())


def row(name: str, method: str, changes: dict[str, str], options: argparse.Namespace) -> Run:
    """A row: a method with readouts, and with other values of its options."""
    words = [word for key, value in changes.items() for word in (f"--method.{key}", value)]
    words += [*READOUTS, "[adapted, frozen, small, frozen+small]" if name in SMALL else "[adapted, frozen]"]
    seeds = once(options) if options.preset == "cpu" and name not in REPEATED else TWO
    return Run(name, configuration(options.data, method), words, seeds)


if __name__ == "__main__":
    sys.exit(drive("Every method on a frozen ViT, with the same readout.", experiments))
