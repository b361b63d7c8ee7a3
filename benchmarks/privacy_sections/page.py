"""Tables of what was measured: benchmarks/results/privacy/README.md and docs/privacy.md."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "privacy.md"
MARKED = re.compile(r"(<!-- privacy (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, out: Path) -> str:
    """A page with its tables as the results now are."""
    found = read(out)
    return MARKED.sub(lambda marks: marks[1] + TABLES[marks[2]](found) + "\n" + marks[3], text)


def read(out: Path) -> dict[str, Any]:
    """Rows of all sections."""
    return json.loads((out / "results.json").read_text())


def readme(out: Path) -> str:
    """The committed page beside the results."""
    found = read(out)
    tables = [f"## {TITLES[name]}\n\n{table(found)}\n" for name, table in TABLES.items()]
    pictures = "".join(f"![{name}]({name})\n" for name in ("psnr.svg", "auc.svg", "noise.svg", "strip.png"))
    head = "# Privacy, as measured\n\nWritten by `python benchmarks/privacy.py`; docs/privacy.md says what it means.\n"
    return "\n".join([head, conditions(found), *tables, pictures])


def conditions(found: dict[str, Any]) -> str:
    """One line about data, nets and machine time."""
    about = found["conditions"]
    return (
        f"{about['data']}, {about['small_model']} at {about['image_size']} px, E of {about['feature_dim']} numbers; "
        f"attacker's images {about['shadow']:,}, client's {about['own']:,}, others {about['others']:,}; "
        f"{about['epochs']} epochs of Stage 1; convolutional decoder {about['steps']:,} steps; "
        f"{about['seconds'] / 60:.0f} minutes.\n"
    )


def features(found: dict[str, Any]) -> str:
    """PSNR and SSIM of images from raw features, by knowledge and number of pairs."""
    rows = found["features"]
    counts = list(dict.fromkeys(row["pairs"] for row in rows))
    cells = {(row["knowledge"], row["decoder"], row["pairs"]): f"{row['psnr']:.1f} / {row['ssim']:.2f}" for row in rows}
    lines = dict.fromkeys((row["knowledge"], row["decoder"]) for row in rows)
    body = [[*line, *(cells.get((*line, count), "") for count in counts)] for line in lines]
    return grid(["attacker has", "decoder", *(f"{count:,} pairs" for count in counts)], body)


def moments(found: dict[str, Any]) -> str:
    """PSNR of the best guess from a moment, and of the best guess from another set's."""
    rows = found["moments"]
    sizes = list(dict.fromkeys(row["n"] for row in rows))
    cells = {
        (row["knowledge"], row["n"]): f"{row['psnr']:.1f} / {row['other set psnr']:.1f} ({row['cosine']:.2f})"
        for row in rows
    }
    lines = dict.fromkeys(row["knowledge"] for row in rows)
    body = [[knowledge, *(cells.get((knowledge, n), "") for n in sizes)] for knowledge in lines]
    return grid(["attacker has", *(f"n = {n}" for n in sizes)], body)


def members(found: dict[str, Any]) -> str:
    """AUC by what is sent, what is known, and n."""
    rows = found["members"]
    sizes = list(dict.fromkeys(row["n"] for row in rows))
    cells = {(row["sent"], row["knowledge"], row["n"]): f"{row['auc']:.2f}" for row in rows}
    lines = dict.fromkeys((row["sent"], row["knowledge"]) for row in rows)
    body = [[*line, *(cells[*line, n] for n in sizes)] for line in lines]
    return grid(["sent", "attacker has", *(f"n = {n:,}" for n in sizes)], body)


def noise(found: dict[str, Any]) -> str:
    """AUC and PSNR by noise, with the epsilon of a client and of a sample."""
    rows = found["noise"]
    sizes = list(dict.fromkeys(row["n"] for row in rows))
    body = []
    for multiplier in dict.fromkeys(row["multiplier"] for row in rows):
        line = {row["n"]: row for row in rows if row["multiplier"] == multiplier}
        told = [f"{line[n]['auc']:.2f} ({budget(line[n]['sample epsilon'])})" for n in sizes]
        one = line[sizes[0]]
        inverted = f"{one['psnr']:.1f} / {one['other set psnr']:.1f}"
        body.append([f"{multiplier:g}", budget(one["client epsilon"]), inverted, *told])
    head = ["noise_multiplier", "epsilon of the client", f"PSNR, n = {sizes[0]}", *(f"AUC, n = {n:,}" for n in sizes)]
    return grid(head, body)


def budget(epsilon: float | None) -> str:
    """An epsilon in three digits, or that there is none.

    Example:
        >>> budget(0.01234), budget(123456.0), budget(None)
        ('0.0123', '120,000', 'none')
    """
    if epsilon is None:
        return "none"
    return f"{float(f'{epsilon:.2g}'):,.0f}" if epsilon >= 100 else f"{epsilon:.3g}"


def grid(head: list[str], body: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "features": features,
    "moments": moments,
    "members": members,
    "noise": noise,
}
TITLES = {
    "features": "Images from raw features: PSNR [dB] / SSIM",
    "moments": "Images from moments: PSNR [dB] of the best guess / of the best from another set (cosine)",
    "members": "Who was in the data: AUC",
    "noise": "With noise: what is left (epsilon of one sample)",
}
