"""Draw the figures and write the tables that README and docs show.

    python -m benchmarks.draw

Reads `benchmarks/results/*.json`, writes `docs/figures/*.png`, and replaces what stands
between `<!-- NAME -->` and `<!-- /NAME -->` in the pages named in `PAGES`. A question
without results keeps its old text.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from .common import RESULTS
from .tables import TABLES, Rows, circumstances, slice_table

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

ROOT = RESULTS.parent.parent
PAGES = ("README.md", "docs/benchmarks.md", "docs/planning.md")
FIGURES = ROOT / "docs" / "figures"


def draw_step_time(result: dict[str, Any], path: Path) -> None:
    rows = [row for row in result["rows"] if row["optimizer"] != "gemm"]
    rows.sort(key=lambda row: row["median_seconds"])
    figure, axes = plt.subplots(
        figsize=(7, 0.5 + 0.4 * len(rows)), layout="constrained"
    )
    names = [row["optimizer"] for row in rows]
    colors = ["C1" if name.startswith("ldadamw") else "C7" for name in names]
    axes.barh(names, [1e3 * row["median_seconds"] for row in rows], color=colors)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds a step (median)", title=_title(result), xscale="log")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_whole_memory(result: dict[str, Any], path: Path) -> None:
    """State, and what else the peak holds, for each optimizer."""
    rows = result["rows"]
    figure, axes = plt.subplots(
        figsize=(7, 0.5 + 0.4 * len(rows)), layout="constrained"
    )
    names = [
        f"{row['optimizer']}, {'scanned' if row['scan_layers'] else 'unrolled'}"
        for row in rows
    ]
    left = [0.0] * len(rows)
    for field in ("parameter_bytes", "state_bytes", "temporaries_bytes"):
        sizes = [row[field] / 2**20 for row in rows]
        axes.barh(names, sizes, left=left, label=field.split("_")[0])
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="MiB", title="Whole training step, TPU v5e, 69 M parameters")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_compile_time(result: dict[str, Any], path: Path) -> None:
    _draw_curves(result, path, "layers", "median_seconds", "seconds to compile")


def draw_scaling(result: dict[str, Any], path: Path) -> None:
    """One panel for each quantity that grows."""
    grown = list(dict.fromkeys(row["grows"] for row in result["rows"]))
    field = (
        "median_seconds" if result["options"]["device"] != "tpu-compile" else "flops"
    )
    figure, panels = plt.subplots(
        1,
        len(grown),
        figsize=(3.4 * len(grown), 3.4),
        sharey=True,
        layout="constrained",
    )
    for name, panel in zip(grown, panels, strict=True):
        _curves(panel, [r for r in result["rows"] if r["grows"] == name], name, field)
    panels[0].set_ylabel(field.replace("_", " "))
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_curves(
    result: dict[str, Any], path: Path, x: str, y: str, label: str
) -> None:
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    _curves(axes, result["rows"], x, y)
    axes.set(ylabel=label, title=_title(result))
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curves(axes: Any, rows: Rows, x: str, y: str) -> None:
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        points = [(row[x], row[y]) for row in rows if row["optimizer"] == name]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel=x, xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")


def _title(result: dict[str, Any]) -> str:
    return result["name"].replace("-", ", ").replace("_", " ")


FIGURE_OF: tuple[tuple[str, Callable[[dict[str, Any], Path], None]], ...] = (
    ("step_time-", draw_step_time),
    ("memory-tpu-compile", draw_whole_memory),
    ("compile_time", draw_compile_time),
    ("scaling", draw_scaling),
)


def fill(page: str, name: str, text: str) -> str:
    r"""Put `text` between the marks of `name`; a page without them stays as it is.

    Example:
        >>> fill("<!-- a -->old<!-- /a -->", "a", "new")
        '<!-- a -->\nnew\n<!-- /a -->'
    """
    marks = rf"(<!-- {re.escape(name)} -->).*?(<!-- /{re.escape(name)} -->)"
    return re.sub(marks, lambda m: f"{m[1]}\n{text}\n{m[2]}", page, flags=re.DOTALL)


def main() -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        for prefix, make in TABLES:
            if path.stem.startswith(prefix):
                texts[path.stem] = make(result) + "\n" + circumstances(result)
        if path.stem == "plan":
            texts["smallest-slice"] = slice_table(result)
        for prefix, draw in FIGURE_OF:
            if path.stem.startswith(prefix):
                draw(result, FIGURES / f"{path.stem}.png")
    for page in (ROOT / name for name in PAGES):
        if page.exists():
            text = page.read_text()
            for name, table in texts.items():
                text = fill(text, name, table)
            page.write_text(text)
    print("\n".join(f"{name}\n\n{text}" for name, text in texts.items()))


if __name__ == "__main__":
    main()
