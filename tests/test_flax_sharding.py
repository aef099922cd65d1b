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
    losses, _, optimizer = sharded_nnx.train(mesh, STEPS, **options)
    inner = optimizer.opt_state[0].inner_states["ldadam"].inner_state
    check(mesh, inner, lambda tree: tree["up"], UP)
    check(mesh, inner, lambda tree: tree["down"], DOWN)
    if not options:
        alone, *_ = sharded_nnx.train(one_device(), STEPS)
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
    used = ("mu", "nu", "projector", "error", "error_scale")
    names = {field: getattr(state, field)["w"].names for field in used}
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


RULES = (("embed", "fsdp"), ("heads", "tensor"), ("mlp", "tensor"), ("mlp", "fsdp"))


def resolved_names(how, names, shape, **options):
    """Names of the state of one matrix and what Flax makes of them, field by field."""
    mesh, array = sharded_nnx.make_mesh(), jnp.ones(shape)
    linen, told_by = how.split("_")
    # Of two rules for one name NNX takes the last, Linen the first that is free.
    rules = RULES if linen == "linen" else RULES[:3]
    in_box = rules if told_by == "box" else None
    if told_by == "array":
        spec = nn.logical_to_mesh_axes(names, rules)
        array = jax.device_put(array, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh), nnx.use_eager_sharding(False):
        if linen == "linen":
            box = nn.LogicallyPartitioned(array, names, rules=in_box)
        else:
            local = {"sharding_rules": in_box} if in_box else {}
            box = nnx.Param(array, out_sharding=names, **local)
        with nn.logical_axis_rules(rules if told_by == "context" else ()):
            state = scale_by_ldadam(4, **options).init(box)

    def read(box):
        if linen == "linen":
            return box.names, nn.logical_to_mesh_axes(box.names, rules)
        with nn.logical_axis_rules(() if in_box else rules):
            spec = nnx.get_partition_spec({"": box})[""].get_value()
        return box.get_metadata("out_sharding"), spec

    fields = ("mu", "projector", "error", "error_scale")
    used = [field for field in fields if getattr(state, field) is not None]
    return {field: read(getattr(state, field)) for field in used}


@pytest.mark.parametrize(
    "how", ["linen_box", "linen_context", "nnx_box", "nnx_context", "nnx_array"]
)
def test_logical_names_are_joined_as_axes_of_the_mesh(how):
    """Moments on all eight devices of the matrix, for whoever resolves its names."""
    found = resolved_names(how, ("embed", "mlp"), (16, 64), error_dtype="int8")
    assert found == {
        "mu": ((None, ("tensor", "fsdp")), P(None, ("tensor", "fsdp"))),
        "projector": (("embed", None), P("fsdp", None)),
        "error": (("embed", "mlp"), P("fsdp", "tensor")),
        "error_scale": (("embed", "mlp"), P("fsdp", "tensor")),
    }


def test_logical_names_that_do_not_divide_are_dropped():
    """A scale for each of 32 columns is one scale: no part of it for two devices."""
    found = resolved_names("linen_box", ("embed", "mlp"), (16, 20), error_dtype="int8")
    assert found["mu"][0] == (None, "mlp"), "20 is no multiple of 8"
    assert found["error_scale"][0] == ("embed", None)
    one_rule_less = resolved_names("linen_box", ("embed", "other"), (16, 64))
    assert one_rule_less["mu"][0] == (None, ("fsdp",))


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
