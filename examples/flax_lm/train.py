"""Train the language model: `python -m examples.flax_lm.train`.

Without arguments: bytes of the standard library's source, 0.8 M parameters, LDAdam
of rank 16, on the CPU, no download. Every option: `--help`, or `config.py`.
"""

import math
import signal
import time
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from rich.console import Console
from tqdm import tqdm

from . import report, sharding
from .checkpoints import CheckpointError, Checkpoints, identity, prepare_folder
from .config import Config, ConfigError, parse
from .data import Corpus, DataError, load_corpus, training_batch, validation_batches
from .model import Params, generate, graph, init_params
from .optimizers import learning_rate, make_optimizer


class TrainState(NamedTuple):
    """All that a run needs to go on; the step is also the position in the data."""

    step: Any
    params: Any
    opt_state: Any


class Result(NamedTuple):
    """The last step, and the rows of metrics.csv."""

    step: int
    rows: list[dict[str, Any]]


def loss_fn(params: Params, batch_bt: jax.Array, model: nnx.GraphDef) -> jax.Array:
    """Mean negative log-likelihood of each token given those before it, in nats."""
    logits_btv = nnx.merge(model, params)(batch_bt[:, :-1])
    losses_bt = optax.softmax_cross_entropy_with_integer_labels(
        logits_btv, batch_bt[:, 1:]
    )
    return losses_bt.mean()


