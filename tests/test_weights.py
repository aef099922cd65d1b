"""bfloat16 weights rounded stochastically."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_like

from ldadam_optax import ldadamw, round_weights_stochastically


def rounded(params, update, count):
    tx = round_weights_stochastically()
    state = tx.init(params)._replace(count=jnp.asarray(count, jnp.int32))
    return tx.update(update, state, params)


def test_right_on_average_over_steps_and_positions():
    """Updates of a tenth of a step of bfloat16, up and down, from weights of each."""
    weights = jnp.tile(jnp.array([1.0, -3.0, 0.02, 1e-3], jnp.bfloat16), 2_000)
    spacing = jnp.tile(jnp.array([2.0**-7, 2.0**-6, 2.0**-13, 2.0**-17]), 2_000)
    update = 0.1 * spacing
    step = jax.jit(lambda count: rounded(weights, update, count)[0])
    moves = np.stack([np.asarray(step(t)) for t in range(8)]) / np.asarray(spacing)
    assert set(np.round(np.unique(moves), 6)) == {0.0, 1.0}
    by_weight = moves.reshape(-1, 4).mean(axis=0)  # 16,000 draws of mean 0.1
    np.testing.assert_allclose(by_weight, 0.1, atol=5 * 0.3 / 16_000**0.5)
    assert np.abs(np.corrcoef(moves[0], moves[1])[0, 1]) < 0.05


def test_weight_plus_update_is_a_bfloat16_and_one_of_the_two_next_ones():
    params = {"w": random_like(jnp.zeros((40, 50), jnp.bfloat16), 0)}
    update = {"w": 0.01 * random_like(jnp.zeros((40, 50)), 1)}
    updates, state = rounded(params, update, 3)
    assert updates["w"].dtype == jnp.float32
    assert int(state.count) == 4
    wanted = params["w"].astype(jnp.float32) + update["w"]
    exact = params["w"].astype(jnp.float32) + updates["w"]
    applied = optax.apply_updates(params, updates)["w"]
    assert applied.dtype == jnp.bfloat16
    np.testing.assert_array_equal(applied.astype(jnp.float32), exact)
    assert np.all(np.abs(exact - wanted) < 2.0**-7 * np.abs(wanted))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_weights_of_other_dtypes_are_left_alone(dtype):
    params = {"w": jnp.ones((4, 6), dtype), "b": jnp.ones(6, jnp.bfloat16)}
    update = {"w": jnp.full((4, 6), 1e-3, dtype), "b": jnp.full(6, 1e-3)}
    updates, _ = rounded(params, update, 0)
    assert updates["w"] is update["w"]
    assert set(np.unique(updates["b"])) <= {0.0, 2.0**-7}


def test_needs_the_parameters():
    tx = round_weights_stochastically()
    with pytest.raises(ValueError, match="pass params"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


def test_updates_that_are_not_finite_show():
    params = jnp.ones(3, jnp.bfloat16)
    updates, _ = rounded(params, jnp.array([jnp.nan, jnp.inf, 1.0]), 0)
    np.testing.assert_array_equal(np.isfinite(updates), [False, False, True])


def test_ldadamw_with_bfloat16_weights_goes_on_bit_for_bit():
    """Six steps at once, and three, a copy of the state, and three."""
    params = {"w": jnp.ones((8, 12), jnp.bfloat16), "b": jnp.ones(12, jnp.bfloat16)}
    tx = ldadamw(1e-3, rank=2, stochastic_rounding=True)

    @jax.jit
    def step(params, state, seed):
        draw = lambda p: jax.random.normal(jax.random.key(seed), p.shape)
        updates, state = tx.update(jax.tree.map(draw, params), state, params)
        return optax.apply_updates(params, updates), state

    def run(params, state, seeds):
        for seed in seeds:
            params, state = step(params, state, seed)
        return params, state

    whole = run(params, tx.init(params), range(6))
    half = jax.tree.map(np.array, run(params, tx.init(params), range(3)))
    chex.assert_trees_all_equal(run(*half, range(3, 6)), whole)
    chex.assert_type(list(whole[0].values()), jnp.bfloat16)
    assert (np.asarray(whole[0]["w"], np.float32) != 1).mean() > 0.2
