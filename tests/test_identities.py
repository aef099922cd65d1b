"""Identities of the mathematics, one a test, each stated in its docstring.

Notation of the paper: g gradient, e error, a = g + e' corrected gradient,
U basis, M = U mu full-size momentum, c = b1 / (1 - b1); a prime marks the value
of the step before.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_trees_close,
    distance_from_orthonormal,
    last,
    ldadam_state,
    run,
    with_spectrum,
)
from layouts import LAYOUTS

from ldadam_optax import LDAdamDimensionNumbers, ldadam_error, scale_by_ldadam

B1, SHAPE, RANK = 0.8, (6, 10), 3
C = B1 / (1 - B1)


@dataclasses.dataclass
class Step:
    """What one step read and wrote, in float64."""

    g: np.ndarray
    e_before: np.ndarray
    e: np.ndarray
    basis_before: np.ndarray
    basis: np.ndarray
    mu_before: np.ndarray
    mu: np.ndarray

    @property
    def a(self):
        return self.g + self.e_before

    @property
    def momentum_before(self):
        return self.basis_before @ self.mu_before

    @property
    def momentum(self):
        return self.basis @ self.mu

    @property
    def w(self):
        return self.a + C * self.momentum_before


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    """Six steps of the library in float64 on a wide matrix."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        tx = scale_by_ldadam(RANK, b1=B1)
        state, taken = tx.init(jnp.zeros(SHAPE, jnp.float64)), []
        update = jax.jit(tx.update)
        for _ in range(6):
            g = rng.normal(size=SHAPE)
            _, new = update(jnp.asarray(g), state)
            errors = ldadam_error(state), ldadam_error(new)
            bases = state.projector, new.projector
            values = map(np.asarray, (*errors, *bases, state.mu, new.mu))
            taken.append(Step(g, *values))
            state = new
    return taken


def close(actual, expected, atol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_error_from_the_full_size_momentum(steps):
    """(i) e = a - (M - b1 M') / (1 - b1)."""
    for s in steps:
        close(s.e, s.a - (s.momentum - B1 * s.momentum_before) / (1 - B1))


def test_everything_from_w(steps):
    """(ii) mu = (1 - b1) U^T w, e = (I - U U^T) w, ghat = (mu - b1 mhat)/(1 - b1)."""
    for s in steps:
        projection = s.basis.T @ s.w
        close(s.mu, (1 - B1) * projection)
        close(s.e, s.w - s.basis @ projection)
        mhat = s.basis.T @ s.momentum_before
        close(s.basis.T @ s.a, (s.mu - B1 * mhat) / (1 - B1))


def test_error_is_orthogonal_to_its_basis(steps):
    """(iii) U^T e = 0, hence U'^T a = U'^T g."""
    for s in steps:
        close(s.basis.T @ s.e, 0)
        close(s.basis_before.T @ s.a, s.basis_before.T @ s.g)


def test_w_obeys_its_recurrence(steps):
    """(iv) w_t = w_{t-1} + g_t - M_{t-1}."""
    for before, now in itertools.pairwise(steps):
        close(now.w, before.w + now.g - now.momentum_before)


def test_lifting_and_projecting_is_idempotent(steps):
    """U U^T U U^T = U U^T, and the identities above saw a moving basis."""
    for s in steps:
        projector = s.basis @ s.basis.T
        close(projector @ projector, projector)
        assert np.abs(s.basis.T @ s.basis_before).max() < 0.999


@pytest.mark.parametrize("subspace", ["power_iteration", "svd", "randomized_svd"])
@pytest.mark.parametrize("subspace_init", ["randomized", "svd"])
def test_basis_is_orthonormal(subspace, subspace_init, x64):
    """U^T U = I before the first step and after each."""
    tx = scale_by_ldadam(RANK, subspace=subspace, subspace_init=subspace_init)
    rng = np.random.default_rng(0)
    params = jnp.zeros(SHAPE, jnp.float64)
    assert distance_from_orthonormal(tx.init(params).projector) < 1e-12
    gradients = [jnp.asarray(rng.normal(size=SHAPE)) for _ in range(4)]
    for _, state in run(tx, params, gradients):
        assert distance_from_orthonormal(state.projector) < 1e-12


@pytest.mark.parametrize("subspace", ["svd", "randomized_svd"])
def test_decompositions_find_the_leading_subspace(subspace, x64):
    """A gradient of rank r is caught whole: e = 0 from the first step."""
    rng = np.random.default_rng(0)
    g = jnp.asarray(with_spectrum(rng, 8, 14, [5.0, 1.0, 0.1]))
    tx = scale_by_ldadam(3, subspace=subspace)
    for _, state in run(tx, jnp.zeros((8, 14), jnp.float64), [g] * 3):
        close(ldadam_error(state), 0, atol=1e-10)


@pytest.mark.parametrize("rank", [6, 16])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 6)])
def test_full_rank_leaves_no_error(shape, rank, x64):
    """r = m: U U^T = I, so e = 0; a larger rank is clipped to m."""
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(rng.normal(size=shape)) for _ in range(5)]
    tx = scale_by_ldadam(rank)
    for _, state in run(tx, jnp.zeros(shape, jnp.float64), gradients):
        close(ldadam_error(state), 0, atol=1e-12)
    assert state.projector.shape == (6, 6)


