"""Every layout on both kinds of mesh: numbers, types, and what devices send."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ldadam_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.collectives import largest_arrays
from ldadam_optax import (
    LDAdamDimensionNumbers,
    ldadamw,
    memory_report,
    scale_by_ldadam,
    state_specs,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

RANK, STEPS = 4, 3
KINDS = {"explicit": AxisType.Explicit, "automatic": AxisType.Auto}
MATRIX = LDAdamDimensionNumbers()

# Shape, spec, dimension numbers, options. Each matrix is 64 x 128 or 128 x 64, so that
# rank * 128 is less than any device's part of it, and each part of a last axis holds
# whole blocks of 32 codes.
CASES = {
    "rows": ((64, 128), P("x", None), MATRIX, {}),
    "columns": ((64, 128), P(None, "y"), MATRIX, {"error_dtype": "int4"}),
    "both": ((64, 128), P("x", "y"), MATRIX, {"error_dtype": "int8"}),
    "both_on_rows": ((64, 128), P(("x", "y")), MATRIX, {"side": "long"}),
    "tall": ((128, 64), P("y", "x"), MATRIX, {"error_dtype": "bfloat16"}),
    "tall_rows": (
        (128, 64),
        P("y", None),
        MATRIX,
        {"residual": "recovery"},
    ),
    "stack": ((4, 64, 128), P(None, "x", "y"), LDAdamDimensionNumbers(1, 2), {}),
    "stack_sharded": (
        (4, 64, 128),
        P("y", "x", None),
        LDAdamDimensionNumbers(1, 2),
        {"error_dtype": "int4", "side": "right"},
    ),
    "stack_on_axis_1": (
        (64, 4, 128),
        P("x", None, "y"),
        LDAdamDimensionNumbers(0, 2),
        {"residual": "none"},
    ),
    "stack_on_axis_1_sharded": (
        (64, 4, 128),
        P("x", "y", None),
        LDAdamDimensionNumbers(0, 2),
        {"residual": "recovery"},
    ),
    "attention_in": (
        (64, 8, 16),
        P("x", "y", None),
        LDAdamDimensionNumbers(0, (1, 2)),
        {"projector_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    ),
    "attention_in_on_head_dim": (
        (64, 8, 16),
        P("x", None, "y"),
        LDAdamDimensionNumbers(0, (1, 2)),
        {"side": "left"},
    ),
    "attention_out": (
        (8, 16, 64),
        P("y", None, "x"),
        LDAdamDimensionNumbers((0, 1), 2),
        {"error_dtype": "int8", "mu_dtype": "int8", "nu_dtype": "int8"},
    ),
}
# An exact SVD gathers the matrix; a randomized one keeps to panels of r + 8 rows.
DECOMPOSED = {
    f"{subspace}_{layout}": (*CASES[layout][:3], {"subspace": subspace})
    for subspace in ("svd", "randomized_svd")
    for layout in ("both", "stack_sharded")
}


@pytest.fixture(scope="module")
def quick_compilation():
    """Partition as ever; leave out what makes the code within a device fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def optimizer(case, **more):
    *_, numbers, options = (CASES | DECOMPOSED)[case]
    options = {"weight_dimension_numbers": numbers, **options, **more}
    return scale_by_ldadam(RANK, **options)


def gradients(case):
    shape = (CASES | DECOMPOSED)[case][0]
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(STEPS)]


def sharded(case, kind, array):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(KINDS[kind],) * 2)
    return jax.device_put(array, NamedSharding(mesh, (CASES | DECOMPOSED)[case][1]))


@functools.cache
def unsharded(case):
    """Update and state after all steps on one device."""
    tx = optimizer(case)
    params = jnp.ones(gradients(case)[0].shape)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for grad in gradients(case):
        updates, state = update(jnp.asarray(grad), state, params)
    return updates, state


@functools.cache
def start(case, kind):
    params = sharded(case, kind, np.ones_like(gradients(case)[0]))
    return params, optimizer(case).init(params)


