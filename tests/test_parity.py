"""The library against the recorded torch runs and against the NumPy oracle."""

import functools

import golden_files
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ldadam_state, run, with_spectrum
from hypothesis import strategies as st
from reference import SIDES, LDAdamMatrix

from ldadam_optax import (
    LDAdamDimensionNumbers,
    ldadam,
    ldadam_error,
    ldadamw,
    scale_by_ldadam,
)


@pytest.mark.parametrize("name", golden_files.NAMES)
def test_library_follows_the_recorded_run(name, x64):
    golden = golden_files.load(name)
    params, gradients = start_of(golden)
    specs = matrices_alone(params)
    tx = ldadamw(
        golden.learning_rate,
        weight_decay=golden.weight_decay,
        subspace_init="svd",
        weight_dimension_numbers=specs,
        **golden.options,
    )
    steps = run(tx, params, gradients)
    for t, (stepped, state) in enumerate(steps, start=1):
        for i, expected in golden.values("p", t).items():
            np.testing.assert_allclose(stepped[str(i)], expected, rtol=0, atol=1e-9)
        if golden.options["residual"] == "error_feedback":
            side = golden.options["side"]
            errors = ldadam_error(ldadam_state(state), side=side)
            for i, expected in golden.values("e", t).items():
                np.testing.assert_allclose(errors[str(i)], expected, rtol=0, atol=1e-9)


def start_of(golden):
    """Parameters and gradients, as trees keyed by the parameter's number."""
    named = lambda values: {str(i): jnp.asarray(v) for i, v in values.items()}
    gradients = [named(golden.values("g", t)) for t in range(golden.steps)]
    return named(golden.values("p", 0)), gradients


def matrices_alone(params):
    as_matrix = lambda p: LDAdamDimensionNumbers() if p.ndim == 2 else None
    return jax.tree.map(as_matrix, params)


def test_ldadam_is_ldadamw_without_decay(x64):
    golden = golden_files.load("wide")
    params, gradients = start_of(golden)
    tx = ldadam(golden.learning_rate, subspace_init="svd", **golden.options)
    for t, (stepped, _) in enumerate(run(tx, params, gradients), start=1):
        expected = golden.values("p", t)[0]
        np.testing.assert_allclose(stepped["0"], expected, rtol=0, atol=1e-9)


@st.composite
def problems(draw):
    """Options of one matrix and a seed; few shapes, so that few compile."""
    shape = draw(st.sampled_from([(5, 9), (9, 5), (6, 6), (7, 13)]))
    return {
        "shape": shape,
        "rank": draw(st.integers(1, min(shape))),
        "side": draw(st.sampled_from(SIDES)),
        "subspace": draw(st.sampled_from(["power_iteration", "svd"])),
        "subspace_init": draw(st.sampled_from(["randomized", "svd"])),
        "residual": draw(st.sampled_from(["error_feedback", "none"])),
        "b1": draw(st.sampled_from([0.0, 0.5, 0.908])),
        "b2": draw(st.sampled_from([0.0, 0.9, 0.99])),
        "rho": draw(st.sampled_from([0.0, 0.5, 0.908])),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
        "scale": draw(st.sampled_from([1e-4, 1.0, 1e4])),
        "seed": draw(st.integers(0, 2**16)),
    }


@hypothesis.settings(max_examples=25)
@hypothesis.given(problems())
def test_library_follows_the_reference(problem):
    with jax.enable_x64(True):
        check_against_reference(**problem)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_library_follows_the_reference_on_every_side(shape, side, x64):
    check_against_reference(shape, rank=3, side=side, seed=1)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_library_follows_the_reference_at_the_ends_of_rho(rho, x64):
    check_against_reference((6, 10), rank=3, rho=rho, seed=2)


def check_against_reference(
    shape, *, scale=1.0, seed=0, steps=6, subspace_init="randomized", **options
):
    tx = scale_by_ldadam(subspace_init=subspace_init, **options)
    state = tx.init(jnp.zeros(shape, jnp.float64))
    start = np.asarray(state.projector) if subspace_init == "randomized" else None
    oracle = LDAdamMatrix(shape, start=start, **options)
    update = jax.jit(tx.update)

    for grad in varied_gradients(shape, scale, seed, steps):
        direction, state = update(jnp.asarray(grad), state)
        expected = oracle.step(grad)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-8)
        close(direction, expected, atol=1e-8 * np.abs(expected).max())
        if oracle.residual == "error_feedback":
            error = ldadam_error(state, side=oracle.side)
            close(error, oracle.error_as_stored(), atol=1e-8 * scale)
        close(
            lifted(state.projector, state.mu),
            lifted(oracle.basis, oracle.mu),
            atol=1e-8 * scale,
        )


def lifted(basis, moment) -> np.ndarray:
    return np.asarray(basis) @ np.asarray(moment)


def varied_gradients(shape, scale, seed, steps):
    """Gaussian noise round a slowly turning signal of known spectrum."""
    rng = np.random.default_rng(seed)
    values = np.geomspace(1.0, 0.1, min(shape))
    signal = with_spectrum(rng, *shape, values)
    for _ in range(steps):
        signal = 0.9 * signal + 0.3 * with_spectrum(rng, *shape, values)
        yield scale * (signal + 0.1 * rng.normal(size=shape))


def test_rank_may_differ_from_leaf_to_leaf(x64):
    specs = {
        "own": LDAdamDimensionNumbers(rank=2),
        "common": LDAdamDimensionNumbers(),
    }
    shape = (6, 9)
    params = {name: jnp.zeros(shape, jnp.float64) for name in specs}
    tx = scale_by_ldadam(4, weight_dimension_numbers=specs, subspace_init="svd")
    state = tx.init(params)
    update = jax.jit(tx.update)
    oracles = {"own": LDAdamMatrix(shape, 2), "common": LDAdamMatrix(shape, 4)}
    for grad in varied_gradients(shape, 1.0, 0, 4):
        grads = dict.fromkeys(specs, jnp.asarray(grad))
        directions, state = update(grads, state)
        for name, oracle in oracles.items():
            np.testing.assert_allclose(directions[name], oracle.step(grad), atol=1e-8)
    assert state.projector["own"].shape == (6, 2)
    assert state.projector["common"].shape == (6, 4)


@pytest.mark.parametrize("error_dtype", ["float32", "bfloat16"])
def test_error_of_fewer_bits_stays_near_the_reference(error_dtype):
    """The step is float32's; the buffer's own rounding is all that differs."""
    shape, rank = (8, 12), 3
    tx = scale_by_ldadam(rank, subspace_init="svd", error_dtype=error_dtype)
    state = tx.init(jnp.zeros(shape))
    update = jax.jit(tx.update)
    oracle = LDAdamMatrix(shape, rank)
    rounding = float(jnp.finfo(error_dtype).eps)
    for grad in varied_gradients(shape, 1.0, 0, 5):
        _, state = update(jnp.asarray(grad, jnp.float32), state)
        oracle.step(grad)
    assert state.error.dtype == error_dtype
    # Five steps of rounding, in entries of order one (c = 9.9 weighs M).
    error = np.asarray(ldadam_error(state), np.float64)
    np.testing.assert_allclose(error, oracle.error, atol=50 * rounding)
