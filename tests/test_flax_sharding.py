"""Names that Flax writes on parameters, permuted for each field of the state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ldadam_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples import sharded_linen, sharded_nnx
from ldadam_optax import LDAdamDimensionNumbers, scale_by_ldadam

# Flax broadcasts biases freely.
pytestmark = pytest.mark.usefixtures("any_rank_promotion")

STEPS = 4
# Of the kernels (16, 64) on ("fsdp", "tensor") and (64, 16) on ("tensor", "fsdp").
COMPRESSED = {"mu": P(None, ("tensor", "fsdp")), "projector": P("fsdp")}
UP = COMPRESSED | {"error": P("fsdp", "tensor")}
DOWN = COMPRESSED | {"error": P("tensor", "fsdp")}


def one_device():
    axis_types = sharded_nnx.make_mesh().axis_types
    return jax.make_mesh(
        (1, 1), ("fsdp", "tensor"), axis_types, devices=jax.devices()[:1]
    )


def check(mesh, state, kernels, expected):
    for field, spec in expected.items():
        for array in jax.tree.leaves(kernels(getattr(state, field))):
            assert array.sharding.is_equivalent_to(
                NamedSharding(mesh, spec), array.ndim
            ), (field, array.sharding.spec)


@pytest.mark.parametrize("options", [{}, {"error_dtype": "int8"}])
def test_sharded_nnx_model(options):
    """The loss of one device; every array where the rule table puts it."""
    mesh = sharded_nnx.make_mesh()
    losses, optimizer = sharded_nnx.train(mesh, STEPS, **options)
    inner = optimizer.opt_state[0].inner_states["ldadam"].inner_state
    check(mesh, inner, lambda tree: tree["up"], UP)
    check(mesh, inner, lambda tree: tree["down"], DOWN)
    if not options:
        alone, _ = sharded_nnx.train(one_device(), STEPS)
        np.testing.assert_allclose(losses, alone, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"error_dtype": "int8"}])
def test_sharded_linen_train_state(options):
    """The loss of one device; every array where the rule table puts it."""
    mesh = sharded_linen.make_mesh()
    losses, state = sharded_linen.train(mesh, STEPS, **options)
    inner = ldadam_state(state.opt_state)
    check(mesh, inner, lambda tree: tree["Dense_0"], UP)
    check(mesh, inner, lambda tree: tree["Dense_1"], DOWN)
    if not options:
        alone, _ = sharded_linen.train(one_device(), STEPS)
        np.testing.assert_allclose(losses, alone, rtol=1e-4)


def test_names_of_a_stack():
    """Logical names too: the rules that resolve them are Flax's."""
    box = nn.LogicallyPartitioned(
        jnp.ones((8, 3, 16)), names=("embed", "layers", "mlp")
    )
    numbers = LDAdamDimensionNumbers(0, 2)
    tx = scale_by_ldadam(2, weight_dimension_numbers=numbers, error_dtype="int8")
    state = tx.init({"w": box})
    names = {field: getattr(state, field)["w"].names for field in state._fields[1:-1]}
    assert names == {
        "mu": ("layers", None, "mlp"),
        "nu": ("layers", None, "mlp"),
        "projector": ("layers", "embed", None),
        "error": ("embed", "layers", "mlp"),
        "error_scale": ("embed", "layers", "mlp"),
    }
    updates, state = tx.update({"w": box}, state)
    assert updates["w"].names == box.names
    assert state.mu["w"].names == names["mu"]


def test_names_that_do_not_divide_are_dropped_where_the_mesh_is_known():
    """Sixteen columns are one block of codes: its scale cannot be split in two."""
    box = nn.Partitioned(
        jnp.ones((8, 16)), ("a", "b"), jax.make_mesh((2, 2), ("a", "b"))
    )
    state = scale_by_ldadam(2, error_dtype="int8").init(box)
    assert state.error.names == ("a", "b")
    assert state.error_scale.names == ("a", None)