@functools.cache
def compiled(case, kind):
    """The step; inside jit, automatic axes are the compiler's choice."""
    params, state = start(case, kind)
    return jax.jit(optimizer(case).update).lower(params, state, params).compile()


def assert_same_types(actual, expected):
    """Equal in ``jax.typeof``, and on the same devices in the same parts."""
    assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(e.sharding, a.ndim)


def assert_close(actual, expected, case):
    """Equal to float32, but for sums that devices add in another order.

    Where the state is rounded, a difference of one unit in the last place can round a
    few entries the other way. All others have the same random bits.
    """
    *_, options = (CASES | DECOMPOSED)[case]
    exact = not any(name.endswith("_dtype") for name in options)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if e.dtype == jnp.int8:
            assert np.mean(np.asarray(a) != np.asarray(e)) < 2e-3
        else:
            a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
            tolerance = 1e-4 if exact else 2e-2
            np.testing.assert_allclose(a, e, atol=tolerance * max(1, abs(e).max()))
            assert np.mean(abs(a - e)) < tolerance / 10


def check_steps(case, kind, update):
    params, first = start(case, kind)
    state = first
    for grad in gradients(case):
        updates, state = update(sharded(case, kind, grad), state, params)
    assert_same_types(state, first)
    assert_same_types(updates, params)
    assert_close((updates, state), unsharded(case), case)


def test_panels_of_leaves_that_lie_alike_are_stacked_on_a_mesh():
    """Two of three leaves of one shape; the third is split another way."""
    specs = {"a": P("x", "y"), "b": P("x", "y"), "c": P("y", None)}
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    rng = np.random.default_rng(0)
    grads = {name: rng.normal(size=(32, 64)).astype(np.float32) for name in specs}
    placed = {
        n: jax.device_put(g, NamedSharding(mesh, specs[n])) for n, g in grads.items()
    }
    tx = scale_by_ldadam(RANK, factorizations="together")
    update = jax.jit(tx.update)
    text = update.lower(placed, tx.init(placed), placed).as_text()
    assert f"tensor<2x{RANK}x32xf32>" in text
    assert f"tensor<3x{RANK}x32xf32>" not in text
    updates, _ = update(placed, tx.init(placed), placed)
    expected, _ = update(grads, tx.init(grads), grads)
    assert_same_types(updates, placed)
    for name in specs:
        np.testing.assert_allclose(updates[name], expected[name], atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES | DECOMPOSED)
def test_jitted_steps_equal_those_of_one_device(case, kind):
    check_steps(case, kind, compiled(case, kind))


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, "automatic") for case in CASES]
    # The path of a jitted step, as the step of a leaf is compiled alone.
    + [(case, "explicit") for case in ("both", "stack_sharded")],
)
def test_eager_steps_equal_those_of_one_device(case, kind):
    check_steps(case, kind, optimizer(case).update)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_no_collective_larger_than_rank_rows(case, kind):
    """At most ``r max(m, n)`` of each matrix that a device holds, and no part of it."""
    bound = check_collectives(case, kind, RANK)
    params, _ = start(case, kind)
    local = math.prod(params.sharding.shard_shape(params.shape))
    assert bound < local, "a gathered part would be too large as well"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [case for case in DECOMPOSED if "randomized" in case])
def test_no_collective_larger_than_the_sketch(case, kind):
    """A randomized SVD sketches with eight columns more than the rank."""
    bound = check_collectives(case, kind, RANK + 8)
    shape = start(case, kind)[0].shape
    assert bound < math.prod(shape)


def check_collectives(case, kind, rows):
    """No collective exceeds ``rows max(m, n)`` of the matrices on a device."""
    _, state = start(case, kind)
    batch = state.mu.sharding.shard_shape(state.mu.shape)[:-2]
    bound = math.prod(batch) * rows * 128
    found = largest_arrays(compiled(case, kind).as_text())
    assert found
    assert not [(name, elements) for name, elements in found if elements > bound]
    return bound


