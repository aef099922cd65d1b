"""Dimension numbers read off what Flax's layers really make, Linen and NNX."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx, traverse_util
from flax.core import freeze
from helpers import ldadam_state

from ldadam_optax import (
    LDAdamDimensionNumbers,
    einsum_dimension_numbers,
    flax_dimension_numbers,
    ldadamw,
)

# Flax broadcasts biases freely.
pytestmark = pytest.mark.usefixtures("any_rank_promotion")

BOXED = nn.with_partitioning(nn.initializers.ones, ("a", "b", "c"))
LOGICAL = nn.with_logical_partitioning(nn.initializers.ones, ("a", "b"))

# One line for each kernel: path, reduction axes, output axes.
ATTENTION = {
    "attention/query/kernel": (0, (1, 2)),
    "attention/key/kernel": (0, (1, 2)),
    "attention/value/kernel": (0, (1, 2)),
    "attention/out/kernel": ((0, 1), 2),
}


def found(params, **options) -> dict[str, tuple]:
    """(reduction, output) of each leaf that has a spec, by path without boxes."""
    specs = flax_dimension_numbers(params, **options)
    is_spec = lambda x: isinstance(x, LDAdamDimensionNumbers)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {
        name(path).removesuffix("/value"): tuple(spec[:2])
        for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec)
    }


def linen_params(module, *shapes):
    inputs = [jnp.zeros(shape) for shape in shapes]
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def nnx_params(make):
    return nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)


class LinenZoo(nn.Module):
    @nn.compact
    def __call__(self, x):
        attend = nn.MultiHeadDotProductAttention
        x = attend(2, normalize_qk=True, name="attention")(x)
        x = attend(2, use_bias=False, name="bare")(x)
        x = nn.LayerNorm(name="norm")(nn.Dense(8, name="dense")(x))
        x = nn.DenseGeneral((4, 3), name="split")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="merge")(x)
        x = nn.Conv(8, (3,), name="conv1")(x)
        x = nn.Conv(8, (3,), use_bias=False, name="conv1_bare")(x)
        x = nn.ConvTranspose(8, (3,), name="transposed")(x)
        x = nn.ConvLocal(8, (3,), name="local")(x)
        x = nn.Conv(8, (3, 3), name="conv2")(x[:, :, None])
        x = nn.Conv(8, (3, 3, 3), name="conv3")(x[..., None, :])[:, :, 0, 0]
        x = nn.DenseGeneral(5, batch_dims=(0,), axis=2, name="batched")(x)
        x = nn.Einsum((5, 4, 3), "abc,cde->abde", name="einsum")(x)
        x = nn.WeightNorm(nn.Dense(8))(x.reshape(*x.shape[:2], -1))
        return nn.RNN(nn.OptimizedLSTMCell(6), name="rnn")(x)


def test_linen_layers():
    params = linen_params(LinenZoo(), (1, 5, 8))
    specs = found(params)
    recurrent = {path: specs.pop(path) for path in list(specs) if "Cell" in path}
    assert specs == ATTENTION | {
        "bare/query/kernel": (0, (1, 2)),
        "bare/key/kernel": (0, (1, 2)),
        "bare/value/kernel": (0, (1, 2)),
        "bare/out/kernel": ((0, 1), 2),
        "dense/kernel": (0, 1),
        "split/kernel": (0, (1, 2)),
        "merge/kernel": ((0, 1), 2),
        "conv1/kernel": ((0, 1), 2),
        "conv1_bare/kernel": ((0, 1), 2),
        "transposed/kernel": ((0, 1), 2),
        "local/kernel": (1, 2),  # one matrix for each position
        "conv2/kernel": ((0, 1, 2), 3),
        "conv3/kernel": ((0, 1, 2, 3), 4),
        "batched/kernel": (1, 2),
        "einsum/kernel": (0, (1, 2)),
        "Dense_0/kernel": (0, 1),
    }
    assert len(recurrent) == 8
    assert set(recurrent.values()) == {(0, 1)}


class NNXZoo(nnx.Module):
    def __init__(self, rngs):
        attend = functools.partial(nnx.MultiHeadAttention, 2, 8, decode=False)
        self.attention = attend(normalize_qk=True, rngs=rngs)
        self.bare = attend(use_bias=False, rngs=rngs)
        self.dense = nnx.Linear(8, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.split = nnx.LinearGeneral(8, (4, 3), rngs=rngs)
        self.merge = nnx.LinearGeneral((4, 3), 8, axis=(-2, -1), rngs=rngs)
        self.batched = nnx.LinearGeneral(4, (3, 5), batch_axis={0: 7}, rngs=rngs)
        self.conv1 = nnx.Conv(8, 6, (3,), rngs=rngs)
        self.conv2 = nnx.Conv(8, 6, (3, 3), use_bias=False, rngs=rngs)
        self.conv3 = nnx.ConvTranspose(8, 6, (3, 3, 3), rngs=rngs)
        self.einsum = nnx.Einsum("abc,cde->abde", (8, 4, 3), (4, 3), rngs=rngs)
        self.lora = nnx.LoRALinear(8, 6, lora_rank=2, rngs=rngs)
        self.embed = nnx.Embed(20, 8, rngs=rngs)
        self.cell = nnx.GRUCell(4, 6, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, use_bias=False, rngs=rngs)])
        self.slope = nnx.PReLU()


NNX_SPECS = ATTENTION | {
    "bare/query/kernel": (0, (1, 2)),
    "bare/key/kernel": (0, (1, 2)),
    "bare/value/kernel": (0, (1, 2)),
    "bare/out/kernel": ((0, 1), 2),
    "dense/kernel": (0, 1),
    "split/kernel": (0, (1, 2)),
    "merge/kernel": ((0, 1), 2),
    "batched/kernel": (1, (2, 3)),
    "conv1/kernel": ((0, 1), 2),
    "conv2/kernel": ((0, 1, 2), 3),
    "conv3/kernel": ((0, 1, 2, 3), 4),
    "einsum/kernel": (0, (1, 2)),
    "lora/kernel": (0, 1),
    "cell/dense_h/kernel": (0, 1),
    "cell/dense_i/kernel": (0, 1),
    "blocks/0/kernel": (0, 1),
}


def test_nnx_layers():
    """The same with Variables as boxes and as a pure dict."""
    params = nnx_params(NNXZoo)
    assert found(params) == NNX_SPECS
    assert found(nnx.to_pure_dict(params)) == NNX_SPECS


# Stacks


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(8, use_bias=False, name="mlp")(nn.LayerNorm()(x)), None


class Stack(nn.Module):
    axis: int
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x, _=None):
        scanned = nn.scan(
            self.block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return scanned(name="layers")(x, None)


@pytest.mark.parametrize(
    ("axis", "query", "out", "mlp"),
    [
        (0, (1, (2, 3)), ((1, 2), 3), (1, 2)),
        (1, (0, (2, 3)), ((0, 2), 3), (0, 2)),
        (-1, (0, (1, 2)), ((0, 1), 2), (0, 1)),
    ],
)
def test_linen_scan(axis, query, out, mlp):
    """The stack axis is a batch axis: of the kernels, and of the biases that tell."""
    params = linen_params(Stack(axis), (1, 5, 8))
    specs = found(params, scan_axes={"layers": axis})
    assert specs == {
        "layers/attention/query/kernel": query,
        "layers/attention/key/kernel": query,
        "layers/attention/value/kernel": query,
        "layers/attention/out/kernel": out,
        "layers/mlp/kernel": mlp,
    }


def test_nested_stacks_are_taken_off_from_the_outside():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                functools.partial(Stack, 1),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return scanned(name="groups")(x, None)[0]

    params = linen_params(Outer(), (1, 5, 8))
    assert params["groups"]["layers"]["mlp"]["kernel"].shape == (2, 8, 3, 8)
    specs = found(params, scan_axes={"groups": 0, "layers": 1})
    assert specs["groups/layers/mlp/kernel"] == (1, 3)
    assert specs["groups/layers/attention/query/kernel"] == (1, (3, 4))


def test_nnx_vmap():
    @nnx.vmap(in_axes=0, out_axes=1)
    def stack(key):
        return nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(key))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = stack(jax.random.split(jax.random.key(0), 3))
            self.head = nnx.Linear(8, 20, rngs=rngs)

    params = nnx_params(Model)
    assert found(params, scan_axes={"layers": 1}) == {
        "layers/query/kernel": (0, (2, 3)),
        "layers/key/kernel": (0, (2, 3)),
        "layers/value/kernel": (0, (2, 3)),
        "layers/out/kernel": ((0, 2), 3),
        "head/kernel": (0, 1),
    }


def test_stack_axis_that_is_not_there():
    params = {"layers": {"kernel": jnp.zeros((3, 4, 5))}}
    with pytest.raises(
        ValueError, match=r"'layers/kernel' has shape \(3, 4, 5\).*axis 3"
    ):
        flax_dimension_numbers(params, scan_axes={"layers": 3})


EINSUM = {  # As Tunix and gemma have them.
    "embedder/input_embedding": ((50, 8), None),
    "layers/0/attn/q_einsum/w": ((2, 8, 4), (1, (0, 2))),
    "layers/0/attn/kv_einsum/w": ((2, 1, 8, 4), (2, (1, 3))),
    "layers/0/attn/qkv_einsum/w": ((3, 2, 8, 4), (2, (1, 3))),
    "layers/0/attn/attn_vec_einsum/w": ((2, 4, 8), ((0, 1), 2)),
    "layers/0/attn/q_proj/w": ((8, 2, 4), (0, (1, 2))),
    "layers/0/attn/k_proj/w": ((8, 1, 4), (0, (1, 2))),
    "layers/0/attn/o_proj/w": ((2, 4, 8), ((0, 1), 2)),
    "layers/0/attn/q_norm/w": ((4,), None),
    "layers/0/mlp/gate_proj/kernel": ((8, 16), (0, 1)),
    "per_layer_projection/w": ((4, 8), (0, 1)),
    "experts/w": ((3, 4, 8), None),
    "stack/o_proj/w": ((5, 2, 4, 8), ((1, 2), 3)),
    "lm_head/w": ((8, 50), None),
    "lm_head/kernel": ((8, 50), None),
}


def test_einsum_weights():
    params = {name: jnp.zeros(shape) for name, (shape, _) in EINSUM.items()}
    params = traverse_util.unflatten_dict(params, sep="/")
    specs = einsum_dimension_numbers(params, scan_axes={"stack": 0})
    specs = traverse_util.flatten_dict(specs, sep="/")
    axes = {name: spec and tuple(spec[:2]) for name, spec in specs.items()}
    assert axes == {name: spec for name, (_, spec) in EINSUM.items()}


# Trees and use


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        attend = nn.MultiHeadDotProductAttention
        x = attend(2, kernel_init=BOXED, name="attention")(x)
        return nn.Dense(8, kernel_init=LOGICAL, name="dense")(x)


def test_boxes_and_frozen_dicts():
    params = linen_params(Boxed(), (1, 5, 8))
    assert isinstance(params["dense"]["kernel"], nn.LogicallyPartitioned)
    expected = ATTENTION | {"dense/kernel": (0, 1)}
    assert found(params) == found(freeze(params)) == expected
    specs = flax_dimension_numbers(freeze(params))
    is_none = lambda x: x is None or isinstance(x, LDAdamDimensionNumbers)
    assert jax.tree.structure(specs, is_leaf=is_none) == jax.tree.structure(
        freeze(params)
    )


@pytest.mark.parametrize("params", [{}, None, jnp.zeros((3, 4))], ids=repr)
def test_nothing_to_name(params):
    assert flax_dimension_numbers(params) is None or not found(params)


def shapes_of_mu(params, dimension_numbers):
    tx = ldadamw(1e-2, rank=2, weight_dimension_numbers=dimension_numbers)
    state = ldadam_state(jax.eval_shape(tx.init, params))
    return [leaf.shape for leaf in jax.tree.leaves(state.mu)]


def test_the_optimizer_takes_it_as_a_callable():
    assert len(shapes_of_mu(nnx_params(NNXZoo), flax_dimension_numbers)) == len(
        NNX_SPECS
    )
    boxed = linen_params(Boxed(), (1, 5, 8))
    assert len(shapes_of_mu(boxed, flax_dimension_numbers)) == 5
    stacked = linen_params(Stack(0), (1, 5, 8))
    named = functools.partial(flax_dimension_numbers, scan_axes={"layers": 0})
    assert {shape[:2] for shape in shapes_of_mu(stacked, named)} == {(3, 2)}
