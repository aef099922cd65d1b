"""Several optimizers on tasks of GLUE: the rate by one seed, then several seeds.

    python -m examples.glue.compare --model DIR --data GLUE_DIR --out DIR

For each task every optimizer runs at each of its rates with the first seed, and at
the best of them, by the task's score on the validation rows, with the other seeds.
Options of `train` (`--epochs`, `--train-rows`, ...) hold for all runs. Each run keeps
its result in its own folder: the same command goes on where it was stopped. The
folder gets `compare.json`, `compare.md` and `compare.png`, also of a part of the runs.

    python -m examples.glue.compare --redraw benchmarks/results/glue/compare.json

makes the table and the figure again, beside that file or in the folder of `--out`.
`--sizes` prints the bytes of each optimizer's state for the model, and runs nothing.
"""

import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
import tyro
from rich.console import Console

from examples.flax_lm.config import ConfigError
from examples.flax_lm.files import write_json
from examples.flax_lm.folder import refuse_file
from examples.flax_lm.machine import machine
from examples.hf import encoder
from examples.hf.checkpoints import read_config

from . import report
from .config import (
    Config,
    OptimConfig,
    Optimizer,
    RunConfig,
    TaskName,
    TrainConfig,
)
from .optimizers import state_bytes
from .tasks import TASKS, majority
from .train import REFUSALS, Inputs, SeedRun, load_inputs, train_seed, writing

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

# Peak rates by optimizer. GaLore's updates of its matrices are scaled by 4.
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (3e-5, 1e-4, 3e-4),
    "ldadamw": (1e-4, 3e-4, 1e-3),
    "ldadamw-int8": (1e-4, 3e-4, 1e-3),
    "ldadamw-recovery": (1e-4, 3e-4, 1e-3),
    "galore": (3e-5, 1e-4, 3e-4),
    "adafactor": (3e-5, 1e-4, 3e-4),
}
NAMES = {
    "adamw": "AdamW",
    "ldadamw": "LDAdam, float32 buffer",
    "ldadamw-int8": "LDAdam, int8 buffer",
    "ldadamw-recovery": "LDAdam, recovery",
    "galore": "GaLore",
    "adafactor": "Adafactor",
}
Runs = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    model: str = ""
    """Folder of a BERT or RoBERTa checkpoint, as transformers writes it."""
    data: str = ""
    """GLUE's folder, one of datasets' save_to_disk, or datasets:NAME of the hub."""
    out: str = "runs/glue"
    """Folder of the comparison; each run has its own in it."""
    tasks: tuple[TaskName, ...] = ("RTE", "MRPC", "STS-B", "CoLA")
    """Tasks, in this order."""
    variants: tuple[Optimizer, ...] = get_args(Optimizer)
    """Optimizers, each at its rates in `RATES`."""
    rates: tuple[float, ...] = ()
    """Peak rates for all optimizers, instead of `RATES`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first chooses the rate."""
    minutes: float = 0.0
    """Minutes after which no further run is begun; 0: no limit."""
    redraw: str = ""
    """A compare.json to make table and figure of; nothing is run."""

    sizes: bool = False
    """Print the bytes of the optimizers' states; nothing is run."""

    def __post_init__(self) -> None:
        if not self.redraw and not (self.model and self.data):
            raise ConfigError("--model and --data are needed, or --redraw.")
        if not (self.tasks and self.variants and self.seeds):
            raise ConfigError("--tasks, --variants and --seeds need one value each.")


@dataclasses.dataclass(frozen=True)
class Options:
    """What holds for all runs; the comparison sets optimizer, rate and task itself."""

    comparison: Comparison
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    progress: bool = True
    """Show progress bars."""


class StoppedError(Exception):
    """Ctrl-C, or the time is over."""


