"""Named arrays like those of haliax, whose axes a mapping resolves; without haliax."""

import dataclasses
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from helpers import ldadam_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ldadam_optax import (
    LDAdamDimensionNumbers,
    haliax_dimension_numbers,
    ldadamw,
    scale_by_ldadam,
)


class Axis(NamedTuple):
    name: str
    size: int


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class WithAxes:
    """As in haliax 1.3: the static part holds names and sizes."""

    array: jax.Array
    axes: tuple[Axis, ...]

    def __post_init__(self):
        sizes = tuple(axis.size for axis in self.axes)
        if hasattr(self.array, "shape") and self.array.shape != sizes:
            raise ValueError(f"array {self.array.shape}, axes {self.axes}")

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        new = object.__new__(cls)
        object.__setattr__(new, "array", children[0])
        object.__setattr__(new, "axes", axes)
        return new

    def has_axis(self, axis):
        return axis in self.axes


@jax.tree_util.register_pytree_node_class
class WithNames:
    """As in marin's haliax: the static part holds names, the array the sizes."""

    def __init__(self, array, axes):
        self.array = array
        self.axis_names = tuple(getattr(axis, "name", axis) for axis in axes)

    @property
    def axes(self):
        return tuple(map(Axis, self.axis_names, self.array.shape))

    def tree_flatten(self):
        return (self.array,), self.axis_names

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(children[0], names)

    def has_axis(self, axis):
        return axis in self.axis_names


SHAPE = {"layers": 2, "embed": 16, "heads": 4, "head_size": 16}
NUMBERS = LDAdamDimensionNumbers(1, (2, 3))


def mesh_of(shape):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def mapping(monkeypatch):
    """What haliax's context maps names to; None where it is not imported."""

    def set_mapping(value):
        module = types.SimpleNamespace(current_thread_local_mapping=lambda: value)
        monkeypatch.setitem(sys.modules, "haliax.partitioning", module)

    return set_mapping


def start(kind=WithNames, **options):
    axes = tuple(Axis(*pair) for pair in SHAPE.items())
    params = {"w": kind(jnp.ones(tuple(SHAPE.values())), axes)}
    tx = scale_by_ldadam(4, weight_dimension_numbers=NUMBERS, **options)
    return tx, params, tx.init(params)


def axes_of(state, field):
    named = getattr(state, field)["w"]
    return tuple((axis.name, axis.size) for axis in named.axes)


@pytest.mark.parametrize("kind", [WithAxes, WithNames])
def test_axes_of_the_state(kind):
    """Batch axes kept, one of its own for the rank, the error the parameter's."""
    tx, params, state = start(kind)
    rank = ("ldadam_rank", 4)
    assert axes_of(state, "mu") == (("layers", 2), rank, ("heads", 64))
    assert axes_of(state, "nu") == axes_of(state, "mu")
    assert axes_of(state, "projector") == (("layers", 2), ("embed", 16), rank)
    assert axes_of(state, "error") == tuple(SHAPE.items())
    updates, state = jax.jit(tx.update)(params, state, params)
    assert updates["w"].axes == params["w"].axes
    assert axes_of(state, "projector") == (("layers", 2), ("embed", 16), rank)
    for field in ("mu", "nu", "projector", "error"):
        named = getattr(state, field)["w"]
        assert named.array.shape == tuple(axis.size for axis in named.axes)


def test_columns_take_the_name_that_splits_them_most(mapping):
    """On an fsdp mesh only the parameter's other side is split."""
    mapping({"embed": "data", "heads": "model", "batch": "data"})
    with jax.set_mesh(mesh_of((8, 1))):
        _, _, state = start()
    assert axes_of(state, "mu")[2] == ("embed", 64)
    with jax.set_mesh(mesh_of((2, 4))):
        _, _, state = start()
    assert axes_of(state, "mu")[2] == ("heads", 64)
    assert axes_of(state, "projector")[1] == ("embed", 16)


def test_a_name_for_both_sides_if_the_mapping_has_one(mapping):
    mapping({"embed": "data", "heads": "model", "state": ("model", "data")})
    with jax.set_mesh(mesh_of((2, 4))):
        _, _, state = start()
    assert axes_of(state, "mu")[2] == ("state", 64)


def test_mesh_of_a_named_array(mapping):
    """Arrays that lie on a mesh tell it."""
    mapping({"embed": "data"})
    sharding = NamedSharding(mesh_of((8, 1)), P("data"))
    array = jax.device_put(jnp.ones((16, 64)), sharding)
    named = WithNames(array, ("embed", "mlp"))
    state = scale_by_ldadam(4).init({"w": named})
    assert axes_of(state, "mu") == (("ldadam_rank", 4), ("embed", 64))


def test_a_name_that_does_not_divide_is_replaced(mapping):
    """Two blocks of codes cannot lie on eight devices."""
    mapping({"heads": "data", "head_size": None, "mlp": "data"})
    named = WithNames(jnp.ones((16, 64)), ("embed", "mlp"))
    with jax.set_mesh(mesh_of((8, 1))):
        state = scale_by_ldadam(4, error_dtype="int8").init({"w": named})
    assert axes_of(state, "error") == (("embed", 16), ("mlp", 64))
    assert axes_of(state, "error_scale") == (("embed", 16), ("ldadam_mlp", 2))


@jax.tree_util.register_pytree_with_keys_class
class Linear:
    """As ``haliax.nn.Linear``: axes of input and output beside the weight."""

    def __init__(self, weight, In, Out, bias=None):
        self.weight, self.bias, self.In, self.Out = weight, bias, In, Out

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return (
            ((key("weight"), self.weight), (key("bias"), self.bias)),
            (self.In, self.Out),
        )

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(children[0], *axes, bias=children[1])


@pytest.mark.parametrize("kind", [WithAxes, WithNames])
def test_linear_layers_tell_their_axes(kind):
    embed, heads, size, layers = (
        Axis(*pair)
        for pair in {"embed": 16, "heads": 4, "head_size": 8, "layers": 2}.items()
    )

    def named(*axes):
        return kind(jnp.ones(tuple(axis.size for axis in axes)), axes)

    model = {
        "q": Linear(
            named(layers, heads, size, embed),
            embed,
            (heads, size),
            named(layers, heads, size),
        ),
        "o": Linear(named(embed, layers, heads, size), (heads, size), embed),
        "lm_head": Linear(named(heads, embed), embed, heads),
        "frozen": Linear(kind(None, ()), embed, heads),
        "scale": named(embed),
    }
    specs = haliax_dimension_numbers(model)
    assert specs["q"].weight.array == LDAdamDimensionNumbers((3,), (1, 2))
    assert specs["q"].bias.array is None
    assert specs["o"].weight.array == LDAdamDimensionNumbers((2, 3), (0,))
    assert specs["lm_head"].weight.array is None
    assert specs["scale"].array is None
    tx = ldadamw(1e-2, rank=2, weight_dimension_numbers=haliax_dimension_numbers)
    mu = ldadam_state(tx.init(model)).mu
    shapes = [leaf.shape for leaf in jax.tree.leaves(mu)]
    assert shapes == [(2, 2, 32), (2, 2, 32)]
