"""Train the language model: `python -m examples.flax_lm.train`.

Without arguments: bytes of the standard library's source, 0.8 M parameters, LDAdam
of rank 16, on the CPU, no download. Every option: `--help`, or `config.py`.
"""

import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from tqdm import tqdm

from . import diagnosis, report, sharding
from .checkpoints import CheckpointError, Checkpoints, identity
from .command_line import parse
from .config import Config, ConfigError
from .data import ByteData, Data, DataError, load_corpus
from .folder import FolderError, prepare_folder, writing
from .machine import keep_freed_memory
from .optimizers import learning_rate
from .program import Program, TrainState
from .ranks import with_proposed_ranks

REFUSALS = (ConfigError, DataError, FolderError, CheckpointError)
"""Errors that say all there is to say: no traceback is needed."""


class Result(NamedTuple):
    """The last step, and the rows of metrics.csv and of diagnostics.csv."""

    step: int
    rows: list[dict[str, Any]]
    diagnostics: list[dict[str, Any]]


class StopSignals:
    """Ctrl-C and SIGTERM ask to stop after the step; a later Ctrl-C stops at once.

    Shells and launchers pass a signal on that the program has got already, so that
    a second one right after the first means nothing.
    """

    def __init__(self, hours: float = 0.0) -> None:
        self.until = time.monotonic() + 3600 * hours if hours else math.inf
        self.asked_at: float | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, at_report: bool) -> bool:
        """Whether to stop: a process was asked, or the time is over.

        Several processes compare notes at reports only.
        """
        if jax.process_count() > 1 and not at_report:
            return False
        over = time.monotonic() > self.until
        return sharding.any_process(over or self.asked_at is not None)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self.asked_at = self.asked_at or now
        if number == signal.SIGINT and now > self.asked_at + 2:
            raise KeyboardInterrupt


class Clock:
    """Seconds spent in training steps; validation and saving are left out."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.start()

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> float:
        """Add the time since `start`, and return it."""
        spent = time.perf_counter() - self.started
        self.seconds += spent
        return spent


def train(config: Config, console: Console) -> Result:
    """Run from the start, or from the last checkpoint, to the end or to Ctrl-C."""
    kept = "the system's own setting"
    if config.run.keep_freed_memory:
        kept = keep_freed_memory()
    console.print(f"Allocator: {kept}.")
    program = Program(config)
    data = open_data(program)
    if config.optim.rank_gradients and not config.optim.ranks:
        config = with_proposed_ranks(program, data, console)
        program = Program(config)
    same, keep = identity(config, data.fingerprint), config.run.keep_checkpoints
    with Checkpoints(config.folder, same, keep, data.position) as saved:
        if config.run.resume:
            state, seconds = saved.restore(program.abstract_state)
            keep_length(config)
        else:
            state, seconds = program.init(), 0.0
        tell_start(console, program, data, int(state.step))
        with report.Metrics(config.folder, int(state.step)) as metrics:
            clock = Clock(seconds)
            state = run_steps(program, data, state, saved, metrics, clock)
    result = Result(int(state.step), metrics.rows, metrics.diagnostics.rows)
    tell_end(console, program, data, state, result)
    return result


def open_data(program: Program) -> Data:
    """Find the data, then make the run's folder, then read what the data needs."""
    config, place = program.config, (program.batch_shape, program.rows)
    name = config.data.data
    if name.startswith("hub:") or any(Path(name).glob("*.json.gz") if name else ()):
        return open_shards(config, *place)
    if config.data.mask_documents or config.data.tokenizer:
        raise DataError("mask_documents and tokenizer are for shards of documents.")
    corpus = load_corpus(name, config.train.context)
    prepare_folder(config)
    return ByteData(corpus, *place)


def open_shards(config: Config, shape: tuple[int, int], rows: Any) -> Data:
    try:
        from . import documents  # the packages of the extra `data` are for them alone
    except ImportError as error:
        raise DataError(
            f"{config.data.data} holds shards of documents, which need the packages of "
            f"an extra: pip install 'ldadam_optax[data]' ({error})."
        ) from error
    shards = documents.find_shards(config.data.data, config.data.subset)
    prepare_folder(config)
    return documents.open_documents(shards, config, shape, rows)


def keep_length(config: Config) -> None:
    """Let the saved config have the steps that the run was given more of."""
    path = config.folder / "config.json"
    length = {name: getattr(config.train, name) for name in ("steps", "decay_steps")}
    longer = Config.load(path).replace(**length)
    if jax.process_index() == 0 and longer.train != Config.load(path).train:
        longer.save(path)


def run_steps(
    program: Program,
    data: Data,
    state: TrainState,
    saved: Checkpoints,
    metrics: report.Metrics,
    clock: Clock,
) -> TrainState:
    """The loop. Losses stay on the device between reports: no step waits for one."""
    run, told = program.config.run, program.config.report
    total = program.config.train.steps
    diagnostics_every = program.config.diagnostics_every
    rate = learning_rate(program.config.optim, program.config.train)
    tokens = program.config.train.tokens
    step, stop, losses = int(state.step), False, []
    with (
        StopSignals(run.stop_after) as signals,
        progress_bar(program.config, step) as bar,
    ):
        clock.start()
        while step < total and not stop:
            batch = program.batch(data, step)
            if due(step, diagnostics_every):  # no loss waits then, and no time counts
                found = program.diagnose(state, batch)
                metrics.add_diagnostics(diagnosis.rows_of(step + 1, found))
                clock.start()
            state, loss = program.train_step(state, batch)
            losses.append(loss)
            step += 1
            last = step == total
            stop = signals.agreed(due(step, told.log_every))
            log = due(step, told.log_every, told.eval_every, run.checkpoint_every)
            log = log or due(step, diagnostics_every)
            if log or last or stop:
                rows = loss_rows(step, jax.device_get(losses), clock, rate, tokens)
                losses.clear()
                if last or due(step, told.eval_every):
                    rows[-1] |= program.validate(state.params, data)
                metrics.add(rows)
                show_progress(bar, metrics.rows, len(rows))
                if last or stop or due(step, run.checkpoint_every):
                    saved.save(step, state, clock.seconds)
                clock.start()
    return state


