"""Files of a run: result.json, metrics.jsonl, curves and predictions."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]


def read_json(path: Path) -> Any:
    """What a file holds; None where it is not JSON."""
    return _parse(path.read_text())


class Log:
    """Rows in metrics.jsonl; a resumed run goes on where its checkpoint was."""

    def __init__(self, path: Path, start: int):
        self.path = path
        self.rows: Rows = [row for row in self.read(path) if row["step"] <= start]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in self.rows))

    @staticmethod
    def read(path: Path) -> Rows:
        lines = path.read_text().splitlines() if path.is_file() else []
        return [row for row in map(_parse, lines) if row is not None]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(f"{json.dumps(row)}\n")


def _parse(text: str) -> dict[str, Any] | None:
    """What JSON holds; None where a crash cut it short."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def draw_curves(logs: dict[int, Rows], metrics: list[str], title: str, path: Path):
    """Training loss by step, and each metric on the validation rows by epoch."""
    figure, panels = plt.subplots(
        1,
        1 + len(metrics),
        figsize=(4.6 * (1 + len(metrics)), 3.8),
        layout="constrained",
    )
    for number, (seed, rows) in enumerate(logs.items()):
        style = {"color": f"C{number}", "label": f"seed {seed}"}
        losses = [(row["step"], row["train_loss"]) for row in rows]
        panels[0].plot(*np.array(losses, float).T, lw=0.9, **style)
        for panel, name in zip(panels[1:], metrics, strict=True):
            points = [(row["step"], row[name]) for row in rows if name in row]
            panel.plot(*zip(*points, strict=True), marker="o", **style)
    for panel, name in zip(panels, ["training loss", *metrics], strict=True):
        panel.set(xlabel="step", ylabel=name.replace("_", " "))
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value), and the values."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread, "values": values}