class Runner:
    """Makes the runs that are missing."""

    def __init__(self, options: Options, console: Console):
        self.options, self.console = options, console
        self.ends = time.monotonic() + 60 * options.comparison.minutes
        self.inputs: dict[str, Inputs] = {}

    def config(self, task: TaskName, variant: Optimizer, rate: float) -> Config:
        c = self.options.comparison
        return Config(
            RunConfig(
                model=c.model,
                data=c.data,
                task=task,
                out=str(Path(c.out) / task / variant / f"{rate:g}"),
                seeds=c.seeds,
                resume=True,
                save_model=False,
                checkpoint_every=0,
                progress=self.options.progress,
            ),
            dataclasses.replace(self.options.optim, optimizer=variant),
            dataclasses.replace(self.options.train, learning_rate=rate),
        )

    def run(
        self, task: TaskName, variant: Optimizer, rate: float, seed: int
    ) -> dict[str, Any]:
        """The record of one run, made now or before."""
        config = self.config(task, variant, rate)
        if task not in self.inputs:
            self.inputs[task] = load_inputs(config, self.console)
        run = SeedRun(config, self.inputs[task], seed)
        finished = (run.folder / "result.json").is_file()
        late = self.options.comparison.minutes and time.monotonic() > self.ends
        if late and not finished:
            raise StoppedError
        result = train_seed(run, self.console)
        if result is None:
            raise StoppedError
        record = {
            "task": task,
            "variant": variant,
            "learning_rate": rate,
            "seed": seed,
            "score": float(np.mean(list(result["metrics"].values()))),
        }
        names = ("metrics", "diverged", "steps", "step_seconds", "update_seconds")
        names += ("state_bytes",)
        record |= {name: result[name] for name in names}
        told = ", ".join(f"{k} {v:.4f}" for k, v in result["metrics"].items())
        if not finished:
            self.console.print(f"{task} {variant} {rate:g} seed {seed}: {told}")
        return record

    def floor(self, task: str) -> dict[str, float]:
        """What a constant answer gets on the validation rows."""
        return {
            name + split.suffix: value
            for split, tokens in self.inputs[task].valid
            if tokens.labels is not None
            for name, value in majority(TASKS[task], tokens.labels).items()
        }


def rates_of(comparison: Comparison, variant: str) -> tuple[float, ...]:
    return comparison.rates or RATES[variant]


def run_all(options: Options, console: Console) -> tuple[Runs, dict[str, Any], bool]:
    """All runs, what the majority gets, and whether everything was run."""
    c, runner, runs, whole = options.comparison, Runner(options, console), [], True
    try:
        for task in c.tasks:
            first = c.seeds[0]
            # Rate by rate, so that a part of the runs compares all optimizers.
            tried: list[list[tuple[Optimizer, float]]] = [
                [(variant, rate) for rate in rates_of(c, variant)]
                for variant in c.variants
            ]
            for pairs in itertools.zip_longest(*tried):
                for variant, rate in filter(None, pairs):
                    runs.append(runner.run(task, variant, rate, first))
            for seed in c.seeds[1:]:
                for variant in c.variants:
                    rate = best_rate(runs, task, variant, first)
                    runs.append(runner.run(task, variant, rate, seed))
    except StoppedError:
        whole = False
    return runs, {task: runner.floor(task) for task in runner.inputs}, whole


def best_rate(runs: Runs, task: str, variant: str, seed: int) -> float:
    """The rate with the highest score of the seed that chooses, if it converged."""
    tried = [
        run
        for run in runs
        if (run["task"], run["variant"], run["seed"]) == (task, variant, seed)
    ]
    best = max(tried, key=lambda run: (not run["diverged"], run["score"]))
    return best["learning_rate"]


def best_runs(runs: Runs, task: str, variant: str) -> Runs:
    """The runs at the chosen rate, one a seed; none where nothing was run."""
    own = [r for r in runs if r["task"] == task and r["variant"] == variant]
    if not own:
        return []
    rate = best_rate(runs, task, variant, own[0]["seed"])
    return [run for run in own if run["learning_rate"] == rate]


def table(runs: Runs, floor: dict[str, dict[str, float]]) -> str:
    """A Markdown table for each task: means and spreads of GLUE's metrics in %."""
    parts = []
    for task in dict.fromkeys(run["task"] for run in runs):
        names = list(floor[task])
        heads = ["optimizer", *(name.replace("_", " ") for name in names)]
        heads += ["seeds", "rate", "of rates", "state", "of it for matrices"]
        heads += ["update", "step"]
        lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
        constant = [f"{100 * floor[task][name]:.1f}" for name in names]
        lines.append(["constant answer", *constant] + [""] * 7)
        for variant in dict.fromkeys(r["variant"] for r in runs if r["task"] == task):
            lines.append(_table_row(runs, task, variant, names))
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"**{task}**\n\n{text}\n")
    return "\n".join(parts)


def _table_row(runs: Runs, task: str, variant: str, names: list[str]) -> list[str]:
    best = best_runs(runs, task, variant)
    cells = [NAMES[variant]]
    for name in names:
        told = report.summary([100 * run["metrics"][name] for run in best])
        spread = "" if told["std"] is None else f" ± {told['std']:.1f}"
        cells.append(f"{told['mean']:.1f}{spread}")
    tried = {
        run["learning_rate"]
        for run in runs
        if run["task"] == task and run["variant"] == variant
    }
    size = best[0]["state_bytes"]
    update, step = (
        float(np.median([run[f"{name}_seconds"] for run in best]))
        for name in ("update", "step")
    )
    cells += [str(len(best)), f"{best[0]['learning_rate']:g}", str(len(tried))]
    cells += [f"{size[name] / 2**20:.1f} MiB" for name in ("all", "matrices")]
    return [*cells, f"{1000 * update:.0f} ms", f"{step:.2f} s"]


