"""Tables and figure of `benchmarks.evidence`, from the runs that are done."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .evidence_runs import EVERY_TENTH
from .tables import markdown

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

#: What is tuned, and what runs of one setting have in common: all but the seed.
RECIPE = ("variant", "rate", "b2", "steps")
SETTING = (*RECIPE, "rank", "options")
#: What the best rate and b2 is chosen for.
CASE = ("variant", "steps", "options")
#: What a step's time depends on, and the seconds of a step by it.
TIMED = ("variant", "rank", "options")
StepTimes = Mapping[tuple[str, ...], float]


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
            cases.setdefault(key(one, CASE), []).append(runs)

    def order(runs: list[dict[str, Any]]) -> tuple[int, float]:
        return -len(runs), mean_loss(runs)

    return sorted((min(case, key=order) for case in cases.values()), key=mean_loss)


def changed(
    found: list[dict[str, Any]], rank: int
) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Every other setting, and runs at the same seeds that it is held against.

    Another rank or option is held against the same rate and b2 without it, where that
    was run, and everything else against the setting that is chosen: the one with the
    same options, if there is one, or the plain one.
    """
    settings, best = settings_of(found), chosen(found, rank)
    plain = {key(runs[0], RECIPE): runs for runs in settings if is_plain(runs[0], rank)}
    of_case = {key(runs[0], CASE): runs for runs in best}
    order = list(dict.fromkeys(key(runs[0], CASE[:2]) for runs in best))
    pairs = []
    for runs in settings:
        one, base = runs[0], plain.get(key(runs[0], RECIPE), runs)
        if base == runs:
            without = of_case.get(key(one | {"options": {}}, CASE), [])
            base = of_case.get(key(one, CASE), without)
        by_seed = {run["seed"]: run for run in base}
        paired = [run for run in runs if run["seed"] in by_seed]
        if paired and runs != base:
            pairs.append((paired, [by_seed[run["seed"]] for run in paired]))
    return sorted(pairs, key=lambda pair: order.index(key(pair[0][0], CASE[:2])))


#: Heads of what a setting is named by, in a table: `names_of`.
NAMED = ("optimizer", "rank", "rate", "b2", "other options")


def names_of(run: dict[str, Any]) -> list[str]:
    numbers = [f"{run[name]:g}" for name in ("rank", "rate", "b2")]
    return [run["variant"], *numbers, ", ".join(options_of(run))]


def table(found: list[dict[str, Any]], rank: int, times: StepTimes) -> str:
    heads = [*NAMED, "steps", "seeds", "validation loss", "spread", "perplexity"]
    heads += ["state MiB", *(["seconds"] if times else [])]
    lines = []
    for runs in chosen(found, rank):
        one, ends = runs[0], [last_loss(run) for run in runs]
        step = times.get(key(one, TIMED))
        seconds = "" if step is None else f"{one['steps'] * step:.0f}"
        lines.append(
            [
                *names_of(one),
                str(one["steps"]),
                str(len(runs)),
                f"{np.mean(ends):.3f}",
                f"{np.ptp(ends):.3f}" if len(runs) > 1 else "",
                f"{np.mean(np.exp(ends)):.3f}",
                f"{one['state_bytes'] / 2**20:.1f}",
                *([seconds] if times else []),
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
    shared = options_of(base)
    return ", ".join([*parts, *(x for x in options_of(run) if x not in shared)])


def options_of(run: dict[str, Any]) -> list[str]:
    return [f"{name} {value}" for name, value in run["options"].items()]


def draw(found: list[dict[str, Any]], rank: int, path: Path, times: StepTimes) -> None:
    """Perplexity against steps, bytes of optimizer state and, where known, seconds.

    A row of panels for each length; an optimizer has one color in all of them, and
    others than LDAdam are dashed. Nothing is drawn of changed settings alone.
    """
    kinds = ["step", "optimizer state (MiB)"] + ["seconds of steps"] * bool(times)
    if not (settings := chosen(found, rank)):
        return
    names = dict.fromkeys(key(runs[0], TIMED) for runs in settings)
    colors = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
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
        _draw_length(of_length, panels, times, colors)
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
    settings: list[list[dict[str, Any]]],
    panels: Sequence[Any],
    times: StepTimes,
    colors: Mapping[tuple[str, ...], Any],
) -> None:
    for runs in settings:
        one = runs[0]
        line = "-" if one["variant"].startswith("ldadam") else "--"
        style = {"color": colors[key(one, TIMED)], "lw": 1.5}
        curves = np.array([run["perplexity"] for run in runs], float)  # None: nan
        tuned = [f"lr {one['rate']:g}", f"b2 {one['b2']:g}"]
        label = ", ".join([one["variant"], *tuned, *options_of(one)])
        mean = curves.mean(axis=0)
        panels[0].plot(one["steps_of_curve"], mean, line, label=label, **style)
        panels[1].plot(one["state_bytes"] / 2**20, curves[:, -1].mean(), "o", **style)
        if (step := times.get(key(one, TIMED))) is not None:
            panels[2].plot(step * np.array(one["steps_of_curve"]), mean, line, **style)
