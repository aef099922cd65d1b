"""What is compiled: the optimizer, a training step, and where its arrays lie."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import ldadam_optax
from examples.flax_lm import sharding
from examples.flax_lm.config import ModelConfig
from examples.flax_lm.model import Params
from examples.flax_lm.optimizers import group_of, is_routed

from .config import Config, OptimConfig
from .data import Batch, Problem, training_batch
from .evaluate import summed_loss
from .loading import abstract_params


class TrainState(NamedTuple):
    """All that a run needs to go on; the step is also the position in the data."""

    step: Any
    params: Any
    opt_state: Any


def learning_rate(optim: OptimConfig, steps: int) -> optax.Schedule:
    """A rise from the first step on, then a line to zero after the last."""
    warmup = min(optim.warmup_steps, steps - 1)
    peak = optim.learning_rate
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    fall = optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(
    optim: OptimConfig, steps: int
) -> optax.GradientTransformationExtraArgs:
    schedule = learning_rate(optim, steps)
    clip = (optax.clip_by_global_norm(optim.clip_norm),) if optim.clip_norm else ()
    if optim.optimizer == "ldadamw":
        return optax.chain(
            *clip, ldadam_optax.ldadamw(schedule, **ldadam_options(optim))
        )
    adamw = optax.adamw(
        schedule,
        b1=optim.b1 or 0.9,
        b2=optim.b2 or 0.999,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=_decayed,
    )
    return optax.chain(*clip, adamw)


def ldadam_options(optim: OptimConfig) -> dict[str, Any]:
    """What `ldadamw` takes."""
    return {
        "rank": optim.rank,
        "b1": optim.b1 or 0.908,
        "b2": optim.b2 or 0.99,
        "eps": optim.eps,
        "rho": optim.rho,
        "weight_decay": optim.weight_decay,
        "mask": _decayed,
        "residual": optim.residual,
        "mu_dtype": optim.mu_dtype,
        "nu_dtype": optim.nu_dtype,
        "error_dtype": _error_dtype(optim),
        "weight_dimension_numbers": _dimension_numbers,
    }


def _error_dtype(optim: OptimConfig) -> str | None:
    """Storage of the error buffer; None where there is none."""
    return optim.error_dtype if optim.residual == "error_feedback" else None


def _dimension_numbers(params: Params) -> Any:
    """Rows and columns of the matrices; the axis of the layers in front is a batch."""
    spec = ldadam_optax.LDAdamDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map_with_path(
        lambda path, _: spec if is_routed(path) else None, params
    )


def _decayed(params: Params) -> Any:
    return jax.tree.map_with_path(lambda path, _: group_of(path) != "norm", params)


def make_train_step(
    config: Config, model: ModelConfig, steps: int, specs: TrainState | None = None
) -> Any:
    """The function (state, batch) -> (state, loss) that is compiled.

    Micro-batches are summed onto LDAdam's error buffer, unless the norm of the
    gradients alone is asked for. Each answer token counts alike, whatever part of the
    batch it is in. On a mesh LDAdam is told how the state lies.
    """
    loss_and_grads = jax.value_and_grad(partial(summed_loss, config=model))
    tx = make_optimizer(config.optim, steps)
    parts = config.train.accumulate

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        share = batch.weights / jnp.maximum(jnp.sum(batch.weights), 1.0)
        if parts == 1:
            loss, grads = loss_and_grads(state.params, Batch(batch.tokens, share))
            told = {}
        else:
            micro = jax.tree.map(_split(parts), Batch(batch.tokens, share * parts))
            losses, grads, told = ldadam_optax.accumulate_gradients(
                loss_and_grads,
                state.params,
                state.opt_state,
                micro,
                onto_error=not config.optim.clip_norm,
            )
            loss = losses.mean()
        update: Any = partial(tx.update, **told)
        if specs is not None and config.optim.optimizer == "ldadamw":
            told_specs = (specs.params, specs.opt_state, specs.params)
            update = jax.sharding.explicit_axes(update, in_sharding=told_specs)
        updates, opt_state = update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), loss

    return train_step


def _split(parts: int) -> Any:
    """(b, ...) to (parts, b / parts, ...), each with some rows of every device."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return split


class Program:
    """The compiled step of a run, and where its arrays lie."""

    def __init__(self, config: Config, model: ModelConfig, mesh: Any, steps: int):
        c = config.train
        self.config, self.model, self.mesh, self.steps = config, model, mesh, steps
        self.rows = sharding.batch_sharding(mesh, c.batch_size, c.accumulate)
        self.tx = make_optimizer(config.optim, steps)
        params = abstract_params(model, mesh, c.param_dtype)
        param_specs = sharding.param_specs(params, mesh)
        state_specs = ldadam_optax.state_specs(self.tx, params, param_specs, mesh)
        self.specs = TrainState(P(), param_specs, state_specs)
        self.layout = sharding.shardings(mesh, self.specs)
        shapes = TrainState(
            jax.ShapeDtypeStruct((), jnp.int32),
            params,
            jax.eval_shape(self.tx.init, params),
        )
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            self.layout,
        )
        self.train_step: Any = None

    def compile(self) -> int:
        """Compile the step; return the bytes of its temporaries."""
        b, t = self.config.train.batch_size, self.config.train.length
        batch = Batch(
            jax.ShapeDtypeStruct((b, t + 1), jnp.int32, sharding=self.rows),
            jax.ShapeDtypeStruct((b, t), jnp.float32, sharding=self.rows),
        )
        specs = self.specs if self.mesh.size > 1 else None
        step = jax.jit(
            make_train_step(self.config, self.model, self.steps, specs),
            donate_argnums=0,
            out_shardings=(self.layout, jax.NamedSharding(self.mesh, P())),
        )
        with jax.set_mesh(self.mesh):
            self.train_step = step.lower(self.abstract_state, batch).compile()
        memory = self.train_step.memory_analysis()
        return memory.temp_size_in_bytes if memory else 0

    def init(self, params: Params) -> TrainState:
        """The state before the first step; each part is made where it belongs."""
        init = jax.jit(self.tx.init, out_shardings=self.layout.opt_state)
        with jax.set_mesh(self.mesh):
            step = jax.device_put(jnp.zeros((), jnp.int32), self.layout.step)
            return TrainState(step, params, init(params))

    def batch(self, problems: list[Problem], step: int) -> Batch:
        c = self.config.train
        shape = (c.batch_size, c.length)
        return training_batch(problems, c.seed, step, shape, self.rows)
