"""Small training loops in the frameworks that users bring."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import ldadam_state

from ldadam_optax import LDAdamDimensionNumbers, flax_dimension_numbers, ldadamw

# The frameworks broadcast biases freely.
pytestmark = pytest.mark.usefixtures("any_rank_promotion")

STEPS, RANK = 60, 4


def batch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 12))
    y = np.tanh(x @ rng.normal(size=(12, 6)))
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def squared_error(prediction, target):
    return jnp.mean((prediction - target) ** 2)


def check_trained(losses, state, matrices):
    """It learns, and the matrices meant to be compressed are."""
    assert losses[-1] < 0.3 * losses[0]
    assert len(jax.tree.leaves(ldadam_state(state).mu)) == matrices


def test_flax_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(12, 32, rngs=rngs)
            self.norm = nnx.LayerNorm(32, rngs=rngs)
            self.out = nnx.Linear(32, 6, rngs=rngs)

        def __call__(self, x):
            return self.out(self.norm(jax.nn.gelu(self.hidden(x))))

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ldadamw(1e-2, rank=RANK), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda m: squared_error(m(x), y))(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer, *batch()) for _ in range(STEPS)]
    check_trained(losses, optimizer.opt_state, 2)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jax.nn.gelu(nn.Dense(32)(x))
        return nn.Dense(6)(nn.LayerNorm()(x))


def test_flax_linen():
    x, y = batch()
    model = LinenNet()
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x)["params"],
        tx=ldadamw(1e-2, rank=RANK),
    )

    @jax.jit
    def step(state):
        loss_of = lambda params: squared_error(state.apply_fn({"params": params}, x), y)
        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(STEPS):
        state, loss = step(state)
        losses.append(loss)
    check_trained(losses, state.opt_state, 2)


def test_haiku():
    x, y = batch()

    def forward(x):
        x = jax.nn.gelu(hk.Linear(32)(x))
        return hk.Linear(6)(hk.LayerNorm(-1, True, True)(x))

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), x)
    loss_of = lambda params: squared_error(model.apply(params, x), y)
    losses, state = train(params, loss_of)
    check_trained(losses, state, 2)


def train(params, loss_of):
    tx = ldadamw(1e-2, rank=RANK)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(loss)
    return losses, state


def test_equinox():
    """Equinox marks what is not trained by None."""
    x, y = batch()
    model = eqx.nn.MLP(12, 6, 32, depth=1, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_of(arrays):
        model = eqx.combine(arrays, static)
        return squared_error(jax.vmap(model)(x), y)

    losses, state = train(arrays, loss_of)
    check_trained(losses, state, 2)


# Dimension numbers read off Flax's own names


def views(specs) -> dict[str, tuple | None]:
    """(reduction, output) by path, axes as tuples counted from the front."""
    is_spec = lambda node: node is None or hasattr(node, "reduction_axis")
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    named = lambda path: "/".join(
        str(getattr(k, "key", getattr(k, "name", k)))
        for k in path
        if getattr(k, "name", None) != "value"
    )
    tuple_of = lambda axes: tuple(np.atleast_1d(axes).tolist())
    return {
        named(path): spec
        and (tuple_of(spec.reduction_axis), tuple_of(spec.output_axis))
        for path, spec in leaves
    }


class Block(nn.Module):
    """One of each: attention (DenseGeneral kernels), Dense, LayerNorm, Conv."""

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.Dense(12, name="mlp")(nn.LayerNorm(name="norm")(x))
        return nn.Dense(8, name="back")(x), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, 8, name="embed")(tokens)
        x = nn.Conv(8, kernel_size=(3,), name="conv")(x)
        stacked = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stacked(name="layers")(x, None)
        return nn.Dense(20, name="head")(x)


BLOCK_VIEWS = {
    "attention/query/kernel": ((0,), (1, 2)),
    "attention/query/bias": None,
    "attention/out/kernel": ((0, 1), (2,)),
    "mlp/kernel": ((0,), (1,)),
    "mlp/bias": None,
    "norm/scale": None,
}


def shift(view):
    return view and tuple(tuple(axis + 1 for axis in axes) for axes in view)


def test_linen_dimension_numbers():
    tokens = jnp.zeros((1, 5), jnp.int32)
    params = jax.eval_shape(LinenModel().init, jax.random.key(0), tokens)["params"]
    found = views(flax_dimension_numbers(params, scan_axes={"layers": 0}))
    for path, view in BLOCK_VIEWS.items():
        assert found[f"layers/{path}"] == shift(view), path
    assert found["embed/embedding"] is None
    reduction, output = found["conv/kernel"]
    assert output == (2,)
    assert reduction in {(0, 1), (1,)}  # taps merged with the inputs, or batched
    # Every leaf has its entry, and the optimizer takes the tree as it is.
    tx = ldadamw(
        1e-2,
        rank=2,
        weight_dimension_numbers=flax_dimension_numbers(
            params, scan_axes={"layers": 0}
        ),
    )
    mu = ldadam_state(jax.eval_shape(tx.init, params)).mu
    assert mu["layers"]["mlp"]["kernel"].shape == (3, 2, 12)
    assert mu["layers"]["attention"]["query"]["kernel"].shape[:2] == (3, 2)


def test_linen_dimension_numbers_of_an_unscanned_block():
    x = jnp.zeros((1, 5, 8))
    params = jax.eval_shape(Block().init, jax.random.key(0), x)["params"]
    found = views(flax_dimension_numbers(params))
    assert found.items() >= BLOCK_VIEWS.items()


def test_dimension_numbers_given_as_a_callable():
    x = jnp.zeros((1, 5, 8))
    params = Block().init(jax.random.key(0), x)["params"]
    tx = ldadamw(1e-2, rank=2, weight_dimension_numbers=flax_dimension_numbers)
    state = ldadam_state(tx.init(params))
    assert len(jax.tree.leaves(state.mu)) == 6


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.mlp = nnx.Linear(8, 12, rngs=rngs)
        self.embed = nnx.Embed(20, 8, rngs=rngs)


def test_nnx_dimension_numbers():
    params = nnx.state(NNXBlock(nnx.Rngs(0)), nnx.Param)
    found = views(flax_dimension_numbers(nnx.to_pure_dict(params)))
    for path, view in BLOCK_VIEWS.items():
        assert found[path] == view, path
    assert found["embed/embedding"] is None


def test_nnx_scanned_block_with_its_boxes():
    """`nnx.Optimizer` hands over Variables; the stack axis is named."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return NNXBlock(nnx.Rngs(key))

    class Model(nnx.Module):
        def __init__(self):
            self.layers = stack(jax.random.split(jax.random.key(0), 3))

    model = Model()
    specs = lambda params: flax_dimension_numbers(params, scan_axes={"layers": 0})
    tx = ldadamw(1e-2, rank=2, weight_dimension_numbers=specs)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    before = np.asarray(model.layers.mlp.kernel[...])
    optimizer.update(model, grads)
    assert model.layers.mlp.kernel.shape == (3, 8, 12)
    assert np.abs(model.layers.mlp.kernel[...] - before).max() > 1e-3
    sizes = {
        x.shape[:-1] for x in jax.tree.leaves(ldadam_state(optimizer.opt_state).mu)
    }
    assert sizes == {(3, 2)}


def test_equinox_model_as_the_tree_of_specs():
    """An Equinox module is callable; its copy full of specs is still a tree."""
    model = eqx.nn.MLP(12, 6, 32, depth=1, key=jax.random.key(0))
    arrays = eqx.filter(model, eqx.is_inexact_array)
    as_matrix = lambda p: LDAdamDimensionNumbers() if p.ndim == 2 else None
    specs = jax.tree.map(as_matrix, arrays)
    tx = ldadamw(1e-2, rank=RANK, weight_dimension_numbers=specs)
    assert len(jax.tree.leaves(ldadam_state(tx.init(arrays)).mu)) == 2
