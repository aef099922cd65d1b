"""What is compiled: gradients for each length of batch, one update, predictions.

The gradients and the optimizer's step are two programs: lengths differ between
batches and the update does not, so that only the first is compiled for each length,
and the optimizer's own time can be told apart.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.hf import encoder
from examples.hf.encoder import EncoderConfig

from .config import OptimConfig, TrainConfig
from .data import Batch, Tokens, in_order, steps_per_epoch
from .optimizers import make_optimizer


class TrainState(NamedTuple):
    """All that a run needs to go on; the step is also the position in the data."""

    step: jax.Array
    params: Any
    opt_state: Any


def total_steps(train: TrainConfig, rows: int) -> int:
    return math.ceil(train.epochs * steps_per_epoch(rows, train.batch_size))


def rates(train: TrainConfig, steps: int) -> np.ndarray:
    """The learning rate of each step: up in the warm-up, then linear to zero."""
    warmup = round(train.warmup * steps)
    at = np.arange(steps)
    up, down = (at + 1) / (warmup + 1), (steps - at) / max(steps - warmup, 1)
    return (train.learning_rate * np.minimum(up, down)).astype(np.float32)


def loss_fn(
    params: Any, batch: Batch, key: jax.Array, model: nnx.GraphDef, regression: bool
) -> jax.Array:
    """Cross-entropy in nats, or squared error, averaged over the rows that count."""
    inputs = (batch.tokens_bt, batch.types_bt, batch.mask_bt)
    logits_bc = nnx.merge(model, params)(*inputs, key).logits_bc
    if regression:
        losses_b = jnp.square(logits_bc[:, 0] - batch.labels_b)
    else:
        losses_b = optax.softmax_cross_entropy_with_integer_labels(
            logits_bc, batch.labels_b
        )
    return jnp.sum(losses_b * batch.weights_b) / jnp.sum(batch.weights_b)


class Program:
    """The compiled functions, shared by all runs of a model and an optimizer."""

    def __init__(self, model: EncoderConfig, optim: OptimConfig, dtype: str):
        self.tx = make_optimizer(optim)
        graph = encoder.graph(model, jnp.dtype(dtype))
        self.gradients, self.logits = _of_model(graph, len(model.labels) == 1)
        self.init_optimizer = jax.jit(self.tx.init)
        self.update = jax.jit(self._update, donate_argnums=0)

    def init(self, params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, self.init_optimizer(params))

    def _update(self, state: TrainState, grads: Any, rate: jax.Array) -> TrainState:
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        updates = optax.tree.scale(rate, updates)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state)

    def predict(
        self, params: Any, tokens: Tokens, size: int, max_length: int, pad: int
    ) -> np.ndarray:
        """Logits of all rows in their order, shape (rows, classes)."""
        found: dict[int, np.ndarray] = {}
        for rows, batch in in_order(tokens, size, max_length, pad):
            logits_bc = np.asarray(self.logits(params, batch))
            found |= dict(zip(rows.tolist(), logits_bc, strict=False))
        return np.stack([found[i] for i in range(len(tokens))])


@functools.lru_cache(maxsize=4)
def _of_model(graph: nnx.GraphDef, regression: bool) -> tuple[Any, Any]:
    """Gradients and logits do not depend on the optimizer, which may change."""
    loss = functools.partial(loss_fn, model=graph, regression=regression)

    def gradients(params: Any, batch: Batch, seed: int, step: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.value_and_grad(loss)(params, batch, key)

    def logits(params: Any, batch: Batch) -> jax.Array:
        inputs = (batch.tokens_bt, batch.types_bt, batch.mask_bt)
        return nnx.merge(graph, params)(*inputs).logits_bc

    return jax.jit(gradients), jax.jit(logits)


@functools.lru_cache(maxsize=8)
def program(model: EncoderConfig, optim: OptimConfig, dtype: str) -> Program:
    return Program(model, optim, dtype)
