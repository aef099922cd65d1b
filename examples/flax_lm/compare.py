"""Several optimizers on the same seeds and data, each at several learning rates.

    python -m examples.flax_lm.compare                # 15 runs of about two minutes
    python -m examples.flax_lm.compare --variants adamw ldadamw --seeds 0 1 --steps 200

Further options are those of `train`. Each run leaves its result in its own folder
at once: the same command goes on where it was stopped. In the end the folder holds
`compare.json`, `compare.md` and `compare.png`: validation perplexity against steps,
seconds and bytes of optimizer state, for each optimizer at its best learning rate.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import tyro
from rich.console import Console

from . import train
from .command_line import parse
from .config import FIXED_SECTIONS, Config, ConfigError
from .files import write_json
from .machine import machine, now, versions
from .presets import VARIANTS, with_variant

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Comparison:
    variants: tuple[str, ...] = (
        "ldadamw-float32",
        "ldadamw-recovery",
        "ldadamw-none",
        "adamw",
        "galore",
        "muon",
    )
    """Names of `presets.VARIANTS`."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Peak learning rates that each is run at."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of parameters and data order, the same for all."""
    out: str = "runs/compare"
    """Folder of the comparison; each run has its own in it."""

    def __post_init__(self) -> None:
        if unknown := set(self.variants) - set(VARIANTS):
            raise ConfigError(f"--variants {unknown}: choose of {list(VARIANTS)}.")


def run_config(base: Config, out: Path, variant: str, rate: float, seed: int) -> Config:
    """The config of one run; it resumes where the run has left a checkpoint.

    Raises:
        ConfigError: If the folder holds a run with other options.
    """
    folder = out / variant / f"lr{rate:g}-seed{seed}"
    resume = any((folder / "checkpoints").glob("[0-9]*"))
    config = with_variant(base, variant).replace(
        learning_rate=rate,
        seed=seed,
        out=str(folder),
        resume=resume,
        overwrite=not resume,
    )
    path = folder / "config.json"
    if path.exists():
        saved = Config.load(path)
        if any(getattr(saved, n) != getattr(config, n) for n in FIXED_SECTIONS):
            raise ConfigError(
                f"{folder} holds a run with other options. Give the comparison "
                f"another folder with --out, or delete that run."
            )
    return config


def result_of(config: Config) -> dict[str, Any] | None:
    """The result of a run that is finished."""
    path = config.folder / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_all(comparison: Comparison, base: Config) -> list[dict[str, Any]]:
    """Make the runs that are missing; the results of all, or SystemExit on Ctrl-C."""
    out, console, results = Path(comparison.out), Console(), []
    wanted = [
        (variant, rate, seed)
        for seed in comparison.seeds
        for rate in comparison.learning_rates
        for variant in comparison.variants
    ]
    for number, (variant, rate, seed) in enumerate(wanted, start=1):
        config = run_config(base, out, variant, rate, seed)
        told = f"{number}/{len(wanted)} {variant}, learning rate {rate:g}, seed {seed}"
        if (result := result_of(config)) is None:
            console.rule(told)
            last = train.run(config, Console(quiet=True)).step
            jax.clear_caches()  # the next run shares no compiled function
            if last < config.train.steps:
                raise SystemExit("Stopped; the same command goes on from here.")
            result = result_of(config)
        assert result is not None  # a finished run has written it
        summary = summarize(result, variant, rate, seed)
        console.print(f"{told}: perplexity {summary['perplexity']:.3f}")
        results.append(summary)
    return results


def summarize(
    result: dict[str, Any], variant: str, rate: float, seed: int
) -> dict[str, Any]:
    return {
        "variant": variant,
        "learning_rate": rate,
        "seed": seed,
        "perplexity": result["validation"][-1]["valid_perplexity"],
        "seconds": result["validation"][-1]["seconds"],
        "date": result["date"],
        "parameters": result["parameters"],
        "state_bytes": result["state_bytes"],
        "matrix_state_bytes": sum(
            result["state_bytes_by_group"][name] for name in ("attention", "mlp")
        ),
        "steps": [row["step"] for row in result["validation"]],
        "curve_seconds": [row["seconds"] for row in result["validation"]],
        "curve": [row["valid_perplexity"] for row in result["validation"]],
    }


def mean_perplexity(runs: list[dict[str, Any]]) -> float:
    """Mean over seeds; a run that diverged counts as infinite."""
    values = [run["perplexity"] for run in runs]
    return float(np.mean([v if math.isfinite(v) else math.inf for v in values]))


def by_variant(
    runs: list[dict[str, Any]],
) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Runs by variant, then by learning rate, in the order they were asked for."""
    grouped: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for run in runs:
        rates = grouped.setdefault(run["variant"], {})
        rates.setdefault(run["learning_rate"], []).append(run)
    return grouped


