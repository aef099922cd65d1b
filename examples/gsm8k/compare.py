r"""AdamW against LDAdam on one model and one order of the problems.

    python -m examples.gsm8k.compare --preset cpu --steps 60 \
        --model DIR --data GSM8K_DIR --out DIR --exact-match-problems 200

trains each variant at each of its rates, and writes compare.json, compare.md and
compare.png to OUT. A comparison that was stopped goes on where it was: runs with a
result.json are kept. All other options are those of `examples.gsm8k.train`.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

from examples.flax_lm import report, sharding
from examples.flax_lm.config import ConfigError
from examples.flax_lm.files import write_json
from examples.flax_lm.folder import refuse_file, writing

from . import evaluate
from .config import Config, parse
from .evaluate import answer_loss
from .loading import load
from .train import REFUSALS, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "ldadamw-float32": {"optimizer": "ldadamw"},
    "ldadamw-bfloat16": {"optimizer": "ldadamw", "error_dtype": "bfloat16"},
    "ldadamw-int8": {"optimizer": "ldadamw", "error_dtype": "int8"},
    "ldadamw-recovery": {"optimizer": "ldadamw", "residual": "recovery"},
    "ldadamw-none": {"optimizer": "ldadamw", "residual": "none"},
}
COLUMNS = ("variant", "rate", "answer loss", "exact match", "state", "seconds a step")


def compare(base: Config, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Make the runs that are missing, the first rate of each variant first."""
    before = kept(base.folder / "before.json", lambda: measure_before(base))
    rates = {v: rates_of(v, options) for v in options.variants}
    cases = [
        (variant, own[i])
        for i in range(max(map(len, rates.values())))
        for variant, own in rates.items()
        if i < len(own)
    ]
    rows = []
    for variant, rate in cases:
        rows.append({"variant": variant, "rate": rate} | run(base, variant, rate))
        write(base, before, rows)
    if options.exact_match_problems:
        add_exact_match(base, options.exact_match_problems, before, rows)
        write(base, before, rows)
    return rows


def rates_of(variant: str, options: argparse.Namespace) -> list[float]:
    return options.adamw_rates if variant == "adamw" else options.ldadamw_rates


def kept(path: Path, make: Any) -> dict[str, Any]:
    """What an earlier start has written, or else what is made now."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text())


def folder_of(base: Config, variant: str, rate: float) -> Path:
    return base.folder / f"{variant}-lr{rate:g}"


def run(base: Config, variant: str, rate: float) -> dict[str, Any]:
    """The result of one run, made where it is missing.

    Raises:
      ConfigError: if it was made under other options.
    """
    folder = folder_of(base, variant, rate)
    optim = dataclasses.replace(base.optim, learning_rate=rate, **VARIANTS[variant])
    own = dataclasses.replace(
        base.run, out=str(folder), overwrite=True, eval_before=False
    )
    config = dataclasses.replace(base, optim=optim, run=own)
    path = folder / "result.json"
    if not path.exists():
        return train(config, Console())
    result = json.loads(path.read_text())
    for name in ("optim", "train"):
        if result["config"][name] != config.to_dict()[name]:
            raise ConfigError(
                f"{folder} was made with other options. Give those, or another --out."
            )
    return result


def measure_before(base: Config) -> dict[str, Any]:
    """The answer loss of the model as it is."""
    mesh, run, c = sharding.make_mesh(base.run.mesh), base.run, base.train
    loaded = load(
        Path(run.model),
        Path(run.data),
        mesh,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        length=c.length,
        progress=run.progress,
    )
    problems = loaded.problems.test[: run.eval_problems or None]
    size = run.eval_batch_size
    loss = answer_loss(
        loaded.config, loaded.params, problems, size, mesh, progress=run.progress
    )
    return {"answer_loss": loss, "problems": len(problems)}


def best_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The run of least loss of each variant."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        held = best.get(row["variant"], row)
        best[row["variant"]] = min(row, held, key=lambda r: r["answer_loss"])
    return list(best.values())


def add_exact_match(
    base: Config, problems: int, before: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Solve the first test problems with the model as it was, and with the best."""
    models = {base.folder / "before-match.json": (Path(base.run.model), before)}
    for row in best_of(rows):
        folder = folder_of(base, row["variant"], row["rate"])
        models[folder / "match.json"] = (folder / "model", row)
    for path, (model, row) in models.items():
        options = evaluate.Options(
            model=model,
            data=Path(base.run.data),
            problems=problems,
            batch_size=base.run.generate_batch_size,
            max_new_tokens=base.run.max_new_tokens,
            dtype=base.train.dtype,
            predictions=path.with_suffix(".jsonl"),
            mesh=base.run.mesh,
            progress=base.run.progress,
        )
        row["match"] = kept(path, lambda o=options: evaluate.evaluate(o))


def write(base: Config, before: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """compare.json, compare.md and compare.png, as far as the runs are made."""
    out = base.folder
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines.append(
        _line(["as it was", "", f"{before['answer_loss']:.4f}", _match(before), "", ""])
    )
    best = best_of(rows)
    for row in sorted(rows, key=lambda r: (r["variant"], r["rate"])):
        loss = f"{row['answer_loss']:.4f}"
        lines.append(
            _line(
                [
                    row["variant"],
                    f"{row['rate']:g}",
                    f"**{loss}**" if row in best else loss,
                    _match(row),
                    report.mib(row["state_bytes"]),
                    f"{row['seconds'] / row['steps']:.1f}",
                ]
            )
        )
    (out / "compare.md").write_text("\n".join(lines) + "\n")
    about = {"before": before, "runs": [_without_place(row) for row in rows]}
    write_json(out / "compare.json", about)
    draw(before, rows, out / "compare.png")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _match(row: dict[str, Any]) -> str:
    return f"{row['match']['exact_match']:.3f}" if "match" in row else "not run"


def _without_place(row: dict[str, Any]) -> dict[str, Any]:
    """Folders are where the run was made, and nobody else's."""
    config = row["config"]
    places = ("model", "data", "out")
    run = {k: v for k, v in config["run"].items() if k not in places}
    return row | {"config": config | {"run": run}}


def draw(before: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Loss after the training against the rate, and the training losses of the best."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = sorted(
            (r["rate"], r["answer_loss"]) for r in rows if r["variant"] == variant
        )
        left.plot(*zip(*own, strict=True), marker="o", label=variant)
    left.axhline(before["answer_loss"], color="grey", ls="--", label="as it was")
    left.set(xscale="log", xlabel="peak learning rate")
    left.set(ylabel="answer loss on test problems (nats a token)")
    for row in best_of(rows):
        steps = range(1, len(row["train_losses"]) + 1)
        label = f"{row['variant']}, {row['rate']:g}"
        right.plot(steps, row["train_losses"], marker=".", label=label)
    right.set(xlabel="step", ylabel="answer loss on the batch (nats a token)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        default=["adamw", "ldadamw-float32", "ldadamw-recovery"],
    )
    rates: dict[str, Any] = {"nargs": "+", "type": float}
    parser.add_argument("--adamw-rates", default=[1e-4, 5e-5, 2e-4], **rates)
    parser.add_argument("--ldadamw-rates", default=[2e-4, 1e-4, 4e-4], **rates)
    parser.add_argument("--exact-match-problems", type=int, default=0)
    options, rest = parser.parse_known_args(argv)
    try:
        config = parse(rest)
        refuse_file(config.folder)
        with writing(config.folder):
            compare(config, options)
    except REFUSALS as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
