"""Options that make a command line run in a second: two clients, two tasks of two classes, tiny nets."""

TRAINER = {"rounds_per_task": 1, "accelerator": "cpu"}
DATA = {
    "dataset": "fake",
    "fake_classes": 6,
    "num_clients": 2,
    "num_tasks": 2,
    "private_classes": 2,
    "public_classes": 2,
    "train_per_class": 6,
    "test_per_class": 3,
    "image_size": 16,
}
METHOD = {"local_epochs": 1, "batch_size": 8}
SMALL = {"small_model": "test_resnet", "small_image_size": 32}
VIT = {"name": "test_vit", "weights": "random", "image_size": 32}

SYNTHESIS = {"synthesis_size": 16, "synthesis_channels": [8, 4], "synthesis_batch": 8, "synthesis_steps": 2}
SERVER = {
    "TARGET": SYNTHESIS | {"synthesis_rounds": 2, "warmup_rounds": 1, "student_steps": 1},
    "MFCL": SYNTHESIS | {"replay_size": 8},
    "GLFC": {"perturbation_steps": 2, "reconstruction_steps": 2},
}
"""What the server of a method needs to be quick, by the method."""


def options(group, values):
    """``--group.name value`` for each value."""
    return [text for name, value in values.items() for text in (f"--{group}.{name}", str(value))]


COMMON = [*options("trainer", TRAINER), *options("data", DATA), *options("method", METHOD)]
FEDAVG = ["--method", "FedAvg", *options("method", SMALL), *COMMON]
FEDLSCL = [
    *options("method.collaborator.foundation", VIT),
    *options("method.collaborator", SMALL | {"feature_dim": 16}),
    *COMMON,
]


def inside(folder):
    """Keep runs in a folder."""
    return ["--trainer.default_root_dir", str(folder)]
