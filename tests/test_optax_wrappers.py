"""ldadamw under optax's wrappers: each gives the run of the bare optimizer."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_trees_close,
    gradients_like,
    last,
    ldadam_state,
    params_like,
    run,
)

from ldadam_optax import LDAdamDimensionNumbers, ldadamw, scale_by_ldadam

SETTINGS = {"rank": 2, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def plain():
    """Parameters of the bare optimizer after each step."""
    params = params_like()
    return [
        p for p, _ in run(ldadamw(1e-2, **SETTINGS), params, gradients_like(params))
    ]


def check_same_run(tx, plain, rtol=1e-5, atol=1e-6):
    params = params_like()
    steps = run(tx, params, gradients_like(params))
    for (actual, _), expected in zip(steps, plain, strict=True):
        assert_trees_close(actual, expected, rtol=rtol, atol=atol)


def test_chain_of_the_parts_is_the_optimizer():
    params = {"w": jnp.ones((6, 9))}
    grads = gradients_like(params)
    parts = optax.chain(
        scale_by_ldadam(2),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    )
    whole = ldadamw(1e-2, rank=2, weight_decay=0.1)
    for (a, _), (b, _) in zip(
        run(parts, params, grads), run(whole, params, grads), strict=True
    ):
        assert_trees_close(a, b, rtol=1e-6)


def test_chain_with_clipping(plain):
    check_same_run(
        optax.chain(optax.clip_by_global_norm(1e6), ldadamw(1e-2, **SETTINGS)), plain
    )


def test_masked():
    params = params_like()
    mask = {"dense": True, "embed": False, "out": True}
    tx = optax.masked(ldadamw(1e-2, **SETTINGS), mask)
    grads = gradients_like(params, 1)
    updates, _ = jax.jit(tx.update)(grads[0], tx.init(params), params)
    assert_trees_close(updates["embed"], grads[0]["embed"])
    assert float(jnp.abs(updates["out"]["kernel"]).max()) < 0.05


@pytest.mark.parametrize("combine", [optax.partition, optax.multi_transform])
def test_partition_and_multi_transform(combine):
    params = params_like()
    groups = {"ours": ldadamw(1e-2, **SETTINGS), "theirs": optax.sgd(0.5)}
    labels = {"dense": "ours", "embed": "theirs", "out": "ours"}
    grads = gradients_like(params)
    stepped, state = last(run(combine(groups, labels), params, grads))
    total = functools.reduce(operator.add, [g["embed"]["embedding"] for g in grads])
    expected = params["embed"]["embedding"] - 0.5 * total
    np.testing.assert_allclose(stepped["embed"]["embedding"], expected, atol=1e-5)
    assert len(jax.tree.leaves(ldadam_state(state).mu)) == 2


def test_tree_of_dimension_numbers_under_masked():
    params = {"w": jnp.ones((8, 12)), "frozen": jnp.ones((8, 12)), "b": jnp.ones(3)}
    specs = {"w": LDAdamDimensionNumbers(), "frozen": None, "b": None}
    inner = ldadamw(1e-2, rank=2, weight_dimension_numbers=specs)
    tx = optax.masked(inner, {"w": True, "frozen": False, "b": True})
    state = tx.init(params)
    assert len(jax.tree.leaves(ldadam_state(state).mu)) == 1
    jax.jit(tx.update)(params, state, params)


def test_inject_hyperparams(plain):
    """Learning rate, b1, b2, rho, eps traced; rank static; all the same result."""
    factory = optax.inject_hyperparams(ldadamw, static_args=("rank",))
    tx = factory(
        1e-2,
        b1=0.908,
        b2=0.99,
        eps=1e-8,
        rho=0.908,
        **SETTINGS,
        residual="error_feedback",
    )
    state = tx.init(params_like())
    assert {"learning_rate", "b1", "b2", "rho", "eps"} <= set(state.hyperparams)
    check_same_run(tx, plain, atol=1e-5)


@pytest.mark.parametrize("name", ["learning_rate", "b1", "rho", "eps"])
def test_injected_hyperparameter_can_be_changed(name):
    """Set in the state between steps, without a second trace."""
    tx = optax.inject_hyperparams(ldadamw, static_args=("rank",))(1e-2, rank=2)
    params = {"w": jnp.ones((6, 9))}
    grads = gradients_like(params, 3)
    traces = []

    @jax.jit
    def step(state, grads):
        traces.append(1)
        return tx.update(grads, state, params)

    state = tx.init(params)
    for g in grads[:2]:
        _, state = step(state, g)
    value = {"learning_rate": 0.5, "b1": 0.1, "rho": 0.1, "eps": 10.0}[name]
    like = state.hyperparams[name]
    changed_state = state._replace(
        hyperparams={**state.hyperparams, name: jnp.asarray(value, like.dtype)}
    )
    same, _ = step(state, grads[2])
    changed, _ = step(changed_state, grads[2])
    assert np.abs(same["w"] - changed["w"]).max() > 1e-5
    assert len(traces) == 1


def test_inject_hyperparams_in_the_bare_transformation():
    tx = optax.inject_hyperparams(scale_by_ldadam, static_args=("rank",))(rank=2)
    params = {"w": jnp.ones((6, 9))}
    _, state = last(run(tx, params, gradients_like(params, 2)))
    assert np.isfinite(ldadam_state(state).mu["w"]).all()


def test_learning_rate_schedule():
    params = {"w": jnp.ones((6, 9))}
    grads = gradients_like(params)
    schedule = optax.linear_schedule(1e-2, 0.0, 2)
    steps = [p["w"] for p, _ in run(ldadamw(schedule, rank=2), params, grads)]
    assert np.abs(steps[1] - steps[0]).max() > 1e-4
    np.testing.assert_array_equal(steps[3], steps[2])


def test_multi_steps():
    """k micro-batches are one step on their mean."""
    params = params_like()
    grads = gradients_like(params)
    tx = optax.MultiSteps(ldadamw(1e-2, **SETTINGS), every_k_schedule=2)
    accumulated, _ = last(run(tx, params, grads))
    mean = lambda a, b: jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    means = [mean(*grads[:2]), mean(*grads[2:])]
    expected, _ = last(run(ldadamw(1e-2, **SETTINGS), params, means))
    assert_trees_close(accumulated, expected, rtol=1e-4, atol=1e-5)


def test_schedule_free():
    params = {"w": jnp.ones((6, 9)), "b": jnp.ones(9)}
    target = {"w": jnp.full((6, 9), 0.5), "b": jnp.zeros(9)}
    tx = optax.contrib.schedule_free(ldadamw(1e-2, rank=2, b1=0.0), 1e-2, b1=0.9)
    loss = lambda p: optax.tree.norm(optax.tree.sub(p, target), squared=True)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    (params, state), _ = jax.lax.scan(body, start, length=1000)
    assert loss(optax.contrib.schedule_free_eval_params(state, params)) < 1e-2


def test_apply_if_finite_passes_good_steps_through(plain):
    check_same_run(optax.apply_if_finite(ldadamw(1e-2, **SETTINGS), 3), plain)


def test_reduce_on_plateau(plain):
    """Chained behind us it scales by one until a plateau comes."""
    tx = optax.chain(ldadamw(1e-2, **SETTINGS), optax.contrib.reduce_on_plateau())
    params = params_like()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t, grads in enumerate(gradients_like(params)):
        updates, state = update(grads, state, params, value=jnp.float32(-t))
        params = optax.apply_updates(params, updates)
    assert_trees_close(params, plain[-1], rtol=1e-5, atol=1e-6)
