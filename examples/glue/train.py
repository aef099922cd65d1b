"""Fine-tune an encoder on a task of GLUE.

    python -m examples.glue.train --model DIR --data GLUE_DIR --task RTE --out DIR

`DIR` of the model is a BERT or RoBERTa checkpoint as transformers writes it. Without
further options the settings are the published ones, with three seeds. The folder
given by `--out` gets `result.json` with GLUE's metrics by name, `curves.png`, and for
each seed its own result, its log, its predictions in the form that GLUE's server
takes (of the test rows, where they are there, and of the validation rows), and the
trained model. Ctrl-C saves and stops; `--resume` goes on, to the same bits.
"""

import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from tqdm import tqdm

from examples.flax_lm.checkpoints import CheckpointError, Checkpoints
from examples.flax_lm.config import ConfigError
from examples.flax_lm.files import write_json
from examples.flax_lm.folder import FolderError, refuse_file, writing
from examples.flax_lm.machine import machine
from examples.flax_lm.train import StopSignals
from examples.hf import architectures, encoder
from examples.hf.checkpoints import FormatError, read_config

from . import report
from .config import Config
from .data import (
    DataError,
    Tokens,
    epoch_order,
    has_split,
    load_tokenizer,
    make_batch,
    read_rows,
    steps_per_epoch,
    tokenize,
)
from .optimizers import state_bytes
from .program import Program, TrainState, program, rates, total_steps
from .tasks import TASKS, Split, Task, majority, predictions, score, submission

REFUSALS = (ConfigError, DataError, FolderError, FormatError, CheckpointError)


class Inputs(NamedTuple):
    """The task's rows as token ids."""

    train: Tokens
    valid: list[tuple[Split, Tokens]]
    test: list[tuple[Split, Tokens]]


def load_inputs(config: Config, console: Console) -> Inputs:
    """Read and tokenize all splits; the test rows where they are there."""
    task, run = TASKS[config.run.task], config.run
    model = encoder.from_json(read_config(Path(run.model)))
    length = config.train.max_length
    if length > model.longest:
        raise ConfigError(
            f"--max-length {length} is more than the {model.longest} positions of "
            f"{run.model}."
        )
    tokenizer = load_tokenizer(Path(run.model), length)

    def load(split: Split, limit: int = 0) -> Tokens:
        rows = read_rows(run.data, task, split, limit)
        if rows.left_out:
            console.print(f"{split.tsv}: {rows.left_out} rows cut short, passed over.")
        return tokenize(rows, tokenizer, model.vocab_size, model.type_vocab_size)

    inputs = Inputs(
        load(task.train, config.train.train_rows),
        [(split, load(split, config.train.valid_rows)) for split in task.valid],
        [
            (split, load(split))
            for split in task.test
            if has_split(run.data, task, split)
        ],
    )
    sizes = [len(inputs.train), sum(len(t) for _, t in inputs.valid)]
    sizes.append(sum(len(t) for _, t in inputs.test))
    console.print(
        f"{task.name}: {sizes[0]:,} rows to train on, {sizes[1]:,} for validation, "
        f"{sizes[2]:,} of the test; {np.mean(inputs.train.lengths):.0f} tokens a row."
    )
    return inputs


class SeedRun:
    """The run of one seed: its folder, its program and its rows."""

    def __init__(self, config: Config, inputs: Inputs, seed: int):
        self.config, self.inputs, self.seed = config, inputs, seed
        self.task: Task = TASKS[config.run.task]
        self.folder = Path(config.run.out).absolute() / f"seed-{seed}"
        self.steps = total_steps(config.train, len(inputs.train))
        self.rates = rates(config.train, self.steps)
        self.epoch_steps = steps_per_epoch(len(inputs.train), config.train.batch_size)
        self.order: tuple[int, list[Any]] = (-1, [])

    def load(self) -> tuple[encoder.EncoderConfig, Program, TrainState]:
        """Read the checkpoint of the model and put a head on it."""
        labels = self.task.labels or ("score",)
        model, params = encoder.load_classifier(
            Path(self.config.run.model),
            labels,
            self.seed,
            progress=self.config.run.progress,
        )
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        compiled = program(model, self.config.optim, self.config.train.dtype)
        return model, compiled, compiled.init(params)

    def batch(self, step: int, pad: int) -> Any:
        """The batch of a step: a function of the seed and the step alone."""
        epoch, at = divmod(step, self.epoch_steps)
        train, options = self.inputs.train, self.config.train
        if self.order[0] != epoch:
            rows = epoch_order(train.lengths, options.batch_size, self.seed, epoch)
            self.order = (epoch, rows)
        rows = self.order[1][at]
        return make_batch(train, rows, options.batch_size, options.max_length, pad)

    def identity(self) -> dict[str, Any]:
        sets = [self.inputs.train, *(tokens for _, tokens in self.inputs.valid)]
        data = [tokens.fingerprint for tokens in sets]
        return self.config.identity(self.seed) | {"data": data}

    def evaluate(self, predicted: list[np.ndarray]) -> dict[str, float]:
        """GLUE's metrics of predictions for the validation rows."""
        found = {}
        for (split, tokens), values in zip(self.inputs.valid, predicted, strict=True):
            assert tokens.labels is not None  # validation rows have them
            for name, value in score(self.task, tokens.labels, values).items():
                found[name + split.suffix] = value
        return found

    def predict(
        self, compiled: Program, params: Any, sets: list[tuple[Split, Tokens]], pad: int
    ) -> list[np.ndarray]:
        """Predictions for the rows of each set."""
        size, length = self.config.run.eval_batch_size, self.config.train.max_length
        outputs = (
            compiled.predict(params, tokens, size, length, pad) for _, tokens in sets
        )
        return [predictions(self.task, outputs_bc) for outputs_bc in outputs]

    def write_predictions(
        self, name: str, sets: list[tuple[Split, Tokens]], predicted: list[np.ndarray]
    ) -> None:
        """Files in the form of GLUE's server."""
        for (split, _), values in zip(sets, predicted, strict=True):
            folder = self.folder / name
            folder.mkdir(exist_ok=True)
            text = submission(self.task, values)
            (folder / f"{split.submission}.tsv").write_text(text)


