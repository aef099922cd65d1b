"""A state of another form is refused, and converted where asked."""

import functools
import gc

import chex
import equinox as eqx
import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import gradients_like, ldadam_state, params_like, random_like

from ldadam_optax import (
    LDAdamDimensionNumbers,
    convert_error,
    ldadam_error,
    ldadamw,
    scale_by_ldadam,
)

RANK = 3
ALL_BFLOAT16 = {
    f"{field}_dtype": "bfloat16" for field in ("mu", "nu", "projector", "error")
}


def zeros(dtype="float32", shape=(32, 64)):
    return {"layer": {"kernel": jnp.zeros(shape, dtype)}}


def cast(state, dtype):
    """What a restore into another dtype does, and a cast by tree.map."""
    as_float = lambda x: (
        jax.ShapeDtypeStruct(x.shape, dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x
    )
    return jax.tree.map(as_float, state)


# How the state was made; how it is read; what the message tells.
OTHERS = {
    "int8_error": ({}, {"error_dtype": "int8"}, "error"),
    "int4_error": ({"error_dtype": "int8"}, {"error_dtype": "int4"}, "error"),
    "float32_error": ({"error_dtype": "int8"}, {}, "error"),
    "bfloat16_error": ({}, {"error_dtype": "bfloat16"}, "convert_error"),
    "float16_error": ({"error_dtype": "bfloat16"}, {"error_dtype": "float16"}, "error"),
    "int8_mu": ({}, {"mu_dtype": "int8"}, "mu"),
    "float32_mu": ({"mu_dtype": "int8"}, {}, "mu"),
    "int8_nu": ({"nu_dtype": "bfloat16"}, {"nu_dtype": "int8"}, "nu"),
    "float32_nu": ({"nu_dtype": "int8"}, {}, "nu"),
    "mu_for_nu": ({"mu_dtype": "int8"}, {"nu_dtype": "int8"}, "mu"),
    "rank": ({"rank": 4}, {}, "mu"),
    "side": ({}, {"side": "long"}, "mu"),
}
RESIDUALS = ("error_feedback", "recovery", "normalized", "none")
# 'normalized' and 'none' keep nothing, so that either goes on from the other.
OTHERS |= {
    f"{there}_to_{here}": ({"residual": there}, {"residual": here}, name)
    for there, here, name in (
        ("error_feedback", "recovery", "error"),
        ("error_feedback", "normalized", "error"),
        ("error_feedback", "none", "error"),
        ("recovery", "error_feedback", "error"),
        ("recovery", "none", "residual_norm"),
        ("recovery", "normalized", "residual_norm"),
        ("none", "error_feedback", "error"),
        ("none", "recovery", "residual_norm"),
        ("normalized", "recovery", "residual_norm"),
    )
}


def abstract_state(params, **options):
    return jax.eval_shape(scale_by_ldadam(**{"rank": RANK, **options}).init, params)


def check_refused(params, state, options, *told, name="layer/kernel"):
    """Refused while tracing: nothing is compiled, nothing computed."""
    tx = scale_by_ldadam(**{"rank": RANK, **options})
    with pytest.raises(ValueError, match=name) as failure:
        jax.eval_shape(tx.update, params, state, params)
    for words in told:
        assert words in str(failure.value)


@pytest.mark.parametrize("name", OTHERS)
def test_state_of_other_options(name):
    made, read, told = OTHERS[name]
    state = abstract_state(zeros(), **made)
    check_refused(zeros(), state, read, told, "convert_error", "init")


@pytest.mark.parametrize("options", [{}, ALL_BFLOAT16], ids=["float32", "bfloat16"])
def test_float32_state_cast_to_bfloat16(options):
    """The optimizer of bfloat16 reads e, and e + c U mu was cast."""
    check_refused(
        zeros(), cast(abstract_state(zeros()), jnp.bfloat16), options, "convert_error"
    )


def test_bfloat16_state_cast_to_float32():
    state = cast(abstract_state(zeros(), **ALL_BFLOAT16), jnp.float32)
    check_refused(zeros(), state, {}, "stored as e, ", "convert_error")


@pytest.mark.parametrize(("made", "read"), [("short", "long"), ("right", "left")])
def test_other_side_of_a_square_matrix(made, read):
    params = zeros(shape=(32, 32))
    state = abstract_state(params, side=made)
    same = {"short": "left", "right": "right"}[made]
    tx = scale_by_ldadam(RANK, side=same)
    jax.eval_shape(tx.update, params, state)
    if (made, read) == ("short", "long"):  # both compress the rows of a square one
        tx = scale_by_ldadam(RANK, side=read)
        jax.eval_shape(tx.update, params, state)
        read = "right"
    check_refused(params, state, {"side": read}, f"side='{read}'")


# Orbax leaves the reads of what it refused unfinished; collected here, not elsewhere.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_orbax_refuses_a_target_of_another_form(tmp_path):
    """It casts dtypes without a word; the shape of ``form`` is what it compares."""
    state = scale_by_ldadam(RANK).init(zeros())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = abstract_state(zeros(), **ALL_BFLOAT16)
        with pytest.raises(ValueError, match="shape"):
            checkpointer.restore(tmp_path / "state", target)
        other = abstract_state(zeros(), mu_dtype="bfloat16")
        restored = checkpointer.restore(tmp_path / "state", other)
    assert restored.mu["layer"]["kernel"].dtype == jnp.bfloat16  # the silent cast
    gc.collect()


def test_flax_restores_what_was_saved_and_the_step_refuses_it():
    state = scale_by_ldadam(RANK).init(zeros())
    data = flax.serialization.to_bytes(state)
    target = scale_by_ldadam(RANK, **ALL_BFLOAT16).init(zeros())
    restored = flax.serialization.from_bytes(target, data)
    restored = jax.tree.map(lambda x, t: jnp.asarray(x, t.dtype), restored, target)
    check_refused(zeros(), restored, ALL_BFLOAT16, "convert_error")


# Conversion


@functools.cache
def stepped(error_dtype, dtype):
    """The optimizer, its state after three steps, and the gradient that follows."""
    with jax.enable_x64(True):
        params = zeros(dtype)
        tx = scale_by_ldadam(RANK, error_dtype=error_dtype, subspace_init="svd")
        state, update = tx.init(params), jax.jit(tx.update)
        for t in range(3):
            _, state = update(random_like(params, seed=t), state)
        return update, state, random_like(params, seed=3)


# Of the error's largest entry.
ROUNDING = {"float64": 1e-15, "float32": 1e-6, "bfloat16": 2**-7, "int8": 1 / 120}
CONVERSIONS = [
    ("float32", None, "int8"),
    ("float32", None, "bfloat16"),
    ("float32", None, "float32"),
    ("float32", "bfloat16", "float32"),
    ("float32", "int8", "float32"),
    ("float64", "bfloat16", "float64"),
    ("float64", "int8", "float32"),
    ("float64", "float32", "float64"),
    ("float64", None, "float32"),
]


def kernel(tree):
    return np.asarray(tree["layer"]["kernel"], np.float64)


@pytest.mark.parametrize(("dtype", "old", "new"), CONVERSIONS)
def test_converted_state_goes_on(dtype, old, new, x64):
    """The same error to the rounding of the new storage, and the same next step."""
    update, state, grads = stepped(old, dtype)
    other_update, fresh, _ = stepped(None if new == dtype else new, dtype)
    converted = convert_error(state, grads, new)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, fresh)
    before, after = (kernel(ldadam_error(s, grads)) for s in (state, converted))
    atol = ROUNDING[new] * np.abs(before).max()
    np.testing.assert_allclose(after, before, rtol=0, atol=max(atol, 1e-6))
    expected, _ = update(grads, state)
    direction, _ = other_update(grads, converted)
    largest = np.abs(kernel(expected)).max()
    coarsest = max(ROUNDING[new], ROUNDING[old or dtype])
    atol = max(1e-5, 10 * coarsest) * largest
    np.testing.assert_allclose(kernel(direction), kernel(expected), rtol=0, atol=atol)


