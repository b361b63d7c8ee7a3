"""Figures with one line or one point per method: accuracy and forgetting over tasks, accuracy against cost."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedlscl.federated.wording import in_bytes, percent
from fedlscl.report.groups import Group
from fedlscl.report.style import AMONG, RULE, Picture, legend, legend_height, looks, percent_axis, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 2.9
"""Of axes in inches, without the legend."""
COURSES = {"average": ("accuracy", "accuracy over all tasks so far"), "forgetting": ("forgetting", "forgetting")}
"""Name of the files and words, by the summary's name."""
COSTS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "up_bytes": ("bytes", "bytes uploaded by all clients", in_bytes),
    "total_seconds": (
        "seconds",
        "seconds of the whole run",
        lambda value: f"{value:.3g} s" if value < 100 else f"{value:.0f} s",
    ),
}


def over_tasks(groups: Sequence[Group], course: str, mask: str) -> Picture:
    """The mean over seeds after each task, with a band of one standard deviation where there are several."""
    file, what = COURSES[course]
    values = {group.name: group.course(f"{mask}/{course}") for group in groups}
    # Nothing can be forgotten after the first task.
    first = 1 if course == "forgetting" and max(group.tasks for group in groups) > 1 else 0

    def draw(figure: "Figure") -> None:
        axes, handles, styles = figure.subplots(), [], looks(groups)
        for name, seeds in values.items():
            look, tasks = styles[name], range(first + 1, seeds.shape[1] + 1)
            mean = seeds.mean(0)[first:]
            handles += axes.plot(tasks, mean, color=look.colour, marker=look.marker, linestyle=look.dash)
            if len(seeds) > 1:
                deviation = seeds.std(0, ddof=1)[first:]
                axes.fill_between(tasks, mean - deviation, mean + deviation, color=look.colour, alpha=0.15, linewidth=0)
        if course == "forgetting":
            axes.axhline(0, color=RULE, linewidth=1)
        last = max(group.tasks for group in groups)
        axes.set_xticks(range(first + 1, last + 1, -(-last // 12)))
        axes.set_xlim(first + 0.8, last + 0.2)
        axes.set_xlabel("after learning task")
        percent_axis(axes, f"{what}, %")
        legend(figure, handles, list(values))

    ends = ", ".join(f"{name} {percent(float(seeds[:, -1].mean()))} %" for name, seeds in values.items())
    return picture(
        f"{file}_{mask}",
        f"{what.capitalize()}, {AMONG[mask]}",
        f"Line chart of {what}, {AMONG[mask]}, after each task. After the last one: {ends}.",
        draw,
        HEIGHT + legend_height(list(values)),
    )


def against_cost(groups: Sequence[Group], cost: str, mask: str) -> Picture | None:
    """Final accuracy by what the whole run cost, on a logarithmic axis; None where no run has such a cost.

    A run whose cost is zero has no place on that axis: its accuracy is a dashed line.
    """
    file, what, unit = COSTS[cost]
    found = {group.name: (group.final(cost), group.final(f"{mask}/average")) for group in groups}
    known = {name: (spent, reached) for name, (spent, reached) in found.items() if spent and reached}
    if not any(spent.mean > 0 for spent, _ in known.values()):
        return None

    def draw(figure: "Figure") -> None:
        axes, handles, styles = figure.subplots(), [], looks(groups)
        for name, (spent, reached) in known.items():
            look = styles[name]
            if spent.mean > 0:
                handles += axes.plot(spent.mean, reached.mean, look.marker, color=look.colour, alpha=0.85, markersize=9)
                axes.errorbar(
                    spent.mean,
                    reached.mean,
                    reached.deviation,
                    spent.deviation,
                    "none",
                    ecolor=look.colour,
                    elinewidth=1.2,
                )
            else:
                handles.append(axes.axhline(reached.mean, color=look.colour, linestyle="--"))
        _logarithmic(axes, [spent.mean for spent, _ in known.values() if spent.mean > 0], unit)
        axes.margins(y=0.12)
        axes.set_xlabel(what)
        percent_axis(axes, "final accuracy, %")
        names = [name if spent.mean > 0 else f"{name} (none)" for name, (spent, _) in known.items()]
        legend(figure, handles, names)

    points = ", ".join(
        f"{name} {percent(reached.mean)} % at {unit(spent.mean)}" for name, (spent, reached) in known.items()
    )
    return picture(
        f"{file}_{mask}",
        f"Final accuracy {AMONG[mask]}, against {what}",
        f"Scatter plot of final accuracy, {AMONG[mask]}, against {what}: {points}.",
        draw,
        HEIGHT + legend_height(list(known)),
    )


def _logarithmic(axes: "Axes", values: Sequence[float], unit: Callable[[float], str]) -> None:
    """Wide enough to hold a tick at 1, 2 or 5 times a power of ten on either side."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(values), max(values)
    axes.set_xscale("log")
    axes.set_xlim(low / 2.5, high * 2.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 8 * low else (1.0,), numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: unit(value).replace(".0 ", " "))
