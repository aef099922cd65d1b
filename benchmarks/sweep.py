"""Runs that differ in rate and seed alone, trained side by side as one program.

A step of a small model leaves a GPU waiting for its next kernel; `vmap` over the runs
gives each kernel the work of all of them. Loss, optimizer and validation are the main
job's own. The optimizer runs at a peak rate of 1 and its update, which is linear in the
rate for every optimizer here, takes the rate of each run: the same numbers as a run on
its own but for rounding, which a test shows.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from examples.flax_lm import train
from examples.flax_lm.config import Config, ConfigError
from examples.flax_lm.program import (
    Program,
    init_state,
    make_train_step,
    make_validation_loss,
)


class Curves(NamedTuple):
    """What a sweep of r runs leaves, after each of e evaluations."""

    steps: list[int]
    losses: np.ndarray
    """Validation, in nats a token, (r, e)."""
    seconds: list[float]
    """Of training all r runs."""
    state: Any
    """Shapes and dtypes of one run's state."""


def run(configs: Sequence[Config], feeds: "Feeds") -> Curves:
    """Train to the end; nothing is saved on the way.

    Args:
        configs: Of the runs; they differ in rate, seed and folder alone.
        feeds: What they read, for the next sweep as well.

    Raises:
        ConfigError: If weights are rounded stochastically: the update is then what
            reaches the rounded weight, and cannot be scaled.
    """
    config = configs[0].replace(learning_rate=1.0)
    if config.optim.stochastic_rounding:
        raise ConfigError("A sweep scales updates: stochastic_rounding must be off.")
    by_seed = {one.train.seed: feeds.of(one) for one in configs}
    read = list(by_seed.values())
    of_run = np.array([list(by_seed).index(one.train.seed) for one in configs])
    rates = jnp.asarray([one.optim.learning_rate for one in configs])
    keys = jax.vmap(jax.random.key)(jnp.asarray([one.train.seed for one in configs]))

    init, axes, state = make_init(config)
    states = jax.jit(init)(keys)
    total, every = config.train.steps, config.report.eval_every
    length = math.gcd(total, every)
    steps = jax.jit(make_steps(config, axes), donate_argnums=0)
    validate = jax.jit(make_validation(config))
    held_out = jax.device_put(_stack([feed.held_out for feed in read], axis=1))
    batches = training_batches(read, 0, length)
    steps = steps.lower(states, rates, batches, of_run).compile()
    ends, losses, seconds, began = [], [], [], time.perf_counter()
    for end in progress(config, range(length, total + 1, length)):
        states = steps(states, rates, batches, of_run)
        if end < total:
            batches = training_batches(read, end, length)  # the device is at work
        if train.due(end, every) or end == total:
            ends.append(end)
            losses.append(jax.device_get(validate(states.params, held_out, of_run)))
            seconds.append(round(time.perf_counter() - began, 4))
    return Curves(ends, np.stack(losses, axis=1), seconds, state)


def progress(config: Config, ends: range) -> Any:
    """The same steps, with a bar that counts them."""
    off, unit = not config.report.progress, f" x {ends.step} steps"
    return tqdm(ends, unit=unit, dynamic_ncols=True, disable=off)


def make_init(config: Config) -> tuple[Callable[..., Any], Any, Any]:
    """States of all seeds; the axis of the runs in each array; one run's shapes.

    Counts of steps are the same for all, and have no such axis: what depends on the
    step alone stays a branch.
    """
    init = partial(init_state, config)
    one = jax.eval_shape(init, jax.random.key(0))
    axes = jax.tree.map(lambda x: None if _is_count(x) else 0, one)
    return jax.vmap(init, out_axes=axes), axes, one


def _is_count(x: Any) -> bool:
    return x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)


def make_steps(config: Config, axes: Any) -> Callable[..., Any]:
    """Some steps of all runs: (states, rates, batches by seed, seed of each run)."""
    step = make_train_step(config)
    all_runs = jax.vmap(step, in_axes=(axes, 0, 0), out_axes=(axes, 0))

    def steps(states: Any, rates: jax.Array, batches: Any, of_run: jax.Array) -> Any:
        def one(states: Any, batch: Any) -> tuple[Any, jax.Array]:
            return all_runs(states, _of_runs(batch, of_run), rates)

        return jax.lax.scan(one, states, batches)[0]

    return steps


def make_validation(config: Config) -> Callable[..., Any]:
    """Mean losses of all runs: (parameters, held-out batches by seed, seed of each)."""
    summed = make_validation_loss(config)

    def validate(params: Any, held_out: Any, of_run: jax.Array) -> jax.Array:
        def one(batch: Any) -> Any:
            return jax.vmap(summed)(params, _of_runs(batch, of_run))

        losses, counts = jax.lax.map(one, held_out)
        return losses.sum(axis=0) / counts.sum(axis=0)

    return validate


def _of_runs(batch: Any, of_run: jax.Array) -> Any:
    """The batch of each run, out of those of the seeds."""
    return jax.tree.map(lambda x: x[of_run], batch)


class Feed:
    """The batches of a seed, read once for all sweeps of a sitting."""

    def __init__(self, config: Config):
        self.seed, self.data = config.train.seed, train.open_data(Program(config))
        self.read: list[Any] = []
        validation = self.data.validation_batches(config.report.eval_tokens)
        self.held_out = _stack([read() for read in validation])

    def batches(self, start: int, stop: int) -> Any:
        for step in range(len(self.read), stop):
            batch = self.data.training_batch(self.seed, step)
            self.read.append(jax.device_get(batch))
        return _stack(self.read[start:stop])


class Feeds:
    """One feed for all configs that read the same."""

    def __init__(self) -> None:
        self.made: dict[Any, Feed] = {}

    def of(self, config: Config) -> Feed:
        c, vocab_size = config.train, config.model.vocab_size
        key = (config.data, vocab_size, config.report, c.seed, c.batch_size, c.context)
        if key not in self.made:
            self.made[key] = Feed(config)
        return self.made[key]


def training_batches(feeds: list[Feed], start: int, length: int) -> Any:
    """Batches of the next steps, with a step's axis in front, then the seed's."""
    return _stack([feed.batches(start, start + length) for feed in feeds], axis=1)


def _stack(batches: list[Any], axis: int = 0) -> Any:
    return jax.tree.map(lambda *x: np.stack(x, axis), *batches)