def test_int8_and_back():
    _, state, grads = stepped(None, "float32")
    back = convert_error(convert_error(state, grads, "int8"), grads, "float32")
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    before, after = kernel(ldadam_error(state)), kernel(ldadam_error(back))
    assert 0 < np.abs(after - before).max() < np.abs(before).max() / 120
    # U^T e = 0 stays: what int8 rounds into the basis is taken off by the reader.
    basis = kernel(state.projector)
    np.testing.assert_allclose(basis.T @ after, 0, atol=1e-5)


@pytest.mark.parametrize("error_dtype", [None, "int8"])
def test_error_out_of_the_whole_state_of_ldadamw(error_dtype):
    params = params_like()
    tx = ldadamw(1e-2, rank=2, error_dtype=error_dtype)
    _, state = jax.jit(tx.update)(gradients_like(params, 1)[0], tx.init(params), params)
    errors = ldadam_error(state, params)
    inner = ldadam_error(ldadam_state(state), params)
    chex.assert_trees_all_equal(errors, inner)
    assert errors["dense"]["kernel"].shape == (8, 12)
    assert np.abs(errors["dense"]["kernel"]).max() > 0.1
    assert len(jax.tree.leaves(errors)) == 2
    with pytest.raises(ValueError, match="one ScaleByLDAdamState"):
        ldadam_error((state, state), params)


# Trees that do not fit


@pytest.mark.parametrize("shape", [(12,), (8, 12)], ids=str)
def test_a_parameter_added_in_mid_run(shape):
    params = params_like()
    tx = ldadamw(1e-2, rank=2)
    state = jax.eval_shape(tx.init, params)
    more = {**params, "late": {"added": jnp.zeros(shape)}}
    with pytest.raises(ValueError, match="init") as failure:
        jax.eval_shape(tx.update, more, state, more)
    assert "lacks 'late/added' of the updates" in str(failure.value)
    less = {name: params[name] for name in ("dense", "embed")}
    with pytest.raises(ValueError, match="'out/kernel'"):
        jax.eval_shape(tx.update, less, state, less)


def test_frozen_parameters_with_a_dict_of_specs():
    params = flax.core.freeze({"layer": {"kernel": jnp.zeros((8, 12))}})
    specs = {"layer": {"kernel": LDAdamDimensionNumbers()}}
    for tx in (
        ldadamw(1e-2, rank=2, weight_dimension_numbers=specs),
        scale_by_ldadam(2, weight_dimension_numbers=specs),
    ):
        with pytest.raises(ValueError, match="FrozenDict") as failure:
            jax.eval_shape(tx.init, params)
        assert "weight_dimension_numbers" in str(failure.value)


def test_unfiltered_equinox_module():
    model = eqx.nn.MLP(8, 8, 16, depth=1, key=jax.random.key(0))
    with pytest.raises(TypeError, match="activation") as failure:
        ldadamw(1e-2, rank=2).init(model)
    assert "equinox.filter" in str(failure.value)
