"""b1, b2, rho and eps that change from step to step, against the NumPy reference.

The momentum of a step counts in the error with the b1 of that step, in every storage.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import with_spectrum
from reference import LDAdamMatrix

from ldadam_optax import ldadam_error, ldadamw, scale_by_ldadam

SHAPE, RANK, STEPS = (8, 12), 3, 12
START = {"b1": 0.9, "b2": 0.99, "rho": 0.9, "eps": 1e-8}


def rising(start, end):
    return lambda t: start + (end - start) * t / STEPS


CHANGES = {
    "jump_of_b1": {"b1": lambda t: 0.9 if t < 5 else 0.95},
    "fall_of_b1": {"b1": lambda t: 0.95 if t < 5 else 0.5},
    "b1_to_zero_and_back": {"b1": lambda t: 0.0 if t in (4, 5) else 0.9},
    "b1": {"b1": rising(0.85, 0.95)},
    "b2": {"b2": rising(0.9, 0.999)},
    "rho": {"rho": rising(0.0, 1.0)},
    "eps": {"eps": lambda t: 10.0 ** (t - 10)},
    "all": {
        "b1": rising(0.95, 0.8),
        "b2": rising(0.999, 0.95),
        "rho": rising(1.0, 0.5),
        "eps": rising(1e-3, 1e-8),
    },
}
# Of the error's largest entry, and of the direction's; a wrong c is off by 0.1 to 1.
STORAGES = {
    ("float64", None): (1e-8, 1e-8),
    ("float32", None): (1e-5, 1e-3),
    ("float64", "float32"): (1e-5, 1e-3),
    ("float64", "bfloat16"): (2e-2, 0.1),
    ("float64", "int8"): (8e-2, 0.2),
}


def gradients():
    """Of clear singular values, so that rounding turns no basis."""
    rng = np.random.default_rng(0)
    values = [8.0, 4.0, 2.0, *np.full(5, 0.3)]
    signal = with_spectrum(rng, *SHAPE, values)
    for _ in range(STEPS):
        signal = signal + 0.2 * with_spectrum(rng, *SHAPE, values)
        yield signal


@functools.cache
def injected(error_dtype):
    """One optimizer of a storage and its compiled step, for all changes."""
    tx = optax.inject_hyperparams(scale_by_ldadam, static_args=("rank",))(
        rank=RANK, **START, error_dtype=error_dtype
    )
    return tx, jax.jit(tx.update)


def near(actual, expected, tolerance):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, 0, atol)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("storage", STORAGES, ids=lambda pair: "-".join(map(str, pair)))
def test_values_set_between_steps(storage, change, x64):
    dtype, error_dtype = storage
    of_error, of_direction = STORAGES[storage]
    tx, update = injected(error_dtype)
    state = tx.init(jnp.zeros(SHAPE, dtype))
    start = np.asarray(state.inner_state.projector, np.float64)
    oracle = LDAdamMatrix(SHAPE, RANK, start=start, **START)
    for t, grad in enumerate(gradients()):
        for name, value_at in CHANGES[change].items():
            setattr(oracle, name, value_at(t))
            like = state.hyperparams[name]
            value = jnp.asarray(value_at(t), like.dtype)
            state = state._replace(hyperparams={**state.hyperparams, name: value})
        direction, state = update(jnp.asarray(grad, dtype), state)
        expected = oracle.step(grad)
        near(direction, expected, of_direction)
        error = ldadam_error(state, jnp.zeros(SHAPE, dtype))
        near(error, oracle.error, of_error)
        assert float(state.inner_state.c) == pytest.approx(oracle.c)


def test_schedule_of_b1(x64):
    """Under ``inject_hyperparams``, b1 of the step t is that of the schedule at t."""
    schedule = optax.linear_schedule(0.85, 0.95, STEPS)
    tx = optax.inject_hyperparams(ldadamw, static_args=("rank",))(
        1.0, rank=RANK, b1=schedule, subspace_init="svd", weight_decay=0.0
    )
    params = {"w": jnp.zeros(SHAPE, jnp.float64)}
    state, update = tx.init(params), jax.jit(tx.update)
    oracle = LDAdamMatrix(SHAPE, RANK)
    for t, grad in enumerate(gradients()):
        oracle.b1 = float(schedule(t))
        updates, state = update({"w": jnp.asarray(grad)}, state, params)
        near(-updates["w"], oracle.step(grad), 1e-6)
        near(ldadam_error(state)["w"], oracle.error, 1e-6)
