"""What is compiled: the model's loss, a training step, and where its arrays lie."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

import ldadam_optax

from . import sharding
from .config import Config
from .data import Batch, Data
from .model import Params, generate, graph, init_params
from .optimizers import ldadam_options, make_optimizer


class TrainState(NamedTuple):
    """All that a run needs to go on; the step is also the position in the data."""

    step: Any
    params: Any
    opt_state: Any


def summed_loss(
    params: Params, batch: Batch, model: nnx.GraphDef
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihoods, in nats, of the tokens to be predicted; their number.

    The first token of a document is not predicted from the one before it.
    """
    tokens_bt, segments_bt = batch
    seen_bt = None if segments_bt is None else segments_bt[:, :-1]
    logits_btv = nnx.merge(model, params)(tokens_bt[:, :-1], seen_bt)
    losses_bt = optax.softmax_cross_entropy_with_integer_labels(
        logits_btv, tokens_bt[:, 1:]
    )
    if segments_bt is None:
        return losses_bt.sum(), jnp.asarray(losses_bt.size, jnp.float32)
    counted_bt = segments_bt[:, :-1] == segments_bt[:, 1:]
    return jnp.sum(losses_bt, where=counted_bt), counted_bt.sum().astype(jnp.float32)


def loss_fn(params: Params, batch: Batch, model: nnx.GraphDef) -> jax.Array:
    """Mean negative log-likelihood of each token given those before it, in nats."""
    total, count = summed_loss(params, batch, model)
    return total / count


