"""Draws architecture.svg from the imports in src/fedlscl: ``python docs/pictures/architecture.py``."""

import ast
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "fedlscl"
BOXES = {
    "functional": ("mathematics on tensors", "Eq. 5, averages, objectives"),
    "data": ("data sets, split, loader", "what a client has in a task"),
    "nets": ("torch modules", "ViT, CNN, generator, heads"),
    "modules": ("LightningModules", "one local objective each"),
    "federated": ("Algorithm 1 on Fabric", "trainer, client pool, engine"),
    "methods": ("one file per method", "differences from FedAvg"),
    "callbacks": ("observers of a run", "progress, results, loggers"),
    "report": ("tables, plots, page", "from result files"),
    "testing": ("check_method", "for your method, too"),
    "cli": ("command line", "configuration to objects"),
    "flower": ("clients on other machines", "FlowerPool instead of LocalPool"),
}
"""Packages, each with what it is and an example."""
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 250, 78, 34, 46, 24


def imports() -> dict[str, set[str]]:
    """Which packages each package imports, itself aside."""
    found: dict[str, set[str]] = {name: set() for name in BOXES}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())) if name in BOXES else ():
            if isinstance(node, ast.ImportFrom):
                for imported in (f"{node.module}.{alias.name}" for alias in node.names):
                    first, *rest = imported.split(".")
                    found[name] |= {rest[0]} & BOXES.keys() - {name} if first == "fedlscl" else set()
    return found


def rows(below: dict[str, set[str]]) -> list[list[str]]:
    """Packages by the longest chain of imports below them, lowest first."""
    level: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():
        level[name] = max((level[other] + 1 for other in below[name]), default=0)
    return [[name for name in BOXES if level[name] == row] for row in range(max(level.values()) + 1)]


def direct(below: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports that no chain of other imports implies."""

    def reachable(name: str) -> set[str]:
        return below[name].union(*map(reachable, below[name]))

    return [
        (name, other)
        for name in below
        for other in sorted(below[name])
        if not any(other in reachable(between) for between in below[name] - {other})
    ]


def draw() -> str:
    """The picture as SVG."""
    below = imports()
    levels = rows(below)
    columns = max(map(len, levels))
    width = columns * WIDTH + (columns - 1) * GAP_X + 2 * MARGIN
    height = len(levels) * (HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    corner = {}
    for number, names in enumerate(reversed(levels)):
        left = (width - len(names) * WIDTH - (len(names) - 1) * GAP_X) / 2
        for column, name in enumerate(names):
            corner[name] = left + column * (WIDTH + GAP_X), MARGIN + number * (HEIGHT + GAP_Y)
    lines = []
    for name, other in direct(below):
        (x, y), (other_x, other_y) = corner[name], corner[other]
        side = (other_x > x) - (other_x < x)
        start, end = x + WIDTH / 2 + 115 * side, other_x + WIDTH / 2 - 40 * side
        lines.append(f'<path class="line" d="M{start:.0f} {y + HEIGHT}L{end:.0f} {other_y - 3}"/>')
    boxes = []
    for name, (x, y) in corner.items():
        what, example = map(escape, BOXES[name])
        middle = x + WIDTH / 2
        boxes.append(
            f'<rect x="{x:.0f}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="10"/>\n'
            f'<text x="{middle:.0f}" y="{y + 26}" class="name">{name}</text>\n'
            f'<text x="{middle:.0f}" y="{y + 47}" class="note">{what}</text>\n'
            f'<text x="{middle:.0f}" y="{y + 66}" class="note">{example}</text>'
        )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="t d" '
            "font-family=\"system-ui, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', sans-serif\">",
            '<title id="t">Packages of fedlscl</title>',
            '<desc id="d">An arrow leads from a package to one that it imports: '
            + "; ".join(f"{name} imports {', '.join(sorted(below[name]))}" for name in BOXES if below[name])
            + ".</desc>",
            '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 10 5 0 10z" fill="#37474f"/></marker><style>',
            "rect{fill:#e8eaf6;stroke:#3949ab;stroke-width:1.6}",
            ".name{font-size:18px;font-weight:600;fill:#263238;text-anchor:middle}",
            ".note{font-size:14px;fill:#455a64;text-anchor:middle}",
            ".line{stroke:#37474f;stroke-width:1.8;fill:none;marker-end:url(#a)}",
            "</style></defs>",
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
