"""A run saved at step k and restored goes on bit for bit."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import assert_trees_bitwise_equal, ldadam_state, random_like

from ldadam_optax import LDAdamDimensionNumbers, ldadamw

OPTIMIZERS = {
    "default": {},
    "bfloat16": {"error_dtype": "bfloat16", "mu_dtype": "bfloat16"},
    "no_error_feedback": {"residual": "none"},
    "stacked": {
        "weight_dimension_numbers": {
            "w": LDAdamDimensionNumbers(),
            "stack": LDAdamDimensionNumbers(1, 2),
            "b": None,
            "nothing": None,
        }
    },
}
WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
}


def optimizer(name):
    if name in WRAPPED:
        return WRAPPED[name](ldadamw(1e-2, rank=2))
    return ldadamw(1e-2, rank=2, weight_decay=0.1, **OPTIMIZERS[name])


def start(tx):
    shapes = {"w": (6, 9), "stack": (2, 5, 8), "b": (9,), "nothing": None}
    is_shape = lambda node: isinstance(node, tuple)
    params = random_like(jax.tree.map(jnp.zeros, shapes, is_leaf=is_shape), seed=100)
    return params, tx.init(params)


def jitted_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def advance(step, carry, steps):
    for t in steps:
        carry = step(*carry, random_like(carry[0], seed=t))
    return carry


def through_orbax(carry, abstract, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "step", carry)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "step", abstract)


def through_flax(carry, abstract, folder):
    (folder / "state").write_bytes(flax.serialization.to_bytes(carry))
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    return flax.serialization.from_bytes(empty, (folder / "state").read_bytes())


@pytest.mark.parametrize("route", [through_orbax, through_flax])
@pytest.mark.parametrize("name", [*OPTIMIZERS, *WRAPPED])
def test_restored_run_equals_the_run_that_never_stopped(name, route, tmp_path):
    tx = optimizer(name)
    step = jitted_step(tx)
    never_stopped = advance(step, start(tx), range(6))

    saved = advance(step, start(tx), range(3))
    abstract = jax.eval_shape(lambda: start(tx))
    restored = route(saved, abstract, tmp_path)
    assert_trees_bitwise_equal(restored, saved)
    assert_trees_bitwise_equal(advance(step, restored, range(3, 6)), never_stopped)


def test_a_state_that_started_anew_would_be_noticed():
    """The comparison above can fail: without the state the runs part."""
    tx = optimizer("default")
    step = jitted_step(tx)
    params, _ = advance(step, start(tx), range(3))
    never_stopped, state = advance(step, start(tx), range(6))
    restarted, _ = advance(step, (params, tx.init(params)), range(3, 6))
    assert np.abs(restarted["w"] - never_stopped["w"]).max() > 1e-4
    assert int(ldadam_state(state).count) == 6
