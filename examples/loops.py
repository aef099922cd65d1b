"""Training loops for what people do beside plain training, on one small network each.

    python -m examples.loops

Each function trains and returns its losses; all of them use :func:`fit`, a loop in bare
JAX, but where the loop itself is the matter. Frameworks on a mesh, with a checkpoint:
``examples/frameworks``.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ldadam_optax import (
    LDAdamDimensionNumbers,
    accumulate_gradients,
    flax_dimension_numbers,
    ldadamw,
)

STEPS, RANK = 60, 4
Loss = Callable[..., jax.Array]


def data() -> tuple[jax.Array, jax.Array]:
    """Inputs and the outputs of a small random network."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16))
    y = np.tanh(x @ rng.normal(size=(16, 16)))
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def init(model: nn.Module, x: jax.Array) -> Any:
    return model.init(jax.random.key(0), x)["params"]


def loss_of(model: nn.Module) -> Loss:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        prediction: Any = model.apply({"params": params}, x)
        return jnp.mean((prediction.astype(jnp.float32) - y) ** 2)

    return loss


def fit(
    tx: optax.GradientTransformation,
    params: Any,
    loss: Loss,
    x: jax.Array,
    y: jax.Array,
    steps: int = STEPS,
) -> tuple[list[float], Any, Any]:
    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, params, state


class MLP(nn.Module):
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = lambda features: nn.Dense(
            features, dtype=self.dtype, param_dtype=self.param_dtype
        )
        return dense(16)(jax.nn.gelu(dense(64)(x)))


def scanned_layers() -> list[float]:
    """Linen's ``nn.scan``: a stack of layers in one leaf, whose axis is named."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(16)(jax.nn.gelu(nn.Dense(64)(x))), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return layers(name="layers")(x, None)[0]

    x, y = data()
    model = Stack()
    specs = lambda params: flax_dimension_numbers(params, scan_axes={"layers": 0})
    tx = ldadamw(3e-3, RANK, weight_dimension_numbers=specs)
    return fit(tx, init(model, x), loss_of(model), x, y)[0]


def flax_nnx() -> list[float]:
    """NNX: the model and the optimizer are updated in place."""
    x, y = data()
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(16, 64, rngs=rngs), jax.nn.gelu, nnx.Linear(64, 16, rngs=rngs)
    )
    optimizer = nnx.Optimizer(model, ldadamw(1e-2, RANK), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(x) - y) ** 2)
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer)) for _ in range(STEPS)]


def haiku() -> list[float]:
    """Haiku: parameters are a dict of dicts, which :func:`fit` takes as it is."""
    import haiku as hk

    x, y = data()
    model = hk.without_apply_rng(
        hk.transform(lambda x: hk.Linear(16)(jax.nn.gelu(hk.Linear(64)(x))))
    )
    loss = lambda params, x, y: jnp.mean((model.apply(params, x) - y) ** 2)
    return fit(ldadamw(1e-2, RANK), model.init(jax.random.key(0), x), loss, x, y)[0]


def equinox() -> list[float]:
    """Equinox: the model is the tree; the optimizer takes its arrays alone."""
    import equinox as eqx

    x, y = data()
    model = eqx.nn.MLP(16, 16, 64, 1, jax.nn.gelu, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x, y):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    return fit(ldadamw(1e-2, RANK), params, loss, x, y)[0]


def bare_jax() -> list[float]:
    """No library: a dict of arrays, a function, and the loop written out."""
    x, y = data()
    keys = jax.random.split(jax.random.key(0))
    params = {
        "up": jax.random.normal(keys[0], (16, 64)) / 4,
        "bias": jnp.zeros(64),
        "down": jax.random.normal(keys[1], (64, 16)) / 8,
    }
    tx = ldadamw(1e-2, RANK)
    state, losses = tx.init(params), []

    def loss(params):
        hidden = jax.nn.gelu(x @ params["up"] + params["bias"][None])
        return jnp.mean((hidden @ params["down"] - y) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses


def part_frozen() -> list[float]:
    """A frozen part has no state at all, and does not move."""
    x, y = data()
    params = init(MLP(), x)
    labels = lambda params: {name: name for name in params}
    tx = optax.partition(
        {"Dense_0": optax.set_to_zero(), "Dense_1": ldadamw(1e-2, RANK)}, labels
    )
    losses, trained, _ = fit(tx, params, loss_of(MLP()), x, y)
    np.testing.assert_array_equal(
        trained["Dense_0"]["kernel"], params["Dense_0"]["kernel"]
    )
    return losses


def master_weights() -> list[float]:
    """Float32 weights and state, bfloat16 in the network."""
    x, y = data()
    model = MLP(dtype=jnp.bfloat16)
    return fit(ldadamw(1e-2, RANK), init(model, x), loss_of(model), x, y)[0]


def pure_bfloat16() -> list[float]:
    """Bfloat16 everywhere: weights, moments, basis and error."""
    x, y = data()
    model = MLP(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    storage = ("mu_dtype", "nu_dtype", "projector_dtype", "error_dtype")
    tx = ldadamw(1e-2, RANK, **dict.fromkeys(storage, "bfloat16"))
    return fit(tx, init(model, x), loss_of(model), x, y)[0]


def accumulation_in_the_error_buffer() -> list[float]:
    """Four micro-batches, summed where the error lies: no accumulator."""
    x, y = data()
    loss, tx = loss_of(MLP()), ldadamw(1e-2, RANK)
    micro_batches = tuple(array.reshape(4, 16, 16) for array in (x, y))
    value_and_grad = jax.value_and_grad(lambda params, batch: loss(params, *batch))

    @jax.jit
    def step(params, state):
        values, updates, extra_args = accumulate_gradients(
            value_and_grad, params, state, micro_batches
        )
        updates, state = tx.update(updates, state, params, **extra_args)
        return optax.apply_updates(params, updates), state, values.mean()

    params, losses = init(MLP(), x), []
    state = tx.init(params)
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses


def accumulation_by_multi_steps() -> list[float]:
    """The same through ``optax.MultiSteps``, with its accumulator."""
    x, y = data()
    tx = optax.MultiSteps(ldadamw(1e-2, RANK), every_k_schedule=4)
    tx = tx.gradient_transformation()
    return fit(tx, init(MLP(), x), loss_of(MLP()), x, y, steps=4 * STEPS)[0]


def injected_schedules() -> list[float]:
    """Learning rate, rho and decay as schedules; the rank stays a Python number."""
    x, y = data()
    tx = optax.inject_hyperparams(ldadamw, static_args=("rank",))(
        learning_rate=optax.warmup_cosine_decay_schedule(0, 2e-2, 5, STEPS),
        rank=RANK,
        rho=optax.linear_schedule(0.5, 0.95, STEPS),
        weight_decay=optax.linear_schedule(1e-2, 0, STEPS),
    )
    losses, _, state = fit(tx, init(MLP(), x), loss_of(MLP()), x, y)
    last = state.hyperparams
    assert last["rho"] > 0.9
    assert last["weight_decay"] < 1e-3 > last["learning_rate"]
    return losses


def average_of_the_weights() -> list[float]:
    """An exponential moving average beside the weights; losses are the average's."""
    x, y = data()
    loss, tx, average = loss_of(MLP()), ldadamw(1e-2, RANK), optax.ema(0.9)

    @jax.jit
    def step(params, state, averaged):
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        mean, averaged = average.update(params, averaged)
        return params, state, averaged, loss(mean, x, y)

    params, losses = init(MLP(), x), []
    state, averaged = tx.init(params), average.init(params)
    for _ in range(STEPS):
        params, state, averaged, value = step(params, state, averaged)
        losses.append(float(value))
    return losses


