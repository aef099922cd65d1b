"""Micro-batches accumulated onto the error: the same step, a buffer less."""

import functools
import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_trees_bitwise_equal,
    assert_trees_close,
    ldadam_state,
    memory_first,
    random_like,
)

from ldadam_optax import (
    LDAdamDimensionNumbers,
    accumulate_gradients,
    error_accumulator,
    ldadam_error,
    ldadamw,
    scale_by_ldadam,
)

K, ROWS, RANK = 4, 3, 2
SPECS = {
    "in": LDAdamDimensionNumbers(),
    "scan": LDAdamDimensionNumbers(0, 2),  # layers on axis 1
    "out": None,
    "bias": None,
}
MEAN = optax.microbatching.AccumulationType.MEAN


def make_params(dtype=jnp.float32):
    shapes = {"in": (6, 9), "scan": (9, 2, 9), "out": (9, 4), "bias": (1, 4)}
    zeros = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
    return random_like(zeros, seed=0)


def loss(params, x):
    x = x @ params["in"]
    for layer in range(2):
        x = jnp.tanh(x @ params["scan"][:, layer])
    return jnp.mean((x @ params["out"] + params["bias"]) ** 2)


loss_and_grads = jax.jit(jax.value_and_grad(loss))


def batches(step):
    return jnp.asarray(
        np.random.default_rng(step).normal(size=(K, ROWS, 6)), jnp.float32
    )


def averaged_first(tx):
    """The plain way: gradients of all micro-batches, their mean, one update."""

    def step(params, state, micro_batches):
        grads = [loss_and_grads(params, batch)[1] for batch in micro_batches]
        mean = jax.tree.map(lambda *gs: sum(gs) / len(gs), *grads)
        updates, state = tx.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    return step


def accumulated(tx, **options):
    def step(params, state, micro_batches):
        _, updates, extra_args = accumulate_gradients(
            loss_and_grads, params, state, micro_batches, **options
        )
        updates, state = tx.update(updates, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


def run(step, tx, steps=3):
    params = make_params()
    state = tx.init(params)
    for number in range(steps):
        params, state = step(params, state, batches(number))
    return params, state


def check_same(tx, **options):
    """Parameters and state agree to rounding; the state's types do not change."""
    params, state = run(accumulated(tx, **options), tx)
    expected_params, expected_state = run(averaged_first(tx), tx)
    assert_trees_close(params, expected_params, rtol=1e-4, atol=1e-5)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, expected_state)
    return state, expected_state


# The same step


@pytest.mark.parametrize("error_dtype", [None, "bfloat16", "int8", "int4"])
def test_equals_averaging_first(error_dtype):
    """For every storage, with batch axes and AdamW leaves."""
    options = {"error_dtype": error_dtype, "weight_decay": 0.1}
    tx = ldadamw(1e-2, RANK, weight_dimension_numbers=SPECS, **options)
    errors = [error_of(state) for state in check_same(tx)]
    assert_trees_close(*errors, rtol=1e-3, atol=1e-4)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in errors[0].values())


def error_of(state):
    names = ["in", "scan"]
    pick = lambda tree: tree and {name: tree[name] for name in names}
    fields = {
        f: pick(tree)
        for f, tree in ldadam_state(state)._asdict().items()
        if f not in ("count", "c", "form")
    }
    return ldadam_error(
        ldadam_state(state)._replace(**fields),
        pick(make_params()),
        weight_dimension_numbers=pick(SPECS),
    )


@pytest.mark.parametrize("residual", ["none", "recovery"])
def test_without_an_error_buffer(residual):
    tx = ldadamw(1e-2, RANK, residual=residual, weight_dimension_numbers=SPECS)
    check_same(tx)


def bare_in_a_partition():
    ours = scale_by_ldadam(RANK, error_dtype="int8")
    groups = {"ours": optax.chain(ours, optax.scale(-1e-2)), "theirs": optax.sgd(1e-2)}
    labels = {name: "ours" if name == "in" else "theirs" for name in SPECS}
    return optax.partition(groups, labels)


WRAPPED = {
    "chain": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        ldadamw, static_args=("rank", "weight_dimension_numbers")
    )(optax.linear_schedule(1e-2, 0.0, 9), rank=RANK, weight_decay=0.1),
    "masked": lambda tx: optax.masked(
        ldadamw(1e-2, RANK), {name: name in ("in", "bias") for name in SPECS}
    ),
    "partition": lambda tx: bare_in_a_partition(),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_extra_arguments_pass_through_wrappers(wrap):
    check_same(wrap(ldadamw(1e-2, RANK, weight_dimension_numbers=SPECS)))


