"""Gradients that break optimizers: nothing may turn infinite or lose its basis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_trees_bitwise_equal,
    distance_from_orthonormal,
    ldadam_state,
    with_spectrum,
)

from ldadam_optax import LDAdamDimensionNumbers, ldadamw, scale_by_ldadam
from ldadam_optax._residual import RESIDUALS

SHAPE, RANK, STEPS = (16, 24), 4, 8


def matrix(*values, seed=0):
    """A (16, 24) matrix of these singular values, as large or small as they are."""
    return with_spectrum(np.random.default_rng(seed), *SHAPE, values)


def noise(t):
    return np.random.default_rng(t).normal(size=SHAPE)


GRADIENTS = {
    "zero": lambda t: np.zeros(SHAPE),
    "rank_one": lambda t: matrix(1.0, seed=t),
    "rank_below_r": lambda t: matrix(3.0, 1.0, seed=t),
    "rank_below_r_constant": lambda t: matrix(3.0, 1.0),
    "ill_conditioned": lambda t: matrix(*np.geomspace(1, 1e-10, 16), seed=t),
    "ill_conditioned_constant": lambda t: matrix(*np.geomspace(1, 1e-10, 16)),
    "tiny": lambda t: 1e-22 * noise(t),
    "huge": lambda t: 1e15 * noise(t),
    "constant": lambda t: noise(0),
    "all_ones": lambda t: np.ones(SHAPE),
    "one_row": lambda t: np.eye(16)[:, :1] * noise(t)[:1],
    "one_entry": lambda t: np.eye(16, 24) * (np.arange(16) == 3)[:, None],
    "alternating_scale": lambda t: 10.0 ** (8 * (-1) ** t) * noise(t),
    "alternating_sign": lambda t: (-1) ** t * noise(0),
    "zero_in_between": lambda t: (t % 3 == 0) * noise(t),
    "fading": lambda t: 10.0 ** (-5 * t) * noise(t),
    "growing": lambda t: 10.0 ** (3 * t - 6) * noise(t),
    "equal_singular_values": lambda t: matrix(*np.ones(16), seed=t),
}

OPTIONS = {
    "default": {},
    "no_error_feedback": {"residual": "none"},
    "long_side": {"side": "long"},
    "svd": {"subspace": "svd", "subspace_init": "svd"},
    "randomized_svd": {"subspace": "randomized_svd"},
    "bfloat16_error": {"error_dtype": "bfloat16"},
    "full_rank": {"rank": 16},
    "momentum_alone": {"rho": 1.0},
    "gradient_alone": {"rho": 0.0},
}


@functools.cache
def compiled(option):
    """The optimizer of that option and its step, compiled once for all gradients."""
    tx = scale_by_ldadam(**{"rank": RANK, **OPTIONS[option]})
    return tx, jax.jit(tx.update)


def steps(option, gradient, count=STEPS, shape=SHAPE):
    tx, update = compiled(option)
    state = tx.init(jnp.zeros(shape))
    for t in range(count):
        direction, state = update(jnp.asarray(gradient(t), jnp.float32), state)
        yield direction, state


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_finite_and_orthonormal(option, name):
    for direction, state in steps(option, GRADIENTS[name]):
        for leaf in jax.tree.leaves((direction, state)):
            assert np.isfinite(np.asarray(leaf, np.float64)).all()
        assert distance_from_orthonormal(state.projector) < 1e-4


LONG_RUNS = {
    "equal_columns": lambda noise: jnp.broadcast_to(noise[..., :1], noise.shape),
    "equal_rows": lambda noise: jnp.broadcast_to(noise[..., :1, :], noise.shape),
    "all_equal": lambda noise: jnp.broadcast_to(noise[..., :1, :1], noise.shape),
    "nearly_constant": lambda noise: 1 + 0.01 * noise,
    "one_column": lambda noise: noise.at[..., 1:].set(0),
    "few_units_alive": lambda noise: noise.at[..., 2:, :].set(0).at[..., 3:].set(0),
}


@pytest.mark.parametrize("b1", [0.0, 0.908])
@pytest.mark.parametrize("name", LONG_RUNS)
def test_long_runs_on_poor_gradients(name, b1, key):
    """32 runs of 200 steps: rounding that is rare must not end a run either."""
    spec = LDAdamDimensionNumbers(1, 2)
    tx = scale_by_ldadam(2, b1=b1, weight_dimension_numbers=spec)
    shape = (32, 6, 9)

    def body(state, key):
        _, state = tx.update(LONG_RUNS[name](jax.random.normal(key, shape)), state)
        basis = state.projector
        gram = jnp.matmul(basis.mT, basis, precision="highest")
        return state, jnp.abs(gram - jnp.broadcast_to(jnp.eye(2), gram.shape)).max()

    run = jax.jit(lambda keys: jax.lax.scan(body, tx.init(jnp.zeros(shape)), keys)[1])
    worst = np.asarray(run(jax.random.split(key, 200)))
    assert worst.max() < 1e-4, f"step {int((~(worst < 1e-4)).argmax())}"


TEN_THOUSAND_STEPS = {
    "float32": ("float32", {}),
    "eight_bits": (
        "float32",
        {"mu_dtype": "int8", "nu_dtype": "int8", "error_dtype": "int8"},
    ),
    "bfloat16": (
        "bfloat16",
        {
            "stochastic_rounding": True,
            **dict.fromkeys(("mu_dtype", "nu_dtype", "error_dtype"), "bfloat16"),
        },
    ),
    "bfloat16_basis_recovery": (
        "bfloat16",
        {"residual": "recovery", "projector_dtype": "bfloat16"},
    ),
}


@pytest.mark.parametrize("name", TEN_THOUSAND_STEPS)
def test_nothing_drifts_over_ten_thousand_steps(name, key):
    """Weights that follow a slowly turning target under noise, in one scan."""
    dtype, options = TEN_THOUSAND_STEPS[name]
    tx = ldadamw(
        3e-3, 2, weight_dimension_numbers=LDAdamDimensionNumbers(1, 2), **options
    )
    start, turned = jax.random.normal(key, (2, 2, 6, 9))
    count = 10_000

    def body(carry, t):
        params, state = carry
        angle = 2 * jnp.pi * t / count
        target = jnp.cos(angle) * start + jnp.sin(angle) * turned
        drawn = jax.random.normal(jax.random.fold_in(key, t), params.shape)
        grads = (params - target + 0.3 * drawn).astype(dtype)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        ours = ldadam_state(state)
        basis = ours.projector.astype(jnp.float32)
        gram = jnp.matmul(basis.mT, basis, precision="highest")
        finite = [jnp.isfinite(x).all() for x in jax.tree.leaves((params, ours))]
        distance = jnp.abs(gram - jnp.broadcast_to(jnp.eye(2), gram.shape)).max()
        missed = jnp.sqrt(jnp.mean((params - target) ** 2))
        return (params, state), (distance, jnp.stack(finite).all(), missed)

    params = start.astype(dtype)
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(count))[1])
    distance, finite, missed = map(np.asarray, run((params, tx.init(params))))
    assert finite.all(), f"step {int((~finite).argmax())}"
    rounding = float(jnp.finfo(options.get("projector_dtype", "float32")).eps)
    assert distance.max() < 8 * rounding
    thousands = distance.reshape(10, -1).mean(axis=1)
    assert thousands[-1] < 1.2 * thousands[0]
    assert missed[-1000:].mean() < 0.3 < np.sqrt(np.mean(np.square(start - turned)))


@pytest.mark.parametrize("option", ["default", "svd", "no_error_feedback"])
def test_zero_gradient_moves_nothing_and_keeps_the_basis(option):
    tx, _ = compiled(option)
    start = tx.init(jnp.zeros(SHAPE)).projector
    for direction, state in steps(option, GRADIENTS["zero"]):
        assert not np.asarray(direction).any()
        if option != "svd":  # which may take any basis of a zero matrix
            np.testing.assert_allclose(state.projector, start, atol=1e-6)


@pytest.mark.parametrize("name", ["rank_below_r", "ill_conditioned", "huge", "tiny"])
def test_zero_matrix_of_a_batch_is_left_alone(name):
    """One expert without gradients beside others with hard ones."""
    spec = LDAdamDimensionNumbers(1, 2)
    tx = scale_by_ldadam(RANK, weight_dimension_numbers=spec)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros((2, *SHAPE)))
    start = state.projector
    for t in range(3):
        hard = jnp.asarray(GRADIENTS[name](t), jnp.float32)
        direction, state = update(jnp.stack([hard, jnp.zeros_like(hard)]), state)
    assert not np.asarray(direction[1]).any()
    assert np.isfinite(direction[0]).all()
    np.testing.assert_allclose(state.projector[1], start[1], atol=1e-6)
    assert distance_from_orthonormal(state.projector) < 1e-4


def test_no_direction_is_lost_to_a_poor_gradient():
    """After rank-1 gradients, a rank-4 one is caught as at the start."""
    rich = matrix(4.0, 3.0, 2.0, 1.0, seed=7)
    poor_then_rich = lambda t: matrix(1.0) if t < 5 else rich
    *_, (_, state) = steps("default", poor_then_rich, count=30)
    assert missed(state.projector, rich) < 0.01


def missed(basis, gradient) -> float:
    """Share of the gradient outside the basis: |G - U U^T G| / |G|."""
    basis = np.asarray(basis, np.float64)
    outside = gradient - basis @ (basis.T @ gradient)
    return float(np.linalg.norm(outside) / np.linalg.norm(gradient))


@pytest.mark.parametrize("option", ["default", "no_error_feedback"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_layer_that_gets_gradients_late_starts_properly(option, scale):
    """Five zero gradients, then one of rank r: caught by the first power step."""
    gradient = scale * matrix(4.0, 3.0, 2.0, 1.0)
    late = lambda t: gradient if t >= 5 else np.zeros(SHAPE)
    taken = list(steps(option, late, count=7))
    _, before = taken[4]
    direction, first = taken[5]
    assert missed(before.projector, gradient) > 0.5
    assert missed(first.projector, gradient) < 1e-3
    assert float(jnp.vdot(direction, gradient)) > 0


@pytest.mark.parametrize("option", ["default", "no_error_feedback"])
def test_late_gradient_orthogonal_to_the_basis_starts_properly(option):
    """U' spans rows that get no gradient; B^T U' = 0 exactly at first."""
    tx, update = compiled(option)
    state = tx.init(jnp.zeros(SHAPE))
    state = state._replace(projector=jnp.eye(SHAPE[0], RANK))
    gradient = np.zeros(SHAPE)
    gradient[8:] = with_spectrum(np.random.default_rng(0), 8, 24, [4.0, 3.0, 2.0, 1.0])
    for _ in range(6):
        direction, state = update(jnp.asarray(gradient, jnp.float32), state)
        assert distance_from_orthonormal(state.projector) < 1e-4
    assert missed(state.projector, gradient) < 0.05
    assert float(jnp.vdot(direction, gradient)) > 0


@pytest.mark.parametrize("option", ["default", "no_error_feedback"])
def test_gradient_moves_to_other_rows(option):
    """Rows that train first, then fall silent while others start."""
    first, second = np.zeros(SHAPE), np.zeros(SHAPE)
    first[:8] = with_spectrum(np.random.default_rng(0), 8, 24, [4.0, 3.0, 2.0, 1.0])
    second[8:] = with_spectrum(np.random.default_rng(1), 8, 24, [4.0, 3.0, 2.0, 1.0])
    moving = lambda t: first if t < 20 else second
    *_, (direction, state) = steps(option, moving, count=70)
    assert missed(state.projector, second) < 0.05
    assert float(jnp.vdot(direction, second)) > 0


def test_nan_gradient_shows():
    *_, (direction, _) = steps("default", lambda t: np.full(SHAPE, np.nan), count=1)
    assert np.isnan(direction).any()
    one_bad = np.ones(SHAPE)
    one_bad[3, 5] = np.nan
    *_, (direction, _) = steps("default", lambda t: one_bad, count=1)
    assert np.isnan(direction).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_gradient_shows_in_ldadamw_as_in_adamw(bad):
    params = {"w": jnp.ones((8, 12)), "b": jnp.ones(12)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, bad), params)
    for tx in (ldadamw(1e-2, rank=2), optax.adamw(1e-2)):
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        assert all(np.isnan(u).any() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_apply_if_finite_leaves_the_state_untouched(residual):
    params = {"w": jnp.ones((8, 12)), "b": jnp.ones(12)}
    inner = ldadamw(1e-2, rank=2, residual=residual)
    tx = optax.apply_if_finite(inner, max_consecutive_errors=3)
    update = jax.jit(tx.update)
    good = jax.tree.map(lambda p: 0.1 * p, params)
    bad = {"w": good["w"].at[1, 2].set(jnp.nan), "b": good["b"]}

    _, state = update(good, tx.init(params), params)
    updates, after = update(bad, state, params)
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
    assert_trees_bitwise_equal(after.inner_state, state.inner_state)
    assert int(ldadam_state(after).count) == 1

    updates, _ = update(good, after, params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