def train_seed(run: SeedRun, console: Console) -> dict[str, Any] | None:
    """Train and write the seed's folder; its result, or None if it was stopped."""
    config, result = run.config, run.folder / "result.json"
    if config.run.resume and result.is_file():
        return _read_result(result, run)
    model, compiled, state = run.load()
    pad = model.pad_token_id
    run.folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(run.folder, run.identity(), keep=1) as saved:
        seconds = 0.0
        if config.run.resume and saved.manager.latest_step() is not None:
            state, seconds = saved.restore(jax.eval_shape(lambda: state))
        log = report.Log(run.folder / "metrics.jsonl", int(state.step))
        state, seconds = _steps(run, compiled, state, saved, log, seconds, pad)
    if int(state.step) < run.steps:
        console.print(f"Stopped after step {int(state.step)}; go on with --resume.")
        return None
    tested = run.predict(compiled, state.params, run.inputs.test, pad)
    run.write_predictions("predictions", run.inputs.test, tested)
    model_folder = run.folder / "model"
    if config.run.save_model:
        shutil.rmtree(model_folder, ignore_errors=True)  # left by a run cut off here
        architectures.save(
            model_folder,
            encoder,
            model,
            state.params,
            files_from=Path(config.run.model),
        )
    told = _result(run, log.rows, seconds, state.params)
    write_json(result, told)
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    return told


def _read_result(path: Path, run: SeedRun) -> dict[str, Any]:
    told = report.read_json(path)
    if told is None or told.get("identity") != run.identity():
        raise ConfigError(
            f"{path} comes from a run with other options or data. Resume with those "
            f"of its 'identity', or give another folder with --out."
        )
    return told


def _steps(
    run: SeedRun,
    compiled: Program,
    state: TrainState,
    saved: Checkpoints,
    log: report.Log,
    seconds: float,
    pad: int,
) -> tuple[TrainState, float]:
    """The loop; evaluation at the end of each epoch and of the run."""
    options, step, stop = run.config.run, int(state.step), False
    losses: list[float] = []
    times: list[tuple[float, float]] = []
    bar = tqdm(
        total=run.steps,
        initial=step,
        desc=f"{run.task.name}, seed {run.seed}",
        unit="step",
        disable=not options.progress,
        dynamic_ncols=True,
    )
    with StopSignals() as signals, bar:
        while step < run.steps and not stop:
            began = time.perf_counter()
            batch = run.batch(step, pad)
            key = (np.uint32(run.seed), np.uint32(step))
            loss, grads = compiled.gradients(state.params, batch, *key)
            losses.append(float(loss))
            middle = time.perf_counter()
            state = compiled.update(state, grads, run.rates[step])
            jax.block_until_ready(state.step)
            ended = time.perf_counter()
            times.append((ended - began, ended - middle))
            seconds += ended - began
            step += 1
            stop = signals.agreed(at_report=True)
            epoch_ends = step % run.epoch_steps == 0 or step == run.steps
            if epoch_ends or stop or step % options.log_every == 0:
                row = _row(run, step, losses, times, seconds)
                losses, times = [], []
                if epoch_ends:
                    sets = run.inputs.valid
                    predicted = run.predict(compiled, state.params, sets, pad)
                    run.write_predictions("predictions-dev", sets, predicted)
                    row |= run.evaluate(predicted)
                log.add(row)
                shown = ("train_loss", *run.task.metrics)
                told = {k: row[k] for k in shown if row.get(k) is not None}
                bar.set_postfix({k: f"{value:.3f}" for k, value in told.items()})
            bar.update()
            every = options.checkpoint_every
            if stop or (every and step % every == 0):
                saved.save(step, state, seconds)
    return state, seconds