def mean_loss_and_grads(
    params: Params, batch_bt: jax.Array, model: nnx.GraphDef, micro_batches: int
) -> tuple[jax.Array, Params]:
    """Loss and gradients, averaged over micro-batches that run one by one."""
    loss_and_grads = jax.value_and_grad(partial(loss_fn, model=model))
    if micro_batches == 1:
        return loss_and_grads(params, batch_bt)

    def add(total: Any, micro_bt: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, loss_and_grads(params, micro_bt)), None

    # Every micro-batch takes some rows of each device: no row has to move.
    b, t = batch_bt.shape
    micro_abt = batch_bt.reshape(b // micro_batches, micro_batches, t).swapaxes(0, 1)
    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    total, _ = jax.lax.scan(add, zeros, micro_abt)
    return jax.tree.map(lambda x: x / micro_batches, total)


def make_train_step(config: Config) -> Any:
    """The function (state, batch) -> (state, loss) that is compiled."""
    model = graph(config.model)
    tx = make_optimizer(config.optim, config.train)

    def train_step(
        state: TrainState, batch_bt: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        loss, grads = mean_loss_and_grads(
            state.params, batch_bt, model, config.train.accumulate
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), loss

    return train_step


def init_state(config: Config) -> TrainState:
    params = init_params(config.model, config.train.seed)
    tx = make_optimizer(config.optim, config.train)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


class Program:
    """The compiled functions of a run, and where its arrays lie."""

    def __init__(self, config: Config):
        c = config.train
        self.config = config
        self.mesh = sharding.make_mesh(config.run.mesh)
        self.batch_shape = (c.batch_size, c.context + 1)
        self.rows = sharding.batch_sharding(self.mesh, c.batch_size, c.accumulate)
        shapes = jax.eval_shape(partial(init_state, config))
        param_specs = sharding.param_specs(shapes.params, self.mesh)
        tx = make_optimizer(config.optim, config.train)
        state_specs = sharding.state_specs(tx, shapes.params, param_specs)
        specs = TrainState(P(), param_specs, state_specs)
        self.layout = sharding.shardings(self.mesh, specs)
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            self.layout,
        )
        self.train_step: Any = None

    def compile(self) -> int:
        """Compile, so that no step's time contains it; return temporary bytes."""
        batch = jax.ShapeDtypeStruct(self.batch_shape, jnp.int32, sharding=self.rows)
        everywhere = jax.NamedSharding(self.mesh, P())
        step = jax.jit(
            make_train_step(self.config),
            donate_argnums=0,
            out_shardings=(self.layout, everywhere),
        )
        with jax.set_mesh(self.mesh):
            self.train_step = step.lower(self.abstract_state, batch).compile()
        loss = partial(loss_fn, model=graph(self.config.model))
        self.loss = jax.jit(loss, out_shardings=everywhere)
        memory = self.train_step.memory_analysis()
        return memory.temp_size_in_bytes if memory else 0

    def init(self) -> TrainState:
        init = jax.jit(partial(init_state, self.config), out_shardings=self.layout)
        with jax.set_mesh(self.mesh):
            return init()

    def batch(self, corpus: Corpus, step: int) -> jax.Array:
        seed = self.config.train.seed
        return training_batch(corpus, seed, step, self.batch_shape, self.rows)

    def validate(self, params: Params, corpus: Corpus) -> dict[str, float]:
        batches = validation_batches(
            corpus, self.config.run.eval_batches, self.batch_shape, self.rows
        )
        with jax.set_mesh(self.mesh):
            loss = float(np.mean([self.loss(params, read()) for read in batches]))
        return {"valid_loss": loss, "valid_perplexity": math.exp(loss)}

    def sample(self, params: Params, corpus: Corpus) -> str:
        """Text that goes on from the first bytes of the validation files."""
        length = self.config.run.sample_bytes
        prompt_t = corpus.valid.window(0, min(32, self.config.train.context))
        tokens_t = np.zeros(len(prompt_t) + length, np.int32)
        tokens_t[: len(prompt_t)] = prompt_t
        fill = jax.jit(
            partial(generate, self.config.model),
            static_argnames="start",
            out_shardings=jax.NamedSharding(self.mesh, P()),
        )
        key = jax.random.key(self.config.train.seed)
        with jax.set_mesh(self.mesh):
            drawn_t = np.asarray(fill(params, tokens_t, start=len(prompt_t), key=key))
        return bytes(drawn_t[drawn_t < 256].astype(np.uint8)).decode(errors="replace")


class StopSignals:
    """Ctrl-C and SIGTERM ask to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, at_report: bool) -> bool:
        """Whether any process was asked; several compare notes at reports only."""
        if jax.process_count() > 1 and not at_report:
            return False
        return sharding.any_process(self.asked)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self.before[number])


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
    corpus = load_corpus(config.run.data, config.train.context)
    program = Program(config)
    prepare_folder(config)
    same = identity(config, corpus.fingerprint)
    with Checkpoints(config.folder, same, config.run.keep_checkpoints) as saved:
        if config.run.resume:
            state, seconds = saved.restore(program.abstract_state)
        else:
            state, seconds = program.init(), 0.0
        tell_start(console, program, corpus, int(state.step))
        with report.Metrics(config.folder, int(state.step)) as metrics:
            clock = Clock(seconds)
            state = run_steps(program, corpus, state, saved, metrics, clock)
    result = Result(int(state.step), metrics.rows)
    tell_end(console, program, corpus, state, result)
    return result


def run_steps(
    program: Program,
    corpus: Corpus,
    state: TrainState,
    saved: Checkpoints,
    metrics: report.Metrics,
    clock: Clock,
) -> TrainState:
    """The loop. Losses stay on the device between reports: no step waits for one."""
    run, total = program.config.run, program.config.train.steps
    step, stop, losses = int(state.step), False, []
    with StopSignals() as signals, progress_bar(program.config, step) as bar:
        clock.start()
        while step < total and not stop:
            state, loss = program.train_step(state, program.batch(corpus, step))
            losses.append(loss)
            step += 1
            last = step == total
            stop = signals.agreed(due(step, run.log_every))
            log = due(step, run.log_every, run.eval_every, run.checkpoint_every)
            if log or last or stop:
                rows = loss_rows(program.config, step, jax.device_get(losses), clock)
                losses.clear()
                if last or due(step, run.eval_every):
                    rows[-1] |= program.validate(state.params, corpus)
                metrics.add(rows)
                show_progress(bar, metrics.rows, len(rows))
                if last or stop or due(step, run.checkpoint_every):
                    saved.save(step, state, clock.seconds)
                clock.start()
    return state


def due(step: int, *everies: int) -> bool:
    return any(every and step % every == 0 for every in everies)


def loss_rows(
    config: Config, step: int, losses: list[np.ndarray], clock: Clock
) -> list[dict[str, Any]]:
    """One row for each step since the last report; they share its time evenly."""
    before, spent = clock.seconds, clock.stop()
    rate = learning_rate(config.optim, config.train)
    tokens = config.train.batch_size * config.train.context
    return [
        {
            "step": (s := step - len(losses) + i),
            "tokens": s * tokens,
            "seconds": round(before + spent * i / len(losses), 4),
            "learning_rate": float(np.asarray(rate(s - 1))),
            "train_loss": float(loss),
        }
        for i, loss in enumerate(losses, start=1)
    ]


def progress_bar(config: Config, step: int) -> tqdm:
    return tqdm(
        total=config.train.steps,
        initial=step,
        unit="step",
        dynamic_ncols=True,
        disable=not config.run.progress or jax.process_index() != 0,
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


def tell_start(console: Console, program: Program, corpus: Corpus, start: int) -> None:
    """Print what will run, and compile it."""
    config = program.config
    report.print_config(console, config)
    report.print_state_table(console, config, program.abstract_state.params)
    console.print(
        f"Data: {corpus.name}: {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.valid):,} of other files for validation."
    )
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
    corpus: Corpus,
    state: TrainState,
    result: Result,
) -> None:
    """Write the curve, the result and a sample; say how to go on."""
    config, folder = program.config, program.config.folder
    if result.step < config.train.steps:
        console.print(
            f"Stopped after step {result.step}; saved. Go on with --resume "
            f"--out {folder}"
        )
        return
    text = program.sample(state.params, corpus)
    if jax.process_index() == 0:
        title = f"{config.preset}, {config.optim.optimizer}"
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


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train; refusals are one message, not a traceback."""
    try:
        config = parse(argv)
        sharding.start_processes(config.run)
        train(config, Console(quiet=jax.process_index() != 0))
    except (ConfigError, DataError, CheckpointError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
