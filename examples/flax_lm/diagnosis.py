"""What `ldadam_optax.diagnostics` tells of a run: rows of a file, and a heat map.

A row is of one matrix and one step, and tells what the step made of its gradient.
"""

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ldadam_optax import LeafDiagnostics

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm, Normalize

COLUMNS: tuple[str, ...] = ("step", "matrix", *LeafDiagnostics._fields)

# Panels of the map: a number, its title, its scale.
_PANELS = {
    "share": ("share held", Normalize(0, 1)),
    "turned": ("turned", LogNorm(0.01, 1, clip=True)),
    "residual": ("residual / gradient", LogNorm(0.1, 10, clip=True)),
    "effective_rank": ("effective rank", None),
}
_MOST_LABELS = 60


def rows_of(step: int, found: dict[str, LeafDiagnostics]) -> list[dict[str, Any]]:
    """One row for each matrix, layers in order; those of a stack are `PATH[0]`, ..."""
    rows = []
    for path in sorted(found, key=_in_order):
        for place in np.ndindex(np.shape(found[path].share)):
            name = path + "".join(f"[{i}]" for i in place)
            numbers = {k: float(v[place]) for k, v in found[path]._asdict().items()}
            rows.append({"step": step, "matrix": name, **numbers})
    return rows


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A heat map for each number: matrices, layer by layer, against steps."""
    matrices = sorted({row["matrix"] for row in rows}, key=_in_order)
    steps = sorted({row["step"] for row in rows})
    height = 1.3 + 0.17 * min(len(matrices), _MOST_LABELS)
    size = (3.3 + 2.3 * len(_PANELS), height)
    figure, all_axes = plt.subplots(
        1, len(_PANELS), figsize=size, sharey=True, layout="constrained"
    )
    for axes, (name, (label, scale)) in zip(all_axes, _PANELS.items(), strict=True):
        values = np.full((len(matrices), len(steps)), np.nan)
        for row in rows:
            place = matrices.index(row["matrix"]), steps.index(row["step"])
            values[place] = row.get(name, np.nan)
        image = axes.imshow(values, norm=scale, aspect="auto", interpolation="none")
        figure.colorbar(image, ax=axes, location="bottom", label=label, pad=0.02)
        every = max(1, len(steps) // 4)
        axes.set_xticks(range(0, len(steps), every), steps[::every])
        axes.set_xlabel("step")
    every = -(-len(matrices) // _MOST_LABELS)
    labels = [_label(name) for name in matrices[::every]]
    all_axes[0].set_yticks(range(0, len(matrices), every), labels, fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _label(matrix: str) -> str:
    """`0 mlp/up` for `layers/0/mlp/up/kernel`."""
    return matrix.removeprefix("layers/").replace("/kernel", "").replace("/", " ", 1)