def split_batch(batch: Batch, micro_batches: int) -> Batch:
    """Micro-batches (a, b/a, t), each with some rows of every device: none moves."""

    def split(x_bt: jax.Array) -> jax.Array:
        b, t = x_bt.shape
        return x_bt.reshape(b // micro_batches, micro_batches, t).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def make_gradients(config: Config) -> Any:
    """The function (state, batch) -> (loss, gradients, what `update` is told of them).

    Micro-batches are accumulated onto LDAdam's error buffer, unless the norm of the
    gradients alone is asked for.
    """
    loss_and_grads = jax.value_and_grad(partial(loss_fn, model=graph(config.model)))
    parts = config.train.accumulate

    def gradients(state: TrainState, batch: Batch) -> tuple[jax.Array, Any, Any]:
        if parts == 1:
            return *loss_and_grads(state.params, batch), {}
        losses, grads, told = ldadam_optax.accumulate_gradients(
            loss_and_grads,
            state.params,
            state.opt_state,
            split_batch(batch, parts),
            onto_error=not config.optim.clip_norm,
        )
        return losses.mean(), grads, told

    return gradients


def make_validation_loss(config: Config) -> Any:
    """The function (params, batch) -> (summed loss, tokens), by micro-batches, too."""
    summed = partial(summed_loss, model=graph(config.model))

    def validation_loss(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        micro_batches = split_batch(batch, config.train.accumulate)
        losses, counts = jax.lax.map(partial(summed, params), micro_batches)
        return losses.sum(), counts.sum()

    return summed if config.train.accumulate == 1 else validation_loss


def make_train_step(config: Config, specs: TrainState | None = None) -> Any:
    """The function (state, batch, rate) -> (state, loss) that is compiled.

    On a mesh, LDAdam is told the specs of the state: it then knows that a stack of
    layers is not split, and updates one after another. A rate, if there is one, is
    multiplied with the optimizer's.
    """
    gradients = make_gradients(config)
    tx = make_optimizer(config.optim, config.train)

    def train_step(
        state: TrainState, batch: Batch, rate: jax.Array | None = None
    ) -> tuple[TrainState, jax.Array]:
        loss, grads, told = gradients(state, batch)
        update: Any = partial(tx.update, **told)
        if specs is not None and config.optim.optimizer == "ldadamw":
            told_specs = (specs.params, specs.opt_state, specs.params)
            update = jax.sharding.explicit_axes(update, in_sharding=told_specs)
        updates, opt_state = update(grads, state.opt_state, state.params)
        if rate is not None:
            updates = optax.tree.scale(rate, updates)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), loss

    return train_step


def make_diagnose(config: Config) -> Any:
    """The function (state, batch) -> numbers of each leaf, of the step to come.

    A program of its own: the training step is the same with it and without. Of the
    update it runs no more than the bases take.
    """
    gradients = make_gradients(config)
    tx = make_optimizer(config.optim, config.train)
    options = ldadam_options(config.optim)
    shared = ("side", "subspace", "weight_dimension_numbers")

    def diagnose(state: TrainState, batch: Batch) -> Any:
        _, grads, told = gradients(state, batch)
        _, next_state = tx.update(grads, state.opt_state, state.params, **told)
        if config.optim.clip_norm:  # LDAdam is given what clipping leaves
            clip = optax.clip_by_global_norm(config.optim.clip_norm)
            grads, _ = clip.update(grads, clip.init(grads))
        return ldadam_optax.diagnostics(
            grads,
            state.opt_state,
            next_state,
            **told,
            **{name: options[name] for name in shared},
        )

    return diagnose


def init_state(config: Config, key: jax.Array | None = None) -> TrainState:
    """Of the config's seed, or of a key in its place."""
    params = init_params(config.model, config.train.seed if key is None else key)
    tx = make_optimizer(config.optim, config.train)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; large, not infinite, where a run diverged."""
    return math.exp(min(loss, 700))


class Program:
    """The compiled functions of a run, and where its arrays lie."""

    def __init__(self, config: Config):
        c = config.train
        self.config = config
        self.mesh = sharding.make_mesh(config.devices.mesh)
        self.batch_shape = (c.batch_size, c.context + 1)
        self.rows = sharding.batch_sharding(self.mesh, c.batch_size, c.accumulate)
        shapes = jax.eval_shape(partial(init_state, config))
        self.param_specs = sharding.param_specs(shapes.params, self.mesh)
        tx = make_optimizer(config.optim, config.train)
        state_specs = ldadam_optax.state_specs(
            tx, shapes.params, self.param_specs, self.mesh
        )
        self.specs = TrainState(P(), self.param_specs, state_specs)
        self.layout = sharding.shardings(self.mesh, self.specs)
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            self.layout,
        )
        self.train_step: Any = None

    def compile(self) -> int:
        """Compile, so that no step's time contains it; return temporary bytes."""
        rows = jax.ShapeDtypeStruct(self.batch_shape, jnp.int32, sharding=self.rows)
        batch = Batch(rows, rows if self.config.data.mask_documents else None)
        everywhere = jax.NamedSharding(self.mesh, P())
        specs = self.specs if self.mesh.size > 1 else None
        step = jax.jit(
            make_train_step(self.config, specs),
            donate_argnums=0,
            out_shardings=(self.layout, everywhere),
        )
        with jax.set_mesh(self.mesh):
            self.train_step = step.lower(self.abstract_state, batch).compile()
        loss = make_validation_loss(self.config)
        self.loss = jax.jit(loss, out_shardings=everywhere)
        diagnose = make_diagnose(self.config)
        self.subspaces = jax.jit(diagnose, out_shardings=everywhere)
        memory = self.train_step.memory_analysis()
        return memory.temp_size_in_bytes if memory else 0

    def init(self) -> TrainState:
        """Parameters and state, each made where it belongs."""
        on_cpu = jax.default_backend() == "cpu"
        options: Any = {"xla_backend_optimization_level": 0} if on_cpu else None
        init = jax.jit(
            partial(init_state, self.config),
            out_shardings=self.layout,
            compiler_options=options,  # it runs once: a quick compile is the gain
        )
        with jax.set_mesh(self.mesh):
            return init()

    def batch(self, data: Data, step: int) -> Batch:
        return data.training_batch(self.config.train.seed, step)

    def diagnose(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        """What the next step makes of its gradient, leaf by leaf; the state stays."""
        with jax.set_mesh(self.mesh):
            return jax.device_get(self.subspaces(state, batch))

    def validate(self, params: Params, data: Data) -> dict[str, float]:
        batches = data.validation_batches(self.config.report.eval_tokens)
        with jax.set_mesh(self.mesh):
            found = [self.loss(params, read()) for read in batches]
        total, count = np.sum(np.array(jax.device_get(found), np.float64), axis=0)
        loss = float(total / count)
        return {"valid_loss": loss, "valid_perplexity": perplexity(loss)}

    def sample(self, params: Params, data: Data) -> str:
        """Text that goes on from the first held-out tokens."""
        length = self.config.report.sample_tokens
        prompt_t = data.prompt(min(32, self.config.train.context))
        tokens_t = np.zeros(len(prompt_t) + length, np.int32)
        tokens_t[: len(prompt_t)] = prompt_t

        def fill(params: Params, tokens_t: jax.Array) -> jax.Array:
            key = jax.random.key(self.config.train.seed)
            return generate(self.config.model, params, tokens_t, len(prompt_t), key)

        fill = jax.jit(fill, out_shardings=jax.NamedSharding(self.mesh, P()))
        with jax.set_mesh(self.mesh):
            return data.text(np.asarray(fill(params, tokens_t)))
