"""Tables of all that was measured: benchmarks/results/speed/table.md and docs/performance.md."""

import json
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs/performance.md"
MARKS = re.compile(r"(<!-- speed -->\n).*?(<!-- end -->)", re.DOTALL)
TITLES = {
    "vit": "ViT part of a Stage 1 step, 224 px, warm cache, forward and backward",
    "step": "Whole Stage 1 step, ResNet-18 included",
    "cnn": "The small model's training step, channels_last against the default format",
    "run": "Whole run (2 clients, 2 tasks, 2 rounds, ResNet-18 at 64 px, cold cache, server, evaluation)",
    "loop": "The engine's loop against a plain PyTorch loop of the same steps",
    "together": "Stage 1 step of five clients one after the other, and with one pass of the ViT over all their images",
    "o2d": "One-by-One Distillation, 5 clients, d = 512, m = 12,288",
    "memory": "One more idle client, predecessor included",
    "start": "Cold start",
}
COLUMNS = {
    "vit": [
        ("model", "model"), ("block", "block"), ("precision", "precision"),
        ("literal images/s", "literal_images_per_second"), ("images/s", "images_per_second"), ("ratio", "ratio"),
        ("to literal fp32", "ratio_to_literal_fp32"), ("GFLOP/image", "gflop_per_image"),
        ("GFLOP/s of products", "product_gflops"), ("share of that rate", "share_of_product_rate"),
    ],
    "step": [
        ("ViT", "vit"), ("block", "block"), ("CNN at", "small_size"), ("precision", "precision"),
        ("literal images/s", "literal_images_per_second"), ("images/s", "images_per_second"), ("ratio", "ratio"),
        ("to literal fp32", "ratio_to_literal_fp32"), ("plain loop images/s", "plain_images_per_second"),
        ("GFLOP/image", "gflop_per_image"), ("floor images/s", "floor_images_per_second"),
        ("share of product rate", "share_of_product_rate"),
    ],
    "cnn": [
        ("small model", "small_model"), ("pixels", "small_size"), ("precision", "precision"),
        ("default images/s", "default_images_per_second"), ("images/s", "images_per_second"), ("ratio", "ratio"),
    ],
    "run": [
        ("ViT", "vit"), ("block", "block"), ("precision", "precision"), ("literal s", "literal_seconds"),
        ("s", "seconds"), ("ratio", "ratio"), ("to literal fp32", "ratio_to_literal_fp32"),
    ],
    "loop": [
        ("ViT", "vit"), ("block", "block"), ("precision", "precision"), ("engine ms/step", "engine_ms_per_step"),
        ("plain ms/step", "plain_ms_per_step"), ("overhead", "overhead"),
    ],
    "together": [
        ("ViT", "vit"), ("images per client", "batch"), ("precision", "precision"), ("apart ms", "apart_ms"),
        ("together ms", "together_ms"), ("ratio", "ratio"), ("difference of gradients", "gradient_difference"),
    ],
    "o2d": [
        ("closed form s", "closed_seconds"), ("500 Adam steps s", "adam_seconds"), ("ratio", "ratio"),
        ("objective", "closed_objective"), ("Adam's", "adam_objective"), ("before", "start_objective"),
    ],
    "memory": [
        ("small model", "small_model"), ("own parameters MB", "parameters_mb"), ("client MB", "client_mb"),
        ("ratio", "ratio"), ("on the device MB", "device_mb"),
    ],
    "start": [("command", "command"), ("s", "seconds")],
}  # fmt: skip
PERCENT = {"share_of_product_rate", "overhead"}


def publish(folder: Path) -> None:
    """Write both pages from the JSON files of all machines in a folder."""
    text = "\n".join(tables(name, folder) for name in TITLES if list(folder.glob(f"*/{name}.json")))
    (folder / "table.md").write_text(text)
    if PAGE.is_file():
        PAGE.write_text(MARKS.sub(lambda found: found[1] + text + found[2], PAGE.read_text()))


def tables(name: str, folder: Path) -> str:
    """A heading, and a table for each machine."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{name}.json"))]
    return "\n".join([f"### {TITLES[name]}\n", *(table(name, content) for content in contents)])


def table(name: str, content: dict) -> str:
    """The machine in a line, and a table."""
    columns, about = COLUMNS[name], content["machine"]
    rates = ", ".join(f"{rate} {precision}" for precision, rate in about["product_gflops"].items())
    where = about["gpu"] or f"{about['processor']}, {about['vector_instructions']}, {about['threads']} threads"
    lines = [f"{where}; torch {about['torch']}; products {rates} GFLOP/s.", ""]
    for precision, reason in about.get("skipped", {}).items():
        lines[0] += f" {precision} was not measured: {reason}."
    lines += ["| " + " | ".join(title for title, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row[key], key) for _, key in columns) + " |" for row in content["rows"]]
    return "\n".join(lines) + "\n"


def cell(value: str | float, key: str) -> str:
    """A value in three significant digits.

    Example:
        >>> cell(1234.5, "images_per_second"), cell(0.0123, "overhead"), cell(9, "block")
        ('1234', '1.2 %', '9')
    """
    if not isinstance(value, float):
        return str(value)
    if key in PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