def _row(
    run: SeedRun,
    step: int,
    losses: list[float],
    times: list[tuple[float, float]],
    seconds: float,
) -> dict[str, Any]:
    """A line of the log; the medians leave out what was spent on compiling."""
    step_seconds, update_seconds = np.median(np.array(times), axis=0)
    loss = float(np.mean(losses))
    return {
        "step": step,
        "epoch": round(step / run.epoch_steps, 4),
        "seconds": round(seconds, 3),
        "learning_rate": float(run.rates[step - 1]),
        "train_loss": loss if math.isfinite(loss) else None,  # JSON has no NaN
        "step_seconds": round(float(step_seconds), 5),
        "update_seconds": round(float(update_seconds), 5),
    }


def _result(
    run: SeedRun, rows: report.Rows, seconds: float, params: Any
) -> dict[str, Any]:
    names = [
        name + split.suffix for split in run.task.valid for name in run.task.metrics
    ]
    return {
        "task": run.task.name,
        "seed": run.seed,
        "metrics": {name: rows[-1][name] for name in names},
        "epochs": [row for row in rows if names[0] in row],
        "diverged": any(row["train_loss"] is None for row in rows),
        "steps": run.steps,
        "seconds": round(seconds, 2),
        "step_seconds": float(np.median([row["step_seconds"] for row in rows])),
        "update_seconds": float(np.median([row["update_seconds"] for row in rows])),
        "state_bytes": state_bytes(run.config.optim, params),
        "rows": {
            "train": len(run.inputs.train),
            "validation": sum(len(tokens) for _, tokens in run.inputs.valid),
        },
        "identity": run.identity(),
        "machine": machine(),
    }


def prepare_folder(config: Config) -> Path:
    """Make the folder of the results.

    Raises:
      ConfigError: if it holds something, and neither way to treat it was given.
      FolderError: if it is a file, or below one.
    """
    out = Path(config.run.out).absolute()
    refuse_file(out)
    runs = [path for path in out.glob("seed-*") if path.is_dir()]
    if config.run.overwrite:
        for path in runs:
            shutil.rmtree(path)
    elif runs and not config.run.resume:
        raise ConfigError(
            f"{out} holds results already. Give --resume to go on with them, "
            f"--overwrite to start again, or another folder with --out."
        )
    elif not runs and config.run.resume:
        raise ConfigError(f"{out} holds no run to resume. Leave out --resume.")
    out.mkdir(parents=True, exist_ok=True)
    return out


def train(config: Config, console: Console) -> dict[str, Any] | None:
    """Run all seeds; the contents of result.json, or None if it was stopped."""
    inputs = load_inputs(config, console)
    out = prepare_folder(config)
    results = []
    for seed in config.run.seeds:
        result = train_seed(SeedRun(config, inputs, seed), console)
        if result is None:
            return None
        told = ", ".join(f"{k} {v:.4f}" for k, v in result["metrics"].items())
        console.print(f"seed {seed}: {told}")
        results.append(result)
    names = list(results[0]["metrics"])
    task = TASKS[config.run.task]
    floor = {
        name + split.suffix: value
        for split, tokens in inputs.valid
        if tokens.labels is not None
        for name, value in majority(task, tokens.labels).items()
    }
    summed = {
        "task": task.name,
        "metrics": {
            name: report.summary([r["metrics"][name] for r in results])
            for name in names
        },
        "majority": floor,
        "seeds": list(config.run.seeds),
        "config": dataclasses.asdict(config),
        "state_bytes": results[0]["state_bytes"],
        "step_seconds": report.summary([r["step_seconds"] for r in results]),
        "update_seconds": report.summary([r["update_seconds"] for r in results]),
        "machine": results[-1]["machine"],
    }
    write_json(out / "result.json", summed)
    logs = {
        seed: report.Log.read(out / f"seed-{seed}" / "metrics.jsonl")
        for seed in config.run.seeds
    }
    title = f"{task.name}, {config.optim.optimizer}, {config.train.learning_rate:g}"
    report.draw_curves(logs, names, title, out / "curves.png")
    for name in names:
        value = summed["metrics"][name]
        spread = "" if value["std"] is None else f" ± {value['std']:.4f}"
        console.print(
            f"{name}: [b]{value['mean']:.4f}[/b]{spread} (majority {floor[name]:.4f})"
        )
    console.print(f"Results: {out}")
    return summed


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train; refusals are one message, not a traceback."""
    omit = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        config = tyro.cli(Config, args=argv, description=__doc__, config=omit)
        with writing(Path(config.run.out)):
            train(config, Console())
    except REFUSALS as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