def mean_momentum(gradient, *, residual, steps=600):
    """(1/T) sum of M_t under a constant gradient, at rank one."""
    tx = scale_by_ldadam(1, residual=residual)

    def body(carry, _):
        state, total = carry
        _, state = tx.update(gradient, state)
        return (state, total + state.projector @ state.mu), None

    start = (tx.init(gradient), jnp.zeros_like(gradient))
    (_, total), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=steps))(start)
    return total / steps


def test_constant_gradient_is_applied_with_error_feedback_alone(x64):
    """Rank 1, gradient of rank 3: mean of M is g with e, its best rank-1 without.

    Summing (i), sum_t M_t = T g - e_T - M_T b1/(1 - b1): all of g is applied
    over time exactly if the error stays bounded.
    """
    rng = np.random.default_rng(0)
    gradient = jnp.asarray(with_spectrum(rng, 6, 10, [3.0, 2.0, 1.0]))
    norm = jnp.linalg.norm(gradient)
    lost = lambda mean: float(jnp.linalg.norm(gradient - mean) / norm)

    assert lost(mean_momentum(gradient, residual="error_feedback")) < 0.08
    without = lost(mean_momentum(gradient, residual="none"))
    best_of_rank_one = np.sqrt((2**2 + 1**2) / (3**2 + 2**2 + 1**2))
    np.testing.assert_allclose(without, best_of_rank_one, atol=0.02)


@pytest.mark.parametrize("subspace_init", ["svd", "randomized"])
def test_moments_are_adams_where_the_basis_stays(subspace_init, x64):
    """Q = I keeps nu: rows of disjoint support make U the unit vectors for good.

    Their Gram matrix is diagonal, so each row is an eigenvector at every step,
    and LDAdam must be Adam, row for row. A random start reaches that basis only
    in the limit of separated rows, hence the spread and the looser tolerance.
    """
    rng = np.random.default_rng(0)
    support = np.kron(np.eye(3), np.ones((1, 4)))  # (3, 12)
    sizes = np.array([[1.0], [1e-2], [1e-4]])
    exact = subspace_init == "svd"
    if not exact:  # rank one: a single row, and any start turns to it at once
        support, sizes = support[:1], sizes[:1]
    rank = len(support)
    rows = np.zeros((5, 12))

    def gradient():
        rows[:rank] = sizes * support * (1 + 0.5 * rng.random(size=(rank, 12)))
        return jnp.asarray(rows)

    gradients = [gradient() for _ in range(5)]
    params = jnp.zeros((5, 12), jnp.float64)
    ours = run(scale_by_ldadam(rank, subspace_init=subspace_init), params, gradients)
    adam = run(optax.scale_by_adam(b1=0.908, b2=0.99, eps=1e-8), params, gradients)
    for (params_ours, state), (params_adam, adam_state) in zip(ours, adam, strict=True):
        nu = np.abs(np.asarray(state.projector)) @ np.asarray(state.nu)
        np.testing.assert_allclose(nu, adam_state.nu, rtol=1e-9, atol=1e-16)
        close(state.projector @ state.mu, adam_state.mu)
        close(params_ours, params_adam, atol=1e-9)


@pytest.mark.parametrize(
    ("side", "other", "subspace_init"),
    [
        ("short", "short", "randomized"),
        ("left", "right", "randomized"),
        ("long", "long", "randomized"),
        ("short", "short", "svd"),
    ],
)
def test_both_orientations_agree(side, other, subspace_init, x64):
    """The transposed problem gives the transposed result."""
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(rng.normal(size=(5, 9))) for _ in range(4)]
    options = {"rank": 2, "subspace_init": subspace_init}
    zeros = jnp.zeros((5, 9), jnp.float64)
    params, state = last(run(scale_by_ldadam(**options, side=side), zeros, gradients))
    transposed = [g.T for g in gradients]
    tx = scale_by_ldadam(**options, side=other)
    params_t, state_t = last(run(tx, zeros.T, transposed))
    close(params_t.T, params)
    close(ldadam_error(state_t, side=other).T, ldadam_error(state, side=side))
    assert_trees_close(state_t.mu, state.mu, atol=1e-12)