def draw(runs: Runs, floor: dict[str, dict[str, float]], path: Path) -> None:
    """A panel for each task: every run's score by optimizer, and the constant one."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    variants = [name for name in NAMES if any(r["variant"] == name for r in runs)]
    figure, panels = plt.subplots(
        1,
        len(tasks),
        figsize=(1.2 + 3.4 * len(tasks), 4),
        layout="constrained",
        squeeze=False,
    )
    for panel, task in zip(panels[0], tasks, strict=True):
        for at, variant in enumerate(variants):
            best = best_runs(runs, task, variant)
            own = [r for r in runs if r["task"] == task and r["variant"] == variant]
            others = [100 * run["score"] for run in own if run not in best]
            scores = [100 * run["score"] for run in best]
            color = f"C{at}"
            panel.plot([at - 0.15] * len(others), others, "x", color=color, alpha=0.5)
            panel.plot([at] * len(scores), scores, ".", color=color, alpha=0.7)
            if scores:
                panel.plot([at], [np.mean(scores)], "o", ms=8, color=color)
        constant = 100 * float(np.mean(list(floor[task].values())))
        panel.axhline(constant, color="0.5", lw=1, ls="--")
        names = ", ".join(floor[task]).replace("_", " ")
        panel.set_title(f"{task}: {names}", fontsize=9)
        labels = [NAMES[variant] for variant in variants]
        panel.set_xticks(range(len(variants)), labels, rotation=35, ha="right")
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(alpha=0.3, axis="y")
    panels[0][0].set_ylabel("score on the validation rows (%)")
    figure.suptitle(
        "large: mean at the chosen rate; small: its seeds\n"
        "crosses: other rates; dashed: a constant answer",
        fontsize=8,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sizes(options: Options) -> str:
    """A Markdown table of the states' bytes, with a head of two classes."""
    model = encoder.classifier(
        encoder.from_json(read_config(Path(options.comparison.model))), ("0", "1")
    )
    params = encoder.abstract_params(model)
    lines = ["| optimizer | state | of it for matrices |", "| --- | ---: | ---: |"]
    for variant in options.comparison.variants:
        optim = dataclasses.replace(options.optim, optimizer=variant)
        told = {
            k: f"{n / 2**20:.2f} MiB" for k, n in state_bytes(optim, params).items()
        }
        lines.append(f"| {NAMES[variant]} | {told['all']} | {told['matrices']} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, content: dict[str, Any]) -> None:
    """Table and figure; a word where nothing has finished."""
    runs, floor = content["runs"], content["majority"]
    if not runs:
        print("No run has finished.")
        return
    (folder / "compare.md").write_text(table(runs, floor))
    draw(runs, floor, folder / "compare.png")
    print(table(runs, floor))
    print(f"Table, figure and all figures behind them: {folder.absolute()}")


def redraw(comparison: Comparison) -> None:
    path = Path(comparison.redraw)
    content = report.read_json(path) if path.is_file() else None
    if not isinstance(content, dict) or "runs" not in content:
        raise ConfigError(f"--redraw must name a compare.json, got {path}.")
    given = comparison.out != Comparison.__dataclass_fields__["out"].default
    folder = Path(comparison.out) if given else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, content)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    omit = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        options = tyro.cli(Options, args=argv, description=__doc__, config=omit)
        if options.comparison.redraw:
            redraw(options.comparison)
            return
        if options.comparison.sizes:
            print(sizes(options))
            return
        out = Path(options.comparison.out).absolute()
        refuse_file(out)
        out.mkdir(parents=True, exist_ok=True)
        with writing(out):
            runs, floor, whole = run_all(options, Console())
    except REFUSALS as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    content = {
        "tasks": list(options.comparison.tasks),
        "seeds": list(options.comparison.seeds),
        "train": dataclasses.asdict(options.train),
        "optim": dataclasses.asdict(options.optim),
        "machine": machine(),
        "whole": whole,
        "majority": floor,
        "runs": runs,
    }
    write_json(out / "compare.json", content)
    write(out, content)
    if not whole:
        raise SystemExit("Stopped before the end; the same command goes on from here.")


if __name__ == "__main__":
    main()
