"""Fine-tune a Llama on GSM8K, all its weights, with LDAdam or AdamW.

    python -m examples.gsm8k.train --model DIR --data GSM8K_DIR --out DIR

LDAdam on eight devices: `--optimizer ldadamw --rank 32 --mesh fsdp=8`.
The preset `published` has the settings of the paper's runs, `cpu` is a few minutes.
Ctrl-C saves and stops; `--resume --out DIR` goes on, bit for bit. The folder gets
metrics.csv, loss.png, result.json, the solutions, and the model as transformers
reads it.
"""

import dataclasses
import importlib.metadata
import math
import shutil
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console
from tqdm import tqdm

from examples.flax_lm import report, sharding
from examples.flax_lm.checkpoints import CheckpointError, Checkpoints
from examples.flax_lm.config import ConfigError
from examples.flax_lm.data import DataError
from examples.flax_lm.files import write_json
from examples.flax_lm.folder import FolderError, refuse_file, writing
from examples.flax_lm.machine import machine
from examples.flax_lm.train import Clock, StopSignals, due, loss_rows
from examples.hf import architectures, llama
from examples.hf.checkpoints import FormatError

from .config import Config, RunConfig, parse
from .data import steps_of
from .evaluate import answer_loss, exact_match, solve, write_solutions
from .loading import Loaded, load
from .program import Program, TrainState, learning_rate

REFUSALS = (ConfigError, DataError, FolderError, CheckpointError, FormatError)
# What a run writes: --overwrite deletes these and nothing else.
FILES = ("config.json", "metrics.csv", "loss.png", "result.json", "before.jsonl")
FILES += ("solutions.jsonl",)
FOLDERS = ("checkpoints", "tensorboard", "model")


def train(config: Config, console: Console) -> dict[str, Any]:
    """Run from the start, or from the last checkpoint, to the end or to Ctrl-C.

    Returns:
      What result.json holds; without a loss after the training where it was stopped.
    """
    mesh = sharding.make_mesh(config.run.mesh)
    prepare_folder(config)
    loaded = load_for(config, mesh)
    steps = config.train.steps or steps_of(
        len(loaded.problems.train), config.train.epochs, config.train.batch_size
    )
    program = Program(config, loaded.config, mesh, steps)
    # Sections that a run is fixed by, under names of this job's own.
    fixed = {
        "gsm8k_optim": dataclasses.asdict(config.optim),
        "gsm8k_train": dataclasses.asdict(config.train),
        "model and data": loaded.fingerprint,
    }
    keep = config.run.keep_checkpoints
    with Checkpoints(config.folder, fixed, keep) as saved:
        if config.run.resume:
            state, seconds = saved.restore(program.abstract_state)
        else:
            state, seconds = program.init(loaded.params), 0.0
            loaded = loaded._replace(params=None)  # the step donates them
        tell_start(console, program, loaded, int(state.step))
        with report.Metrics(config.folder, int(state.step)) as metrics:
            if not metrics.rows and config.run.eval_before:
                metrics.add([measure_before(program, loaded, state)])
            clock = Clock(seconds)
            state = run_steps(program, loaded, state, saved, metrics, clock)
        rows = metrics.rows
    if int(state.step) < steps:
        console.print(
            f"Stopped after step {int(state.step)}; saved. Go on with --resume "
            f"--out {config.folder}"
        )
        return {"steps": int(state.step)}
    return finish(console, program, loaded, state, rows)


def prepare_folder(config: Config) -> None:
    """Make the run's folder and save the config there.

    Raises:
      CheckpointError: if it holds another run, or files of others, or none to resume.
      FolderError: if it is a file, or below one.
    """
    folder, run = config.folder, config.run
    refuse_file(folder)
    is_run = (folder / "config.json").exists()
    if is_run:
        Config.load(folder / "config.json")  # refuses another job's
    if run.resume and not is_run:
        raise CheckpointError(
            f"{folder} holds no run to resume. Leave out --resume to start one."
        )
    if is_run and not (run.resume or run.overwrite):
        raise CheckpointError(
            f"{folder} already holds a run. Give --resume to go on with it, "
            f"--overwrite to delete it and start again, or another folder with --out."
        )
    if not is_run and folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds files but no run (no config.json), and is left alone. "
            f"Give another folder with --out."
        )
    multihost_utils.sync_global_devices("every process has looked")
    if jax.process_index() == 0 and not run.resume:
        for name in FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / "config.json")
    multihost_utils.sync_global_devices("the folder is made")


def load_for(config: Config, mesh: Any) -> Loaded:
    c = config.train
    return load(
        Path(config.run.model),
        Path(config.run.data),
        mesh,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        remat=c.remat,
        length=c.length,
        weights=not config.run.resume,
        progress=config.run.progress,
    )


def tell_start(console: Console, program: Program, loaded: Loaded, start: int) -> None:
    """Print what will run, and compile it."""
    config, problems = program.config, loaded.problems
    began = time.perf_counter()
    temporaries = program.compile()
    params = nbytes(program.abstract_state.params)
    state = nbytes(program.abstract_state.opt_state)
    console.print(
        f"{config.optim.optimizer}: weights {report.mib(params)}, optimizer state "
        f"{report.mib(state)}, temporaries {report.mib(temporaries)}; compiled in "
        f"{time.perf_counter() - began:.1f} s."
    )
    console.print(
        f"{len(problems.train):,} problems to train on, {problems.left_out:,} longer "
        f"than {config.train.length} tokens left out; {len(problems.test):,} to test. "
        f"Steps: {program.steps:,}."
    )
    verb = f"Resumed after step {start}" if start else "Started"
    console.print(f"{verb}; Ctrl-C saves and stops. Folder: {config.folder}")


def nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure_before(
    program: Program, loaded: Loaded, state: TrainState
) -> dict[str, Any]:
    """The row of step 0, and the solutions before the training where asked for."""
    config = program.config
    if config.run.generate_before:
        solve_test(program, loaded, state, config.folder / "before.jsonl")
    start = {"step": 0, "tokens": 0, "seconds": 0.0}
    return start | measure(program, loaded, state)


def measure(program: Program, loaded: Loaded, state: TrainState) -> dict[str, float]:
    """Answer loss on the test problems, as metrics.csv names it."""
    run = program.config.run
    loss = answer_loss(
        program.model,
        state.params,
        loaded.problems.test[: run.eval_problems or None],
        run.eval_batch_size,
        program.mesh,
        progress=run.progress,
    )
    return {"valid_loss": loss, "valid_perplexity": math.exp(min(loss, 700.0))}


def solve_test(
    program: Program, loaded: Loaded, state: TrainState, path: Path
) -> dict[str, Any]:
    """Solve test problems, and write what the model wrote."""
    run = program.config.run
    if run.generate_problems < 0:
        return {}
    problems = loaded.problems.test[: run.generate_problems or None]
    solutions = solve(
        program.model,
        state.params,
        problems,
        loaded.tokenizer,
        loaded.ends,
        run.generate_batch_size,
        run.max_new_tokens,
        program.mesh,
        progress=run.progress,
    )
    if jax.process_index() == 0:
        write_solutions(path, problems, solutions)
    return {
        "exact_match": exact_match(problems, solutions),
        "solved_problems": len(problems),
    }


def run_steps(
    program: Program,
    loaded: Loaded,
    state: TrainState,
    saved: Checkpoints,
    metrics: report.Metrics,
    clock: Clock,
) -> TrainState:
    """The loop; losses stay on the device between reports."""
    run, total = program.config.run, program.steps
    c, rate = program.config.train, learning_rate(program.config.optim, total)
    tokens = c.batch_size * c.length
    step, stop, losses = int(state.step), False, []
    bar = tqdm(
        total=total,
        initial=step,
        unit="step",
        dynamic_ncols=True,
        disable=not run.progress or jax.process_index() != 0,
    )
    with StopSignals() as signals, bar:
        clock.start()
        while step < total and not stop:
            batch = program.batch(loaded.problems.train, step)
            state, loss = program.train_step(state, batch)
            losses.append(loss)
            step += 1
            last = step == total
            stop = signals.agreed(due(step, run.log_every))
            log = due(step, run.log_every, run.eval_every, run.checkpoint_every)
            if log or last or stop:
                rows = loss_rows(step, jax.device_get(losses), clock, rate, tokens)
                losses.clear()
                if last or due(step, run.eval_every):
                    rows[-1] |= measure(program, loaded, state)
                metrics.add(rows)
                bar.update(len(rows))
                bar.set_postfix_str(f"loss {rows[-1]['train_loss']:.3f}")
                save = last or stop or due(step, run.checkpoint_every)
                if save and run.checkpoint_every >= 0:
                    saved.save(step, state, clock.seconds)
                clock.start()
    return state


def finish(
    console: Console,
    program: Program,
    loaded: Loaded,
    state: TrainState,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Save the model, solve the test problems, write the curve and result.json."""
    config, folder = program.config, program.config.folder
    save_model = config.run.save_model and not (folder / "model").exists()
    multihost_utils.sync_global_devices("every process has looked for the model")
    if save_model:
        source = Path(config.run.model)
        architectures.save(
            folder / "model", llama, program.model, state.params, files_from=source
        )
    solved = solve_test(program, loaded, state, folder / "solutions.jsonl")
    result = make_result(program, rows) | solved
    if jax.process_index() == 0:
        title = f"GSM8K, {config.optim.optimizer}"
        report.draw_losses(rows, title, folder / "loss.png")
        write_json(folder / "result.json", result)
    told = f", exact match {solved['exact_match']:.3f}" if solved else ""
    losses = ", ".join(f"{v:.4f} at {k}" for k, v in result["answer_losses"].items())
    console.print(
        f"{program.steps} steps in {result['seconds']:.0f} s. Answer loss by step: "
        f"{losses}{told}. Folder: {folder}"
    )
    return result


def make_result(program: Program, rows: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [row for row in rows if "valid_loss" in row]
    versions = ("jax", "optax", "flax", "ldadam_optax")
    return {
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "config": program.config.to_dict(),
        "steps": program.steps,
        "parameters": sum(
            math.prod(x.shape) for x in jax.tree.leaves(program.abstract_state.params)
        ),
        "parameter_bytes": nbytes(program.abstract_state.params),
        "state_bytes": nbytes(program.abstract_state.opt_state),
        "seconds": rows[-1]["seconds"],
        "answer_loss": measured[-1]["valid_loss"],
        "answer_losses": {str(row["step"]): row["valid_loss"] for row in measured},
        "train_losses": [row["train_loss"] for row in rows if "train_loss" in row],
    }


def start_processes(run: RunConfig) -> None:
    devices: Any = run  # it has the options that the main job's has
    sharding.start_processes(devices)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train; refusals are one message, not a traceback."""
    try:
        config = parse(argv)
        start_processes(config.run)
        with writing(config.folder):
            train(config, Console(quiet=jax.process_index() != 0))
    except REFUSALS as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