def best_runs(rates: dict[float, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The runs, one a seed, at the learning rate with the lowest perplexity."""
    return min(rates.values(), key=mean_perplexity)


def table(runs: list[dict[str, Any]]) -> str:
    """Final validation perplexities as a Markdown table, the best in bold."""
    grouped = by_variant(runs)
    all_rates = list(dict.fromkeys(run["learning_rate"] for run in runs))
    heads = ["optimizer", "state", "of it for matrices", "s per 100 steps"]
    heads += [f"lr {rate:g}" for rate in all_rates]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for variant, rates in grouped.items():
        best = best_runs(rates)
        cells = [f"{mean_perplexity(rates[r]):.3f}" for r in all_rates if r in rates]
        bold = f"{mean_perplexity(best):.3f}"
        pace = 100 * best[0]["seconds"] / best[0]["steps"][-1]
        sizes = (
            best[0][name] / 2**20 for name in ("state_bytes", "matrix_state_bytes")
        )
        lines.append(
            [variant, *(f"{size:.2f} MiB" for size in sizes), f"{pace:.1f}"]
            + [f"**{cell}**" if cell == bold else cell for cell in cells]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Three panels: perplexity against steps, seconds, and bytes of state."""
    grouped = by_variant(runs)
    lowest = min(mean_perplexity(best_runs(rates)) for rates in grouped.values())
    figure, panels = plt.subplots(
        1, 3, figsize=(13, 4.2), sharey=True, layout="constrained"
    )
    for number, (variant, rates) in enumerate(grouped.items()):
        best = best_runs(rates)
        style = {"color": f"C{number}", "lw": 1.6}
        curve = np.mean([run["curve"] for run in best], axis=0)
        seconds = np.mean([run["curve_seconds"] for run in best], axis=0)
        label = f"{variant}, lr {best[0]['learning_rate']:g}"
        panels[0].plot(best[0]["steps"], curve, label=label, **style)
        panels[1].plot(seconds, curve, **style)
        size = best[0]["state_bytes"] / 2**20
        for runs_at_rate in rates.values():
            panels[2].plot(size, mean_perplexity(runs_at_rate), ".", alpha=0.4, **style)
        panels[2].plot(size, mean_perplexity(best), "o", ms=8, **style)
    labels = ("step", "seconds in training steps", "optimizer state (MiB)")
    for panel, label in zip(panels, labels, strict=True):
        panel.set(xlabel=label, yscale="log", ylim=(0.96 * lowest, 2.2 * lowest))
        panel.yaxis.set_major_formatter("{x:.3g}")
        panel.yaxis.set_minor_formatter("{x:.3g}")
        panel.grid(alpha=0.3, which="both")
    panels[2].set_xlim(left=0)
    panels[2].set_title("large: best learning rate; small: the others", fontsize=9)
    panels[0].set_ylabel("validation perplexity (per token)")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    comparison, rest = tyro.cli(Comparison, args=argv, return_unknown_args=True)
    try:
        runs = run_all(comparison, parse(rest))
    except train.REFUSALS as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    out = Path(comparison.out)
    command = f"python -m examples.flax_lm.compare {' '.join(argv)}".strip()
    written = {"command": command, "date": now(), "machine": machine()}
    written |= {"versions": versions(), "runs": runs}
    write_json(out / "compare.json", written)
    (out / "compare.md").write_text(table(runs))
    draw(runs, out / "compare.png")
    print(table(runs))
    print(f"Table, figure and all figures behind them: {out.absolute()}")


if __name__ == "__main__":
    main()
