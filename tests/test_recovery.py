"""Recovery scaling against its definition, written with NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldadam_optax import LDAdamDimensionNumbers, scale_by_ldadam

B1, B2, EPS, RANK = 0.9, 0.99, 1e-8, 3


def optimizer(rank=RANK, **options):
    return scale_by_ldadam(
        rank,
        b1=B1,
        b2=B2,
        eps=EPS,
        residual="recovery",
        **options,
    )


def by_definition(grad_mn, basis_mr, mu_rn, nu_rn, step, prev_norm):
    """``U d + f (g - U ghat)``, the norm of the second part, and what it would be."""
    mean = mu_rn / (1 - B1**step)
    square_rn = nu_rn / (1 - B2**step)
    direction_rn = mean / (np.sqrt(square_rn) + EPS)
    residual_mn = grad_mn - basis_mr @ (basis_mr.T @ grad_mn)
    squares = np.mean(square_rn, axis=0), np.mean(residual_mn**2, axis=0)
    residual_mn /= np.sqrt(np.maximum(*squares)) + EPS
    wanted = norm = np.linalg.norm(residual_mn)
    if prev_norm > 0:
        norm = min(wanted, 1.01 * prev_norm)
    return basis_mr @ direction_rn + residual_mn * (norm / wanted), norm, wanted


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_each_step_is_the_definition(shape, x64):
    """Gradients that grow and shrink, so that the limit holds at times, not always."""
    rng = np.random.default_rng(0)
    tx = optimizer()
    state, update = tx.init(jnp.zeros(shape, jnp.float64)), jax.jit(tx.update)
    limited = []
    for step in range(1, 9):
        grad = rng.normal(size=shape) * (1 + step % 3) ** 2
        before = float(state.residual_norm)
        updates, state = update(jnp.asarray(grad), state)
        wide = grad if shape[0] <= shape[1] else grad.T
        fields = map(np.asarray, (state.projector, state.mu, state.nu))
        expected, norm, wanted = by_definition(wide, *fields, step, before)
        actual = np.asarray(updates if shape[0] <= shape[1] else updates.T)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.residual_norm, norm, rtol=1e-9)
        limited.append(norm < wanted)
    assert set(limited) == {True, False}


def test_full_rank_leaves_nothing_to_recover(x64):
    grad = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)))
    plain = scale_by_ldadam(4, b1=B1, b2=B2, eps=EPS, residual="none")
    both = [tx.update(grad, tx.init(grad)) for tx in (optimizer(4), plain)]
    np.testing.assert_allclose(both[0][0], both[1][0], atol=1e-6)
    assert float(both[0][1].residual_norm) < 1e-6


def test_no_column_moves_farther_than_by_the_first_step_of_adam():
    """Rows and columns that were zero: the basis and ``nu`` know nothing of them."""
    rng = np.random.default_rng(0)
    known = jnp.zeros((6, 9)).at[:3, :4].set(rng.normal(size=(3, 4)))
    unknown = jnp.zeros((6, 9)).at[3:, 4:].set(1e3 * rng.normal(size=(3, 5)))
    tx = optimizer()
    state = tx.init(known)
    for grad in (known, known, unknown):
        state = state._replace(residual_norm=jnp.zeros([]))  # nothing to limit by
        updates, state = tx.update(grad, state)
    np.testing.assert_allclose(state.residual_norm, (6 * 5) ** 0.5, rtol=1e-5)
    assert np.abs(updates).max() < 2 * 6**0.5


def test_a_zero_gradient_recovers_nothing():
    zero = jnp.zeros((6, 9))
    tx = optimizer()
    updates, state = tx.update(zero, tx.init(zero))
    assert not np.any(updates)
    assert float(state.residual_norm) == 0
    grad = jax.random.normal(jax.random.key(0), zero.shape)
    updates, state = tx.update(grad, state)  # no norm to be limited by yet
    assert float(state.residual_norm) > 0.1


def test_each_matrix_of_a_batch_has_its_own_norm():
    numbers = LDAdamDimensionNumbers(1, 2)
    grad = jax.random.normal(jax.random.key(0), (2, 6, 9)).at[0].multiply(1e-3)
    tx = optimizer(weight_dimension_numbers=numbers)
    _, state = tx.update(grad, tx.init(grad))
    assert state.residual_norm.shape == (2,)
    # Adam's direction does not depend on the size of the gradient, nor does this.
    np.testing.assert_allclose(*np.asarray(state.residual_norm), rtol=0.5)