def due(step: int, *everies: int) -> bool:
    return any(every and step % every == 0 for every in everies)


def loss_rows(
    step: int,
    losses: list[np.ndarray],
    clock: Clock,
    rate: optax.Schedule,
    tokens: int,
) -> list[dict[str, Any]]:
    """One row for each step since the last report; they share its time evenly.

    Args:
      step: Steps taken.
      losses: Of the last of them.
      clock: Is stopped.
      rate: Schedule of the learning rate; asked once, as each call launches kernels.
      tokens: Tokens in a step.
    """
    before, spent = clock.seconds, clock.stop()
    first = step - len(losses)
    rates = np.asarray(rate(np.arange(first, step)))
    return [
        {
            "step": first + i,
            "tokens": (first + i) * tokens,
            "seconds": round(before + spent * i / len(losses), 4),
            "learning_rate": float(f"{rate:.6g}"),
            "train_loss": float(loss),
        }
        for i, (loss, rate) in enumerate(zip(losses, rates, strict=True), start=1)
    ]


def progress_bar(config: Config, step: int) -> tqdm:
    return tqdm(
        total=config.train.steps,
        initial=step,
        unit="step",
        dynamic_ncols=True,
        disable=not config.report.progress or jax.process_index() != 0,
    )


def show_progress(bar: tqdm, rows: list[dict[str, Any]], new: int) -> None:
    """Advance the bar by the new rows; it tells the time left by itself."""
    first = rows[-new - 1] if len(rows) > new else {"tokens": 0, "seconds": 0.0}
    spent = rows[-1]["seconds"] - first["seconds"]
    speed = (rows[-1]["tokens"] - first["tokens"]) / max(spent, 1e-9)
    valid = next((r["valid_loss"] for r in rows[::-1] if "valid_loss" in r), None)
    loss = np.mean([row["train_loss"] for row in rows[-new:]])
    told = f", validation {valid:.3f}" if valid is not None else ""
    bar.set_postfix_str(f"loss {loss:.3f}{told}, {speed:,.0f} tokens/s")
    bar.update(new)


def tell_start(console: Console, program: Program, data: Data, start: int) -> None:
    """Print what will run, and compile it."""
    config = program.config
    report.print_config(console, config)
    params = program.abstract_state.params
    report.print_state_table(console, config, params)
    if config.optim.optimizer == "ldadamw":
        report.print_memory_report(
            console, config, params, program.param_specs, program.mesh
        )
    console.print(f"Data: {data.told()}.")
    began = time.perf_counter()
    temporaries = program.compile()
    mesh = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    console.print(
        f"Mesh: {mesh} ({program.mesh.devices.flat[0].device_kind}). Compiled in "
        f"{time.perf_counter() - began:.1f} s; temporaries {report.mib(temporaries)}."
    )
    verb = f"Resumed after step {start}" if start else "Started"
    console.print(f"{verb}; Ctrl-C saves and stops. Folder: {config.folder}")


def tell_end(
    console: Console,
    program: Program,
    data: Data,
    state: TrainState,
    result: Result,
) -> None:
    """Write the curve, the result and a sample; say how to go on."""
    config, folder = program.config, program.config.folder
    title = f"{config.preset}, {config.optim.optimizer}"
    if result.diagnostics and jax.process_index() == 0:
        diagnosis.draw(result.diagnostics, title, folder / "diagnostics.png")
    if result.step < config.train.steps:
        console.print(
            f"Stopped after step {result.step}; saved. Go on with --resume "
            f"--out {folder}"
        )
        return
    text = program.sample(state.params, data)
    if jax.process_index() == 0:
        report.draw_losses(result.rows, title, folder / "loss.png")
        (folder / "sample.txt").write_text(text)
        report.write_result(config, program.abstract_state, result.rows)
    last = result.rows[-1]
    console.rule("sample")
    console.print(text, markup=False, highlight=False)
    console.rule()
    console.print(
        f"{result.step} steps in {last['seconds']:.0f} s: validation loss "
        f"{last['valid_loss']:.4f}, perplexity {last['valid_perplexity']:.3f}. "
        f"Curve, metrics and checkpoints: {folder}"
    )


def run(config: Config, console: Console) -> Result:
    """Train; an error of the file system ends with what it was and the way out.

    Raises:
        FolderError: If something cannot be written, as on a full disk.
    """
    with writing(config.folder):
        return train(config, console)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train; refusals are one message, not a traceback."""
    try:
        config = parse(argv)
        sharding.start_processes(config.devices)
        run(config, Console(quiet=jax.process_index() != 0))
    except REFUSALS as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