@pytest.mark.parametrize("error_dtype", [None, "int4"])
def test_optax_microbatch(error_dtype):
    """Our accumulator in optax's loop; its micro-batches take every K-th row."""
    tx = ldadamw(1e-2, RANK, error_dtype=error_dtype, weight_dimension_numbers=SPECS)

    def step(params, state, micro_batches):
        value_and_grad = optax.microbatching.microbatch(
            loss_and_grads,
            argnums=1,
            microbatch_size=ROWS,
            accumulator=(MEAN, error_accumulator(params, state, K)),
        )
        batch = micro_batches.swapaxes(0, 1).reshape(K * ROWS, -1)
        _, updates = value_and_grad(params, batch)
        updates, state = tx.update(updates, state, params, error_accumulated=True)
        return optax.apply_updates(params, updates), state

    params, _ = run(step, tx)
    expected, _ = run(averaged_first(tx), tx)
    assert_trees_close(params, expected, rtol=1e-4, atol=1e-5)


def test_one_micro_batch_is_the_plain_step():
    tx = ldadamw(1e-2, RANK, weight_dimension_numbers=SPECS)
    params, state = make_params(), tx.init(make_params())
    actual, _ = accumulated(tx)(params, state, batches(0)[:1])
    expected, _ = averaged_first(tx)(params, state, batches(0)[:1])
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_other_optimizers_accumulate_as_usual():
    tx = optax.adamw(1e-2)
    params = make_params()
    result = accumulate_gradients(loss_and_grads, params, tx.init(params), batches(0))
    assert result.extra_args == {}
    check_same(tx)


def test_float32_sums_of_bfloat16_gradients():
    params = make_params(jnp.bfloat16)
    state = ldadamw(1e-2, RANK, weight_dimension_numbers=SPECS).init(params)
    micro_batches = batches(0).astype(jnp.bfloat16)
    _, updates, _ = accumulate_gradients(loss_and_grads, params, state, micro_batches)
    grads = [loss_and_grads(params, batch)[1] for batch in micro_batches]
    mean = jax.tree.map(lambda *gs: sum(g.astype(jnp.float32) for g in gs) / K, *grads)
    assert_trees_close(updates, mean, rtol=1e-6, atol=1e-6)


def test_float64(x64):
    """``s + g1/4 + ...`` in another order: equal to float64's rounding."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 9)))}
    micro_batches = jnp.asarray(rng.normal(size=(K, 12, 6)))
    tx = ldadamw(1e-2, RANK)
    fn = jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])))
    state = tx.init(params)
    for _ in range(3):
        _, updates, extra_args = accumulate_gradients(fn, params, state, micro_batches)
        actual, _ = tx.update(updates, state, params, **extra_args)
        grads = [fn(params, batch)[1]["w"] for batch in micro_batches]
        expected, state = tx.update({"w": sum(grads) / K}, state, params)
        np.testing.assert_allclose(actual["w"], expected["w"], rtol=1e-9, atol=1e-12)


# Clipping, NaN, values, trees


def test_clipping_the_averaged_gradient_alone():
    tx = optax.chain(
        optax.clip_by_global_norm(0.1),
        ldadamw(1e-2, RANK, weight_dimension_numbers=SPECS),
    )
    check_same(tx, onto_error=False)


@pytest.mark.parametrize("wrap", [lambda tx: tx, optax.apply_if_finite])
def test_clipping_gradient_and_error_together_is_refused(wrap):
    """A clip in front would clip the error, which no step may lose."""
    ours = ldadamw(1e-2, RANK, weight_dimension_numbers=SPECS)
    tx = optax.chain(optax.clip_by_global_norm(0.1), ours)
    tx = wrap(tx) if wrap is not optax.apply_if_finite else wrap(tx, 3)
    params = make_params()
    with pytest.raises(ValueError, match=r"number 2 of its optax.chain.*onto_error"):
        accumulate_gradients(loss_and_grads, params, tx.init(params), batches(0))


def test_an_update_that_is_not_told_of_the_sum_is_refused():
    tx = ldadamw(1e-2, RANK, weight_dimension_numbers=SPECS)

    def step(params, state):
        _, updates, _ = accumulate_gradients(loss_and_grads, params, state, batches(0))
        return tx.update(updates, state, params)

    params = make_params()
    for run_step in (step, jax.jit(step)):
        with pytest.raises(ValueError, match="would add it once more"):
            run_step(params, tx.init(params))


def test_apply_if_finite_saves_the_run():
    """A NaN in one micro-batch leaves parameters and state, the error too, alone."""
    tx = optax.apply_if_finite(ldadamw(1e-2, RANK, weight_dimension_numbers=SPECS), 3)
    step = accumulated(tx)
    params, state = run(step, tx, steps=2)
    keep = functools.partial(jax.tree.map, np.array)
    before = keep((params, state.inner_state))
    poisoned = batches(2).at[1, 0, 0].set(jnp.nan)
    params, state = step(params, state, poisoned)
    assert int(state.notfinite_count) == 1
    assert_trees_bitwise_equal(keep((params, state.inner_state)), before)


def test_values_are_stacked():
    fn = jax.value_and_grad(lambda p, x: (loss(p, x), {"rows": len(x)}), has_aux=True)
    params, state = make_params(), ldadamw(1e-2, RANK).init(make_params())
    (losses, aux), _, _ = accumulate_gradients(fn, params, state, batches(0))
    expected = [loss(params, batch) for batch in batches(0)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_array_equal(aux["rows"], [ROWS] * K)


def test_boxed_parameters_and_trees_of_batches():
    params = {"w": nn.Partitioned(jnp.ones((6, 9)), names=("a", None)), "none": None}
    fn = jax.value_and_grad(lambda p, b: jnp.sum((b["x"] @ p["w"].value) ** 2) / b["n"])
    tx = ldadamw(1e-2, RANK)
    state = tx.init(params)
    micro_batches = {"x": batches(0), "n": jnp.full(K, 3.0)}
    for _ in range(2):
        _, updates, extra_args = accumulate_gradients(fn, params, state, micro_batches)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        updates, state = tx.update(updates, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    assert isinstance(params["w"], nn.Partitioned)


@pytest.mark.parametrize("error_dtype", [None, "int8"])
def test_on_a_mesh_with_explicit_axes(error_dtype):
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    spec = jax.sharding.PartitionSpec("data", "model")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    tx = ldadamw(1e-2, RANK, error_dtype=error_dtype)

    @jax.jit
    def step(params, state, micro_batches):
        quadratic = lambda p, x: jnp.sum((p["w"] - x) ** 2)
        _, updates, extra_args = accumulate_gradients(
            jax.value_and_grad(quadratic), params, state, micro_batches
        )
        updates, state = tx.update(updates, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    def stepped(place):
        params = {"w": jax.device_put(jnp.ones((8, 64)), place)}
        state = tx.init(params)
        rows = jax.sharding.PartitionSpec(None, *spec)
        targets = jnp.arange(K * 512.0).reshape(K, 8, 64) / 512
        if place is not None:
            targets = jax.device_put(targets, jax.sharding.NamedSharding(mesh, rows))
        for _ in range(2):
            params, new_state = step(params, state, targets)
            assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(
                jax.typeof, state
            )
            state = new_state
        return params["w"]

    with jax.set_mesh(mesh):
        sharded = stepped(sharding)
    assert jax.typeof(sharded).sharding.spec == spec
    np.testing.assert_allclose(sharded, stepped(None), rtol=1e-4, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    "micro_batches", [jnp.zeros(()), {"a": jnp.ones(2), "b": jnp.ones(3)}, {}]
)
def test_batches_without_one_first_axis(micro_batches):
    params = make_params()
    state = ldadamw(1e-2, RANK).init(params)
    with pytest.raises(ValueError, match="one first axis"):
        accumulate_gradients(loss_and_grads, params, state, micro_batches)


def test_state_of_other_parameters():
    state = ldadamw(1e-2, RANK).init({"other": jnp.ones((6, 9))})
    with pytest.raises(ValueError, match="error buffer for 'other', which the param"):
        accumulate_gradients(loss_and_grads, make_params(), state, batches(0))


def test_two_buffers_for_a_leaf():
    params = {"w": jnp.ones((6, 9))}
    state = optax.chain(scale_by_ldadam(1), scale_by_ldadam(2)).init(params)
    with pytest.raises(ValueError, match="two error buffers for 'w'"):
        error_accumulator(params, state, K)


# Memory

_MEASURE = """
import functools, json, sys
import jax, jax.numpy as jnp, optax
from ldadam_optax import accumulate_gradients, ldadamw