def test_mesh_of_the_boxed_array():
    """As Tunix keeps its parameters: placed on a mesh that nobody names."""
    mesh = sharded_nnx.make_mesh()
    up = NamedSharding(mesh, P("fsdp", "tensor"))
    with nnx.use_eager_sharding(False):
        array = jax.device_put(jnp.ones((16, 64)), up)
        params = {"up": nnx.Param(array, out_sharding=("fsdp", "tensor"))}
        params["odd"] = nnx.Param(array[:, :20], out_sharding=("fsdp", "tensor"))
    state = scale_by_ldadam(4).init(params)
    names = lambda tree: tuple(tree.get_metadata("out_sharding"))
    assert names(state.mu["up"]) == (None, ("tensor", "fsdp"))
    assert names(state.projector["up"]) == ("fsdp", None)
    assert names(state.mu["odd"]) == (None, "tensor"), "20 is no multiple of 8"


def test_mesh_of_the_legacy_context():
    """Linen's abstract ``init`` within ``with mesh:``, which sets no abstract mesh."""
    init = nn.with_partitioning(nn.initializers.ones, ("fsdp", "tensor"))
    net = nn.Dense(64, kernel_init=init)
    tx = scale_by_ldadam(4)
    abstract = lambda: jax.eval_shape(
        lambda key: tx.init(net.init(key, jnp.ones((1, 16)))["params"]["kernel"]),
        jax.random.key(0),
    )
    assert abstract().mu.names == (None, "tensor"), "no mesh: names may be logical"
    with (
        pytest.warns(DeprecationWarning, match="with mesh"),
        sharded_nnx.make_mesh(),
    ):
        assert abstract().mu.names == (None, ("tensor", "fsdp"))


@pytest.mark.parametrize("given", [("embed", "mlp"), ("embed", "layers", "mlp")])
def test_names_of_a_scanned_stack_as_maxtext_keeps_them(given):
    """Plain tuples of logical names come back as such, with the stack axis's name."""
    with nnx.use_eager_sharding(False):
        kernel = nnx.Param(
            jnp.ones((16, 3, 64)),
            out_sharding=given,
            partition_name="layers",
            param_scan_axis=1,
        )
    tx = scale_by_ldadam(4, weight_dimension_numbers=LDAdamDimensionNumbers(0, 2))
    state = tx.init({"w": kernel})
    read = lambda field: getattr(state, field)["w"].get_metadata()
    for field, names, axis in (
        ("mu", ("layers", None, "mlp"), 0),
        ("projector", ("layers", "embed", None), 0),
        ("error", ("embed", "layers", "mlp"), 1),
    ):
        assert type(read(field)["out_sharding"]) is tuple
        assert read(field)["out_sharding"] == names
        assert read(field)["param_scan_axis"] == axis
    assert kernel.get_metadata("out_sharding") == given


@pytest.mark.parametrize("kind", [tuple, lambda names: P(*names)])
def test_names_keep_their_type(kind):
    """MaxText takes the names in a PartitionSpec for axes of the mesh."""
    with nnx.use_eager_sharding(False):
        named = nnx.Param(jnp.ones((4, 6)), out_sharding=kind(("a", "b")))
    found = scale_by_ldadam(2).init([named]).mu[0].get_metadata("out_sharding")
    assert type(found) is type(kind(("a", "b")))
    assert found == kind((None, "b"))


def test_parameters_keep_their_own_names():
    """The state's variables are copies; unnamed ones stay as they are."""
    with nnx.use_eager_sharding(False):
        named = nnx.Param(jnp.ones((4, 6)), out_sharding=("a", "b"))
        plain = nnx.Param(jnp.ones((4, 6)))
    state = scale_by_ldadam(2).init({"named": named, "plain": plain})
    assert tuple(state.mu["named"].get_metadata("out_sharding")) == (None, "b")
    assert "out_sharding" not in state.mu["plain"].get_metadata()
    assert named.get_metadata("out_sharding") == ("a", "b")