def convolutions() -> list[float]:
    """Kernels (height, width, in, out) are matrices, (all but out) by out."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            images = x.reshape(-1, 4, 4, 1)
            images = jax.nn.gelu(nn.Conv(16, (3, 3))(images))
            images = jax.nn.gelu(nn.Conv(16, (3, 3))(images))
            return nn.Dense(16)(images.reshape(len(x), -1))

    x, y = data()
    tx = ldadamw(1e-2, RANK, weight_dimension_numbers=flax_dimension_numbers)
    return fit(tx, init(Net(), x), loss_of(Net()), x, y)[0]


def mixture_of_experts() -> list[float]:
    """Experts (E, in, out) are a matrix each; the router is small and takes AdamW."""
    x, y = data()
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "router": jax.random.normal(keys[0], (16, 4)) / 4,
        "up": jax.random.normal(keys[1], (4, 16, 32)) / 4,
        "down": jax.random.normal(keys[2], (4, 32, 16)) / 32**0.5,
    }

    def loss(params, x, y):
        gates = jax.nn.softmax(x @ params["router"])
        hidden = jax.nn.gelu(jnp.einsum("bi,eij->ebj", x, params["up"]))
        outputs = jnp.einsum("ebj,ejo->ebo", hidden, params["down"])
        return jnp.mean((jnp.einsum("be,ebo->bo", gates, outputs) - y) ** 2)

    experts = LDAdamDimensionNumbers(1, 2)
    specs = {"router": None, "up": experts, "down": experts}
    return fit(ldadamw(1e-2, RANK, weight_dimension_numbers=specs), params, loss, x, y)[
        0
    ]


#: Each loop and the loss that it has to come below.
LOOPS = {
    flax_nnx: 0.25,
    haiku: 0.25,
    equinox: 0.25,
    bare_jax: 0.25,
    scanned_layers: 0.6,
    part_frozen: 0.5,
    master_weights: 0.25,
    pure_bfloat16: 0.25,
    accumulation_in_the_error_buffer: 0.25,
    accumulation_by_multi_steps: 0.25,
    injected_schedules: 0.25,
    average_of_the_weights: 0.25,
    convolutions: 0.2,
    mixture_of_experts: 0.2,
}


def main() -> None:
    for loop, bound in LOOPS.items():
        losses = loop()
        print(f"{loop.__name__}: {losses[0]:.3f} -> {losses[-1]:.3f}, < {bound}")


if __name__ == "__main__":
    main()