@pytest.mark.parametrize("case", ["stack", "stack_sharded"])
def test_a_stack_of_large_matrices(case, monkeypatch):
    """One matrix after another, but where the stack itself is split over devices."""
    monkeypatch.setattr("ldadam_optax._schedule._LARGE_MATRIX", 1)
    params, state = start(case, "explicit")
    tx = optimizer(case, factorizations="in_turn")
    update = jax.jit(tx.update).lower(params, state, params).compile()
    text = update.as_text()
    in_turn = any("dynamic-update-slice" in line for line in text.splitlines())
    assert in_turn == (case == "stack")
    found = largest_arrays(text)
    assert found
    assert all(elements <= RANK * 128 for _, elements in found), "one matrix at a time"
    check_steps(case, "explicit", update)


@pytest.mark.parametrize("case", CASES)
def test_abstract_init_has_the_types_of_the_state(case):
    params, state = start(case, "explicit")
    abstract = jax.eval_shape(optimizer(case).init, jax.typeof(params))
    assert jax.tree.map(jax.typeof, abstract) == jax.tree.map(jax.typeof, state)


WRAPPERS = {
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(
            scale_by_ldadam(RANK, error_dtype="int8"), {"w": True, "b": False}
        ),
    ),
    "partition": ldadamw(1e-2, RANK, error_dtype="int8"),
    "inject_hyperparams": optax.inject_hyperparams(ldadamw, static_args="rank")(
        learning_rate=1e-2, rank=RANK, error_dtype="int8"
    ),
    "multi_steps": optax.MultiSteps(ldadamw(1e-2, RANK, error_dtype="int8"), 2),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_state_specs_through_wrappers(name):
    """``out_shardings`` puts the state where its specs say, names that fit or none."""
    tx = WRAPPERS[name]
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    params = {"w": jnp.ones((16, 64)), "b": jnp.ones(64)}
    specs = state_specs(tx, params, {"w": P("x", "y"), "b": P("y")}, mesh)
    ours = ldadam_state(specs)
    assert ours.count == P()
    assert ours.mu["w"] == ours.nu["w"] == P(None, ("y", "x"))
    assert ours.projector["w"] == P("x", None)
    assert ours.error["w"] == P("x", "y")
    assert ours.error_scale["w"] == P("x", None), "two blocks on four devices"
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    for array, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
    ):
        assert array.sharding == sharding
    if name == "multi_steps":
        assert state.acc_grads["w"].sharding.spec == P("x", "y")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", [(2, 4), (8, 1)])
