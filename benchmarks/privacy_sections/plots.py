"""Pictures of what was measured."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from privacy_sections.world import KNOWLEDGE

PLAIN = {"Date": None}


def draw(found: dict[str, Any], out: Path) -> None:
    """PSNR over pairs, AUC over samples, both over noise."""
    mpl.use("Agg")
    plt.rcParams["svg.hashsalt"] = "fedlscl"
    _draw_pairs(found["features"], out / "psnr.svg")
    _draw_members(found["members"], out / "auc.svg")
    _draw_noise(found["noise"], out / "noise.svg")


def _draw_pairs(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for number, knowledge in enumerate(KNOWLEDGE):
        for decoder, marker in (("ridge", "o"), ("conv", "x")):
            line = [row for row in rows if (row["knowledge"], row["decoder"]) == (knowledge, decoder)]
            label = knowledge if decoder == "ridge" else None
            axes.plot(*_points(line, "pairs", "psnr"), color=f"C{number}", marker=marker, ms=5, label=label)
    baseline = [row for row in rows if row["decoder"] == "mean image"]
    axes.plot(*_points(baseline, "pairs", "psnr"), "k--", label="mean image")
    axes.set(
        xscale="log", xlabel="attacker's pairs (cross: convolutional decoder)", ylabel="PSNR of images from raw E [dB]"
    )
    axes.set_xticks([row["pairs"] for row in baseline], [f"{row['pairs']:,}" for row in baseline])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, metadata=PLAIN)
    plt.close(figure)


def _draw_members(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    lines = dict.fromkeys((row["sent"], row["knowledge"]) for row in rows if row["sent"] != "raw E")
    for sent, knowledge in lines:
        line = [row for row in rows if (row["sent"], row["knowledge"]) == (sent, knowledge)]
        style = "-" if sent.startswith("second") else "--"
        label = f"{sent}, {knowledge}" if style == "-" else sent
        axes.plot(*_points(line, "n", "auc"), style, marker="o", ms=3, label=label)
    _frame(axes, "samples behind one message", [row["n"] for row in line])
    figure.savefig(path, metadata=PLAIN)
    plt.close(figure)


def _draw_noise(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for multiplier in dict.fromkeys(row["multiplier"] for row in rows):
        line = [row for row in rows if row["multiplier"] == multiplier]
        axes.plot(*_points(line, "n", "auc"), marker="o", ms=3, label=f"noise_multiplier {multiplier:g}")
    _frame(axes, "samples behind one moment of E, client's net known", [row["n"] for row in line])
    figure.savefig(path, metadata=PLAIN)
    plt.close(figure)


def _points(rows: list[dict], x: str, y: str) -> tuple[list, list]:
    return [row[x] for row in rows], [row[y] for row in rows]


def _frame(axes: plt.Axes, label: str, ticks: list[int]) -> None:
    axes.axhline(0.5, color="k", lw=0.8, ls=":")
    axes.set(xscale="log", xlabel=label, ylabel="AUC of members against others", ylim=(0.45, 1.02))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=7)


def draw_strip(rows: dict[str, Tensor], path: Path) -> None:
    """Originals above reconstructions."""
    mpl.use("Agg")
    figure, all_axes = plt.subplots(len(rows), 1, figsize=(7.2, 0.62 * len(rows)), layout="constrained")
    for axes, (name, images) in zip(all_axes, rows.items(), strict=True):
        axes.imshow(np.concatenate(list(images.permute(0, 2, 3, 1).numpy()), axis=1), interpolation="nearest")
        axes.set_axis_off()
        axes.text(-4, images.shape[-1] / 2, name, ha="right", va="center", fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
