"""One small figure per experiment for the results page: final accuracy of each row, under both masks."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from fedlscl.callbacks.formatting import MASK_TITLES, percent
from fedlscl.report.groups import Group
from fedlscl.report.plots import COLOURS, WIDTH, Picture, picture, styled

LOOKS = {"class_il": (COLOURS[0], "o"), "task_il": (COLOURS[1], "s")}
TITLES = {
    "ablation_cpu": ("Parts of Fed-LSCL", ["full", "no_distillation", "no_stage_2", "neither"]),
    "choices_cpu": ("One choice of ours taken back at a time", []),
    "blocks_cpu": ("The adapted block", ["block0", "block3", "block6", "block9", "block11"]),
    "buffer_cpu": ("Samples kept of each class", ["M0", "M5", "M10", "M20"]),
    "heterogeneous_cpu": ("Small models of the clients", []),
}
"""By folder of results: what the figure shows, and its rows in order; the others follow, best first."""


@styled
def figure(name: str, groups: Sequence[Group]) -> Picture:
    """Rows of benchmarks/results/NAME from top to bottom, a bar of one standard deviation where there are seeds."""
    what, order = TITLES[name]
    known = {group.name: group for group in groups}
    rows = [known[row] for row in order if row in known] + [group for group in groups if group.name not in order]
    places = range(len(rows))[::-1]
    canvas = Figure(figsize=(WIDTH, 0.26 * len(rows) + 0.75 + 0.35))
    axes, handles = canvas.subplots(), []
    for mask, (colour, marker) in LOOKS.items():
        found = [row.known(f"{mask}/average") for row in rows]
        means = [value.mean for value in found]
        handles += axes.plot(means, places, marker, color=colour)
        spreads = [value.deviation or 0.0 for value in found]
        axes.errorbar(means, places, xerr=spreads, fmt="none", ecolor=colour, elinewidth=1.2)
    axes.set_yticks(places, [row.name.replace("_", " ") for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g}")
    axes.set_xlabel("final accuracy, %")
    canvas.legend(handles, [MASK_TITLES[mask] for mask in LOOKS], loc="outside lower center", ncols=len(LOOKS))
    numbers = "; ".join(
        f"{row.name} {percent(row.known('class_il/average').mean)} and {percent(row.known('task_il/average').mean)} %"
        for row in rows
    )
    alt = f"{what}, final accuracy, {' and '.join(MASK_TITLES.values())}: {numbers}."
    return picture(canvas, name, what, alt)
