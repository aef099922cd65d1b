"""Draw the figure and write the tables that README and docs show.

    python -m benchmarks.draw

Reads `benchmarks/results/*.json`, draws how a step grows, and replaces what stands
between `<!-- NAME -->` and `<!-- /NAME -->` in the pages named in `PAGES`. A question
without results keeps its old text.
"""

import json
import re
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


def _curves(axes: Any, rows: Rows, x: str, y: str) -> None:
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        points = [(row[x], row[y]) for row in rows if row["optimizer"] == name]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel=x, xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")


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
        if path.stem.startswith("scaling"):
            draw_scaling(result, FIGURES / f"{path.stem}.png")
    for page in (ROOT / name for name in PAGES):
        if page.exists():
            text = page.read_text()
            for name, table in texts.items():
                text = fill(text, name, table)
            page.write_text(text)
    print("\n".join(f"{name}\n\n{text}" for name, text in texts.items()))


if __name__ == "__main__":
    main()