def test_state_specs_within_a_mesh(kind, other):
    """State of other optimizers too, whichever mesh the caller works in (jax 0.12)."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(KINDS[kind],) * 2)
    around = jax.make_mesh(other, ("x", "y"), axis_types=(KINDS[kind],) * 2)
    params = {"w": jnp.ones((16, 64)), "embedding": jnp.ones((32, 8))}
    wish = {"w": P("x", "y"), "embedding": P("y", "x")}
    tx, adamw = ldadamw(1e-2, RANK), optax.adamw(1e-2)
    bytes_of = lambda: memory_report(params, RANK, specs=wish, mesh=mesh).total.device
    outside = state_specs(tx, params, wish, mesh), bytes_of()
    with jax.set_mesh(around):
        assert (state_specs(tx, params, wish, mesh), bytes_of()) == outside
        moments = state_specs(adamw, params, wish, mesh)[0]
    assert moments.mu == moments.nu == wish
    rest = outside[0][0].inner_states["adamw"].inner_state
    assert rest.mu["embedding"] == rest.nu["embedding"] == P("y", "x")
    # An eighth of everything but the basis, which lies on two devices, and counts.
    compressed = 4 * (2 * RANK * 64 + 16 * 64 + 2 * 32 * 8) // 8
    counters = 2 * 4 + 4 + 1  # two counts, c and form
    assert outside[1] == compressed + 4 * 16 * RANK // 2 + counters


def test_state_specs_drop_names_that_do_not_divide():
    mesh = jax.sharding.AbstractMesh((2, 4), ("x", "y"))
    params = jax.ShapeDtypeStruct((15, 64), jnp.float32)
    specs = state_specs(scale_by_ldadam(RANK), params, P("x", "y"), mesh)
    assert specs.error == P(None, "y")
    assert specs.projector == P(None, None)


@pytest.mark.parametrize(
    ("shape", "spec", "mu", "projector"),
    [
        ((16, 64), P("x", "y"), P(None, ("y", "x")), P("x", None)),
        ((16, 64), P("x"), P(None, "x"), P("x", None)),
        ((16, 64), P(None, "y"), P(None, "y"), P("y", None)),
        ((16, 64), P(None, ("x", "y")), P(None, ("x", "y")), P(("x", "y"), None)),
        ((16, 20), P("x", "y"), P(None, "y"), P("x", None)),  # 20 is no multiple of 8
        ((16, 22), P("x", None), P(None, "x"), P("x", None)),
        ((16, 20), P(None, ("x", "y")), P(None, "x"), P("x", None)),
        ((18, 20), P(None, "y"), P(None, "y"), P(None, None)),
        ((64, 16), P("y", "x"), P(None, ("y", "x")), P("x", None)),  # columns are m
    ],
)
def test_rule_table(shape, spec, mu, projector):
    """Moments lie on all devices of the matrix, as far as its axes divide."""
    mesh = jax.sharding.AbstractMesh((2, 4), ("x", "y"))
    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    specs = state_specs(scale_by_ldadam(RANK), params, spec, mesh)
    assert (specs.mu, specs.nu, specs.projector) == (mu, mu, projector)


def test_moments_in_8_bits_keep_their_types_on_explicit_axes():
    """On both routes: codes and scales are sharded as the moments are."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    place = lambda spec: NamedSharding(mesh, spec)
    tx = ldadamw(1e-2, RANK, mu_dtype="int8", nu_dtype="int8")
    with jax.set_mesh(mesh):
        params = {
            "w": jax.device_put(jnp.ones((64, 128)), place(P("x", "y"))),
            "embedding": jax.device_put(jnp.ones((64, 256)), place(P("y", "x"))),
        }
        state = tx.init(params)
        _, new_state = jax.jit(tx.update)(params, state, params)
        assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)
    embedding = optax.tree.get_all_with_path(new_state, "mu")[0][1]["embedding"]
    assert embedding.addressable_shards[0].data.size * 8 == embedding.size


def test_step_is_compiled_once():
    """The types of the state do not drift: no second trace."""
    for kind in KINDS:
        params, state = start("both", kind)
        chex.clear_trace_counter()
        once = chex.assert_max_traces(optimizer("both").update, n=1)
        update = jax.jit(once)
        for _ in range(3):
            _, state = update(params, state, params)


def test_report_tells_what_a_device_holds_and_what_was_dropped():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    params, spec = jnp.ones((15, 64)), P("x", "y")
    options = {"rank": RANK, "error_dtype": "int8"}
    report = memory_report(params, specs=spec, mesh=mesh, **options)
    tx = ldadamw(1e-2, **options)
    specs = state_specs(tx, params, spec, mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    held = [array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(state)]
    assert report.total.device == sum(held)
    assert report.rows[0].dropped == (
        "x (parameter, projector, error, error_scale); y (error_scale)"
    )
    assert "not split" in str(report)
    assert "not split" not in str(memory_report(params, **options))
    narrow = memory_report(jnp.ones((16, 20)), specs=spec, mesh=mesh, rank=RANK)
    assert narrow.rows[0].dropped == "x (mu, nu)", (
        "four devices divide 20, eight do not"
    )
    with pytest.raises(ValueError, match="go together"):
        memory_report(params, specs=spec)