layers, d = 6, 128
shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
params = {f"w{i}": shape(d, 2 * d) for i in range(layers)}
size = layers * 2 * d * d * 4
tx = ldadamw(1e-2, 4)
state = jax.eval_shape(tx.init, params)

def loss(params, x):
    for w in params.values():
        x = jnp.tanh(x @ w) @ w.T
    return jnp.mean(x**2)

def step(params, state, batches, onto_error):
    values, updates, extra_args = accumulate_gradients(
        jax.value_and_grad(loss), params, state, batches, onto_error=onto_error
    )
    updates, state = tx.update(updates, state, params, **extra_args)
    return optax.apply_updates(params, updates), state, values

def measure(count, onto_error):
    compiled = jax.jit(
        functools.partial(step, onto_error=onto_error), donate_argnums=(0, 1)
    ).lower(params, state, shape(count, 2, d)).compile()
    memory = compiled.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"temporary": memory.temp_size_in_bytes / size, "kept": kept / size}

results = {
    name: {count: measure(count, onto_error) for count in counts}
    for name, onto_error, counts in (
        ("ours", True, (1, 4, 16)), ("averaged", False, (4, 16))
    )
}
json.dump(results, sys.stdout)
"""


def test_no_second_buffer_of_the_size_of_the_parameters():
    """`memory_analysis` in units of the parameters, all of them compressed.

    Under the scheduler that minimises memory, as accelerators do.
    """
    environment = memory_first() | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _MEASURE]
    output = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout
    measured = json.loads(output)
    ours, averaged = (
        {int(k): v["temporary"] for k, v in measured[name].items()}
        for name in ("ours", "averaged")
    )
    assert ours[4] < ours[1] + 0.1
    assert abs(ours[16] - ours[4]) < 0.01
    for count in (4, 16):
        assert averaged[count] - ours[count] > 0.95, (ours, averaged)
    for counts in measured.values():  # donation holds: state and parameters in place
        assert all(value["kept"] < 0.01 for value in counts.values())
