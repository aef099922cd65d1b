"""What a run tells: tables at the start, metrics on the way, a curve at the end."""

import csv
import math
from pathlib import Path
from typing import Any, Literal

import jax
import matplotlib
import optax
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table
from tensorboardX import SummaryWriter

import ldadam_optax

from . import diagnosis
from .config import Config
from .files import write_json
from .machine import machine, now, versions
from .optimizers import (
    GROUPS,
    group_of,
    is_routed,
    ldadam_options,
    make_optimizer,
)

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

COLUMNS: tuple[str, ...] = (
    "step",
    "tokens",
    "seconds",
    "learning_rate",
    "train_loss",
    "valid_loss",
    "valid_perplexity",
)


def bytes_by_group(tree: Any) -> dict[str, int]:
    """Bytes of an abstract tree's leaves, summed by the parameter they belong to."""
    sums = dict.fromkeys(GROUPS, 0)
    for path, leaf in jax.tree.leaves_with_path(tree):
        sums[group_of(path)] += math.prod(leaf.shape) * leaf.dtype.itemsize
    return sums


def print_config(console: Console, config: Config) -> None:
    table = Table("section", "options", title="Run", title_justify="left")
    for name, section in config.to_dict().items():
        options = section.items() if isinstance(section, dict) else [(name, section)]
        table.add_row(name, " ".join(f"{k}=[b]{v}[/b]" for k, v in options))
    console.print(table)


def print_state_table(console: Console, config: Config, params: Any) -> None:
    """What each group of parameters takes, and its optimizer state beside AdamW's."""
    name = config.optim.optimizer
    uniform = name in ("adamw", "adafactor")
    adamw = optax.adamw(1.0)
    tx = make_optimizer(config.optim, config.train)
    ours, theirs = (bytes_by_group(jax.eval_shape(t.init, params)) for t in (tx, adamw))
    counts, sizes, routes = dict.fromkeys(GROUPS, 0), bytes_by_group(params), {}
    for path, leaf in jax.tree.leaves_with_path(params):
        group = group_of(path)
        counts[group] += math.prod(leaf.shape)
        routes[group] = name if uniform or is_routed(path) else "adamw"
    table = Table(title="Parameters and optimizer state", title_justify="left")
    for head in ("group", "parameters", "size", "route", name, "adamw"):
        justify = "left" if head in ("group", "route") else "right"
        table.add_column(head, justify=justify)
    rows = (counts, sizes, ours, theirs)
    for group in GROUPS:
        _add_row(table, group, routes.get(group, "-"), *(row[group] for row in rows))
    table.add_section()
    _add_row(table, "all", "", *(sum(row.values()) for row in rows))
    console.print(table)


def _add_row(
    table: Table, group: str, route: str, count: int, size: int, ours: int, theirs: int
) -> None:
    cells = (f"{count:,}", mib(size), route, mib(ours), mib(theirs))
    table.add_row(group, *cells)


def print_memory_report(
    console: Console, config: Config, params: Any, specs: Any, mesh: Mesh
) -> None:
    """Where LDAdam's bytes go, by group, beside its peers; each leaf in memory.txt."""
    options = ldadam_options(config.optim)
    report = ldadam_optax.memory_report(params, specs=specs, mesh=mesh, **options)
    if jax.process_index() == 0:
        (config.folder / "memory.txt").write_text(f"{report}\n")
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    groups = [group_of(path) for path in paths]
    fields = {"mu, nu": ("mu", "nu"), "basis": ("projector",), "error": ("error",)}
    fields |= {"ldadamw": ("state",), "adamw": ("adamw",), "galore": ("galore",)}
    fields |= {"adafactor": ("adafactor",)}
    if mesh.size > 1:
        fields |= {"a device": ("device",)}
    style: Any = {"title_justify": "left", "box": box.SIMPLE, "padding": (0, 0, 0, 1)}
    table = Table(title="Optimizer state (MiB)", **style)
    table.add_column("group", no_wrap=True)
    for head in fields:
        table.add_column(head, justify="right", no_wrap=True)
    for name in (*dict.fromkeys(groups), "all"):
        rows = [row for row, g in zip(report.rows, groups, strict=True) if g == name]
        rows = rows or [report.total]  # counters, too
        sums = (sum(getattr(r, f) for r in rows for f in fs) for fs in fields.values())
        sizes = [size / 2**20 for size in sums]
        table.add_row(name, *(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in sizes))
    console.print(table)


def mib(size: int) -> str:
    return f"{size / 2**20:.3f} MiB"


class Log:
    """Rows of a CSV file; a resumed run goes on where it was.

    Args:
        path: The file, made with the first rows.
        columns: Their names.
        start: Steps that the state has behind it: rows of later ones are dropped.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], start: int):
        self.path, self.columns = path, columns
        self.rows = [row for row in read_metrics(path) if row["step"] <= start]
        self.writes = jax.process_index() == 0  # one process writes for all
        if path.exists():
            self._write("w", self.rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to the file at once, so that a crash loses none of them."""
        self._write("a" if self.path.exists() else "w", rows)
        self.rows += rows

    def _write(self, mode: Literal["w", "a"], rows: list[dict[str, Any]]) -> None:
        if not self.writes:
            return
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


class Metrics:
    """What a run measures, to CSV files and to TensorBoard."""

    def __init__(self, folder: Path, start: int):
        self.losses = Log(folder / "metrics.csv", COLUMNS, start)
        self.diagnostics = Log(folder / "diagnostics.csv", diagnosis.COLUMNS, start)
        self.board: SummaryWriter | None = None
        if jax.process_index() == 0:
            board = str(folder / "tensorboard")
            self.board = SummaryWriter(board, purge_step=start + 1)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self.board:
            self.board.close()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each step."""
        return self.losses.rows

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.losses.add(rows)
        for row in rows:
            self._show(row, row.keys() - {"step", "tokens"})

    def add_diagnostics(self, rows: list[dict[str, Any]]) -> None:
        self.diagnostics.add(rows)
        for row in rows:
            names = row.keys() - {"step", "matrix"}
            self._show(row, names, suffix=f"/{row['matrix']}")

    def _show(self, row: dict[str, Any], names: set[str], suffix: str = "") -> None:
        if self.board:
            for name in names:
                self.board.add_scalar(name + suffix, row[name], row["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, numbers as numbers, without the empty cells."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    types = {"step": int, "tokens": int, "matrix": str}
    return [{k: types.get(k, float)(v) for k, v in row.items()} for row in rows]


def draw_losses(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """The loss curve of a run."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    styles = {"train_loss": {"lw": 0.8, "alpha": 0.6}, "valid_loss": {"marker": "o"}}
    for name, style in styles.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_result(config: Config, state: Any, rows: list[dict[str, Any]]) -> None:
    """Write result.json: what a comparison needs, and what it was measured on."""
    sizes = bytes_by_group(state.opt_state)
    result = {
        "date": now(),
        "machine": machine(),
        "versions": versions(),
        "config": config.to_dict(),
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        "state_bytes": sum(sizes.values()),
        "state_bytes_by_group": sizes,
        "validation": [row for row in rows if "valid_loss" in row],
    }
    write_json(config.folder / "result.json", result)
