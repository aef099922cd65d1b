"""The normalized residual against its definition, written with NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldadam_optax import LDAdamDimensionNumbers, scale_by_ldadam

B1, B2, EPS, RANK = 0.9, 0.99, 1e-12, 3
SIZE = 0.7
# Shape and side, and whether the rows are compressed.
VIEWS = {((6, 9), "short"): True, ((9, 6), "short"): False, ((6, 9), "long"): False}


@functools.cache
def optimizer(**options):
    tx = scale_by_ldadam(RANK, B1, B2, EPS, residual="normalized", **options)
    return tx, jax.jit(tx.update)


def direction_of(state, step):
    """Adam's direction, in the leaf's compressed orientation: ``U d``."""
    mu, nu, basis = map(np.asarray, (state.mu, state.nu, state.projector))
    mean, square = mu / (1 - B1**step), nu / (1 - B2**step)
    return basis @ (mean / (np.sqrt(square) + EPS))


@pytest.mark.parametrize(("shape", "side"), VIEWS, ids=str)
def test_each_step_is_the_definition(shape, side, x64):
    """And its identities: outside of the basis, each column of one size."""
    rng = np.random.default_rng(0)
    tx, update = optimizer(side=side)
    state = tx.init(jnp.zeros(shape))
    turned = (lambda x: x) if VIEWS[shape, side] else np.transpose
    for step in range(1, 6):
        grad = rng.normal(size=shape) * (1 + step % 3) ** 2
        updates, state = update(jnp.asarray(grad), state)
        basis = np.asarray(state.projector)
        g = turned(grad)
        residual = g - basis @ (basis.T @ g)
        sizes = np.sqrt(np.mean(residual**2, axis=0))
        within = direction_of(state, int(state.count))
        expected = within + SIZE * residual / (sizes + EPS)
        actual = turned(np.asarray(updates))
        np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9)
        outside = actual - within
        np.testing.assert_allclose(basis.T @ outside, 0, atol=1e-8)
        of_columns = np.sqrt(np.mean(outside**2, axis=0))
        np.testing.assert_allclose(of_columns, SIZE, rtol=1e-7)
        assert state.residual_norm is None
        assert state.error is None


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_the_size_of_the_gradients_does_not_count(scale, x64):
    rng = np.random.default_rng(0)
    tx, update = optimizer(side="short")
    plain = scaled = tx.init(jnp.zeros((6, 9)))
    # eps is the one thing that has the size of a gradient.
    tiny_eps = scale_by_ldadam(RANK, B1, B2, EPS * scale, residual="normalized")
    update_scaled = jax.jit(tiny_eps.update)
    for _ in range(3):
        grad = jnp.asarray(rng.normal(size=(6, 9)))
        expected, plain = update(grad, plain)
        actual, scaled = update_scaled(scale * grad, scaled)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)


def test_gradients_without_a_residual(x64):
    """Nothing is added where nothing is lost, and a zero gradient moves nothing."""
    rng = np.random.default_rng(0)
    tx, update = optimizer(side="short")
    state = tx.init(jnp.zeros((6, 9)))
    zero, state = update(jnp.zeros((6, 9)), state)
    assert not np.any(zero)
    basis = np.linalg.qr(rng.normal(size=(6, RANK)))[0]
    for _ in range(4):  # of rank 3: the basis holds it after one step
        grad = basis @ rng.normal(size=(RANK, 9))
        grad[:, 4] = 0
        updates, state = update(jnp.asarray(grad), state)
    outside = np.asarray(updates) - direction_of(state, int(state.count))
    assert np.abs(outside).max() < 1e-3
    assert not np.asarray(updates)[:, 4].any()


def test_rounding_of_what_the_basis_holds_is_not_a_residual():
    """In float32 ``|g|^2 - |ghat|^2`` of a held column is noise: no full-size noise."""
    rng = np.random.default_rng(0)
    tx, update = optimizer(side="short")
    state = tx.init(jnp.zeros((6, 9)))
    basis = np.linalg.qr(rng.normal(size=(6, RANK)))[0]
    for _ in range(5):
        grad = jnp.asarray(basis @ rng.normal(size=(RANK, 9)), jnp.float32)
        updates, state = update(grad, state)
    outside = np.asarray(updates) - direction_of(state, int(state.count))
    assert np.abs(outside).max() < 0.01 * SIZE


def test_matrices_of_a_batch_are_independent(x64):
    """Each as if it were alone, whatever the size of its neighbour."""
    rng = np.random.default_rng(0)
    numbers = LDAdamDimensionNumbers(1, 2)
    tx, update = optimizer(side="short", weight_dimension_numbers=numbers)
    alone_tx, alone = optimizer(side="short")
    state = tx.init(jnp.zeros((2, 6, 9)))
    states = [
        alone_tx.init(jnp.zeros((6, 9)))._replace(projector=basis)
        for basis in state.projector
    ]
    for _ in range(3):
        grads = jnp.asarray(rng.normal(size=(2, 6, 9)) * [[[1.0]], [[1e-6]]])
        updates, state = update(grads, state)
        for i in range(2):
            expected, states[i] = alone(grads[i], states[i])
            np.testing.assert_allclose(updates[i], expected, rtol=1e-6, atol=1e-7)