def test_swapped_dimension_numbers_are_a_transposition(x64):
    """Naming the axes the other way round equals ``side`` the other way round."""
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(rng.normal(size=(5, 9))) for _ in range(3)]
    zeros = jnp.zeros((5, 9), jnp.float64)
    swapped = scale_by_ldadam(
        2, side="left", weight_dimension_numbers=LDAdamDimensionNumbers(1, 0)
    )
    plain = scale_by_ldadam(2, side="right")
    close(
        last(run(swapped, zeros, gradients))[0], last(run(plain, zeros, gradients))[0]
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_batch_gives_what_a_loop_gives(name, x64):
    """Batch axes anywhere: each matrix as if it were alone."""
    layout = LAYOUTS[name]
    rng = np.random.default_rng(0)
    stacked = [rng.normal(size=layout.shape) for _ in range(3)]
    spread = [split(layout, g) for g in stacked]
    spec = layout.spec

    batched = scale_by_ldadam(
        2, weight_dimension_numbers=spec, subspace_init="svd", side="short"
    )
    alone = scale_by_ldadam(2, subspace_init="svd", side="short")
    zeros = jnp.zeros(layout.shape, jnp.float64)
    one_by_one = {k: jnp.zeros_like(v) for k, v in spread[0].items()}

    params, state = last(run(batched, zeros, [jnp.asarray(g) for g in stacked]))
    params_each, state_each = last(run(alone, one_by_one, spread))

    assert_trees_close(split(layout, params), params_each, rtol=0, atol=1e-11)
    errors = ldadam_error(state, weight_dimension_numbers=spec)
    assert errors.shape == layout.shape
    assert_trees_close(
        split(layout, errors), ldadam_error(state_each), rtol=0, atol=1e-11
    )
    assert state.mu.shape[:-2] == layout.batch
    for field in ("mu", "nu", "projector"):
        batch_first = getattr(state, field).reshape(
            -1, *getattr(state, field).shape[-2:]
        )
        each = jnp.stack(list(getattr(state_each, field).values()))
        close(np.abs(batch_first), np.abs(each), atol=1e-11)


def split(layout, leaf) -> dict[str, jax.Array]:
    matrices = layout.matrices(np.asarray(leaf))
    return {f"{i:02d}": jnp.asarray(matrix) for i, matrix in enumerate(matrices)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"error_dtype": "int8"},
        {"error_dtype": "int4", "side": "right"},
        {"residual": "recovery"},
        {"subspace": "randomized_svd"},
        {"mu_dtype": "bfloat16", "error_dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_matrices_in_turn_give_what_all_at_once_give(options, dtype, monkeypatch):
    """A stack of large matrices is looped over: the same numbers, random bits too."""
    spec = LDAdamDimensionNumbers(1, 2)
    params = jnp.zeros((3, 32, 48))
    grads = [jax.random.normal(jax.random.key(i), params.shape, dtype) for i in (0, 1)]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    results = []
    for large in (1, 10**9):
        monkeypatch.setattr("ldadam_optax._schedule._LARGE_MATRIX", large)
        tx = scale_by_ldadam(
            4,
            weight_dimension_numbers=spec,
            factorizations="in_turn",
            **options,
        )
        update, state = jax.jit(tx.update), tx.init(params)
        for grad in grads:
            updates, state = update(grad, state, params)
        results.append((updates, state))
        text = str(jax.make_jaxpr(tx.update)(grads[0], state, params))
        assert ("dynamic_update_slice" in text) == (large == 1)
    in_turn, at_once = results
    for a, b in zip(jax.tree.leaves(in_turn), jax.tree.leaves(at_once), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == jnp.int8:  # a rounding may fall the other way
            assert np.mean(np.asarray(a) != np.asarray(b)) < 2e-3
        else:
            exact = 1e-5 if jax.default_backend() == "cpu" else 1e-4  # seen: 5e-5
            rounded = 2e-2 if options else exact
            close(a.astype(jnp.float32), b.astype(jnp.float32), atol=rounded)


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_start_is_orthonormal_in_every_matrix(name):
    """U^T U = I in `init` already, for each matrix of the batch."""
    layout = LAYOUTS[name]
    tx = scale_by_ldadam(2, weight_dimension_numbers=layout.spec)
    projector = tx.init(jnp.zeros(layout.shape)).projector
    assert projector.shape[:-2] == layout.batch
    assert distance_from_orthonormal(projector) < 1e-5


def test_error_of_a_partitioned_optimizer_is_read_too(x64):
    """`ldadam_error` passes what is not compressed by."""
    params = {"w": jnp.zeros((6, 10)), "b": jnp.zeros(10)}
    grads = jax.tree.map(jnp.ones_like, params)
    labels = {"w": "matrix", "b": "vector"}
    tx = optax.partition(
        {"matrix": scale_by_ldadam(2), "vector": optax.scale_by_adam()}, labels
    )
    _, state = last(run(tx, params, [grads]))
    errors = ldadam_error(ldadam_state(state))
    assert errors["w"].shape == (6, 10)
    assert not jax.tree.leaves(errors["b"])
