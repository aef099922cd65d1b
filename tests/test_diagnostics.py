"""Diagnostics: each number against NumPy, its limits, every form of state and tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import gradients_like, params_like, random_like, random_orthonormal
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from layouts import LAYOUTS
from reference import LDAdamMatrix

from ldadam_optax import (
    LDAdamDimensionNumbers,
    LeafDiagnostics,
    accumulate_gradients,
    diagnostics,
    ldadam_error,
    ldadamw,
    scale_by_ldadam,
)

M, N, RANK = 8, 12, 3


def square(x) -> float:
    return float(np.sum(np.asarray(x, np.float64) ** 2))


def plainly(g, a, signal, basis, prev_basis) -> LeafDiagnostics:
    """The definitions, by SVDs and with every product formed, float64."""
    held = np.linalg.svd(basis.T @ a)[1]
    cosines = np.linalg.svd(basis.T @ prev_basis)[1]
    residual = signal - basis @ (basis.T @ signal)
    return LeafDiagnostics(
        share=np.sum(held**2) / square(a),
        turned=1 - np.mean(cosines**2),
        residual=np.sqrt(square(residual) / square(g)),
        orthonormality=np.abs(basis.T @ basis - np.eye(basis.shape[1])).max(),
        effective_rank=np.sum(held**2) ** 2 / np.sum(held**4),
    )


# What runs a few times is not worth the compiler's effort.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def states_of(tx, grads):
    """The states before and after the last gradient."""
    state, update = tx.init(grads[0]), jit(tx.update)
    before = state
    for grad in grads:
        before, state = state, update(grad, state)[1]
    return before, state


def assert_near(found, expected, tolerance=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shape", "residual"),
    [((M, N), "error_feedback"), ((N, M), "error_feedback"), ((N, M), "none")],
    ids=str,
)
def test_numbers_of_a_step_are_those_of_the_paper(shape, residual):
    """Float64 along three steps; the residual is the error that the paper keeps."""
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=shape) for _ in range(3)]
    oracle = LDAdamMatrix(shape, RANK, residual=residual)
    for grad in grads[:-1]:
        oracle.step(grad)
    turn = lambda x: x if oracle.rows else x.T
    prev_basis, prev_mu, error = oracle.basis, oracle.mu, oracle.error
    momentum = oracle.c * (prev_basis @ prev_mu) if residual != "none" else 0.0
    oracle.step(grads[-1])
    g = turn(grads[-1])
    of = functools.partial(plainly, g, g + error, g + error + momentum)

    tx = scale_by_ldadam(RANK, residual=residual, subspace_init="svd")
    before, after = states_of(tx, [jnp.asarray(grad) for grad in grads])
    grad = jnp.asarray(grads[-1])
    [found] = diagnostics(grad, before, after).values()
    assert found.share.dtype == jnp.float64
    assert_near(found, of(oracle.basis, prev_basis), 1e-7)
    if residual == "error_feedback":
        carried = np.sqrt(square(oracle.error) / square(g))
        np.testing.assert_allclose(found.residual, carried, rtol=1e-7)
    [alone] = diagnostics(grad, before).values()
    assert_near(alone, of(prev_basis, prev_basis)._replace(turned=None), 1e-7)


STORAGE = {
    "bfloat16": {"error_dtype": "bfloat16", "projector_dtype": "bfloat16"},
    "int8": {"error_dtype": "int8", "mu_dtype": "int8", "nu_dtype": "int8"},
    "int4": {"error_dtype": "int4", "mu_dtype": "bfloat16"},
    "recovery": {"residual": "recovery", "mu_dtype": "int8"},
}


@pytest.mark.parametrize("name", STORAGE)
def test_every_storage_and_rule_is_read_as_the_step_reads_it(name):
    """By linearity the residual is ``(I - U'U'^T) g`` and what is read of the error."""
    tx = scale_by_ldadam(RANK, **STORAGE[name])
    zeros = jnp.zeros((M, N))
    _, state = states_of(tx, [random_like(zeros, seed) for seed in (1, 2)])
    grad = random_like(zeros, 3)
    [found] = diagnostics(grad, state).values()
    basis = np.asarray(state.projector, np.float64)
    lost = np.asarray(grad) - basis @ (basis.T @ np.asarray(grad))
    if state.error is not None:
        share_read = 0.99 if name == "int4" else 1.0
        lost = lost + share_read * np.asarray(ldadam_error(state, grad))
    expected = np.sqrt(square(lost) / square(grad))
    np.testing.assert_allclose(found.residual, expected, rtol=1e-5)
    assert (found.orthonormality > 1e-4) == (name == "bfloat16")


@pytest.fixture(scope="module")
def fresh():
    """A state without an error buffer, and its basis."""
    state = scale_by_ldadam(RANK, residual="none").init(jnp.zeros((M, N)))
    return state, np.asarray(state.projector, np.float64)


def of_gradient(grad, state) -> LeafDiagnostics:
    [found] = diagnostics(jnp.asarray(grad, jnp.float32), state).values()
    return found


def test_a_gradient_within_the_subspace_and_one_outside(fresh):
    state, basis = fresh
    rng = np.random.default_rng(1)
    rows = random_orthonormal(rng, N, RANK).T
    inside = of_gradient(basis @ (np.array([[3.0], [2.0], [1.0]]) * rows), state)
    assert_near((inside.share, inside.residual), (1.0, 0.0))
    np.testing.assert_allclose(inside.effective_rank, 14**2 / 98, rtol=1e-5)
    even = of_gradient(basis @ rows, state)
    np.testing.assert_allclose(even.effective_rank, RANK, rtol=1e-5)
    one = of_gradient(basis[:, :1] @ rows[:1], state)
    np.testing.assert_allclose(one.effective_rank, 1.0, rtol=1e-5)
    grad = rng.normal(size=(M, N))
    outside = of_gradient(grad - basis @ (basis.T @ grad), state)
    assert_near((outside.share, outside.residual), (0.0, 1.0))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_numbers_do_not_depend_on_the_size_of_the_gradient(fresh, size):
    state, _ = fresh
    grad = np.random.default_rng(2).normal(size=(M, N))
    assert_near(of_gradient(size * grad, state), of_gradient(grad, state))


def test_no_gradient_has_no_ratio(fresh):
    found = of_gradient(np.zeros((M, N)), fresh[0])
    for value in (found.share, found.residual, found.effective_rank):
        assert np.isnan(value)


def test_at_full_rank_nothing_is_lost_and_nothing_turns():
    grads = [random_like(jnp.zeros((M, N)), seed) for seed in range(3)]
    before, after = states_of(scale_by_ldadam(M), grads)
    [found] = diagnostics(grads[-1], before, after).values()
    expected = (1.0, 0.0, 0.0)
    assert_near((found.share, found.turned, found.residual), expected, 1e-5)


def test_turned_is_zero_for_another_basis_of_the_space_and_one_for_a_new_space(fresh):
    state, basis = fresh
    rng = np.random.default_rng(3)
    whole = np.linalg.qr(np.concatenate([basis, rng.normal(size=(M, M - RANK))], 1))[0]
    grad = jnp.ones((M, N))
    for columns, expected in [
        (basis @ random_orthonormal(rng, RANK, RANK), 0.0),
        (whole[:, RANK : 2 * RANK], 1.0),
        (whole[:, RANK - 1 : 2 * RANK - 1], 1 - 1 / RANK),
    ]:
        moved = state._replace(projector=jnp.asarray(columns, jnp.float32))
        [found] = diagnostics(grad, state, moved).values()
        np.testing.assert_allclose(found.turned, expected, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["stack_last_and_output_before_reduction", "layers_of_experts"]
)
def test_each_matrix_of_a_stack_is_measured_as_if_alone(name):
    layout = LAYOUTS[name]
    zeros = jnp.zeros(layout.shape)
    tx = scale_by_ldadam(2, weight_dimension_numbers=layout.spec)
    grads = [random_like(zeros, seed) for seed in (1, 2)]
    before, after = states_of(tx, grads)
    [found] = diagnostics(
        grads[-1], before, after, weight_dimension_numbers=layout.spec
    ).values()

    def alone(state, i):
        flat = lambda x: x.reshape(-1, *x.shape[-2:])[i]
        parts = {k: flat(getattr(state, k)) for k in ("mu", "nu", "projector")}
        return state._replace(**parts, error=layout.matrices(state.error)[i])

    for i, grad in enumerate(layout.matrices(grads[-1])):
        [one] = diagnostics(grad, alone(before, i), alone(after, i)).values()
        at = np.unravel_index(i, layout.batch)
        assert_near(jax.tree.map(lambda x, at=at: x[at], found), one)


def specs_of(params):
    """Kernels with a spec, all else to AdamW."""
    spec = LDAdamDimensionNumbers()
    return jax.tree.map_with_path(
        lambda path, _: spec if path[-1].key == "kernel" else None, params
    )


def test_in_a_chain_with_a_partition_under_jit_beside_leaves_of_adamw():
    params = params_like()
    clip = optax.clip_by_global_norm(1.0)
    inner = ldadamw(1e-2, 2, weight_dimension_numbers=specs_of)
    tx = optax.chain(clip, optax.inject_hyperparams(optax.scale)(1.0), inner)
    state = tx.init(params)
    grads = gradients_like(params)[0]
    clipped, _ = clip.update(grads, clip.init(params))

    @jit
    def diagnose(grads, clipped, state):
        next_state = tx.update(grads, state, params)[1]
        return diagnostics(
            clipped, state, next_state, weight_dimension_numbers=specs_of
        )

    found = diagnose(grads, clipped, state)
    assert list(found) == ["dense/kernel", "out/kernel"]
    matrices = {name: {"kernel": clipped[name]["kernel"]} for name in ("dense", "out")}
    bare = scale_by_ldadam(2)
    before = bare.init(matrices)
    expected = diagnostics(matrices, before, jit(bare.update)(matrices, before)[1])
    assert_near(found, expected)
    # The default finds the same leaves; the paper's error is had beside AdamW's too.
    assert set(diagnostics(clipped, state)) == set(found)
    errors = ldadam_error(state, params, weight_dimension_numbers=specs_of)
    assert errors["dense"]["kernel"].shape == params["dense"]["kernel"].shape


def test_boxes_keep_their_leaves_names():
    params = {"w": nn.Partitioned(jnp.ones((M, N)), names=("a", "b"))}
    state = scale_by_ldadam(2).init(params)
    assert list(diagnostics(params, state)) == ["w"]


def test_sums_with_the_error_buffer_are_told_apart():
    params = {"w": random_like(jnp.zeros((M, N)), 0)}
    tx = scale_by_ldadam(RANK)
    _, state = tx.update(params, tx.init(params))
    loss = lambda params, x: jnp.sum(jnp.tanh(params["w"]) * x)
    batches = jnp.ones((2, M, N))
    _, sums, told = accumulate_gradients(
        jax.value_and_grad(loss), params, state, batches
    )
    grads = jax.grad(loss)(params, batches[0])
    found = diagnostics(sums, state, **told)
    assert_near(found, diagnostics(grads, state))
    with pytest.raises(ValueError, match="contain the error buffer already"):
        diagnostics(sums, state)


def test_on_a_mesh_the_numbers_are_those_of_one_device():
    explicit = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=explicit)
    spec = LDAdamDimensionNumbers(1, 2)
    tx = scale_by_ldadam(RANK, weight_dimension_numbers=spec)
    of = functools.partial(diagnostics, weight_dimension_numbers=spec)
    grads = random_like({"w": jnp.zeros((2, M, N))}, 4)
    state = tx.init(grads)
    expected = of(grads, state, jit(tx.update)(grads, state)[1])
    placed = jax.device_put(
        grads, NamedSharding(mesh, PartitionSpec("model", None, "data"))
    )
    with jax.set_mesh(mesh):
        state = tx.init(placed)
        found = of(placed, state, jit(tx.update)(placed, state)[1])
    assert_near(found, expected)
    assert found["w"].share.sharding.spec == PartitionSpec("model")


def other_leaves(state):
    return {"other": jnp.ones((M, M))}, state, {}


def other_shape(state):
    return {"square": jnp.ones((M, M + 1))}, state, {}


def other_side(state):
    return {"square": jnp.ones((M, M))}, state, {"side": "right"}


def a_cast(state):
    buffer = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.error)
    return {"square": jnp.ones((M, M))}, state._replace(error=buffer), {}


def adamw(state):
    grads = {"square": jnp.ones((M, M))}
    return grads, optax.adamw(1e-3).init(grads), {}


def whole_numbers(state):
    return {"square": jnp.ones((M, M), jnp.int32)}, state, {}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (other_leaves, "The state has 'square', which .* lacks"),
        (other_shape, "of 'square' must have shape"),
        (other_side, "square matrices such as 'square' are compressed"),
        (a_cast, "The error of 'square' is stored as e \\+ c U mu"),
        (adamw, "Need one ScaleByLDAdamState, found 0"),
        (whole_numbers, "'square' has dtype int32"),
    ],
)
def test_a_state_that_does_not_belong_is_refused_by_the_leafs_name(make, told):
    state = scale_by_ldadam(RANK).init({"square": jnp.ones((M, M))})
    grads, state, options = make(state)
    with pytest.raises((TypeError, ValueError), match=told):
        diagnostics(grads, state, **options)


def test_a_next_state_of_other_leaves_is_refused():
    state, other = (scale_by_ldadam(2).init({k: jnp.ones((M, N))}) for k in "ab")
    with pytest.raises(ValueError, match=r"has the leaves \[\"'b'\"\]"):
        diagnostics({"a": jnp.ones((M, N))}, state, other)
