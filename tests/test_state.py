"""The state, and the trees and dtypes that users bring."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import gradients_like, last, ldadam_state, params_like, run

from ldadam_optax import LDAdamDimensionNumbers, ldadam, ldadamw, scale_by_ldadam

SETTINGS = {"rank": 2, "weight_decay": 0.01}


# State


def test_tree_map_params_visits_what_is_like_the_parameters():
    params = params_like()
    tx = ldadamw(1e-2, **SETTINGS)
    state = tx.init(params)
    doubled = optax.tree.map_params(
        tx, lambda s: s + 1, state, transform_non_params=lambda s: s
    )
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert int(ldadam_state(doubled).count) == 0
    for leaf in jax.tree.leaves(ldadam_state(doubled).mu):
        np.testing.assert_array_equal(leaf, 1.0)


def test_tree_get_and_set():
    params = {"w": jnp.ones((6, 9))}
    tx = scale_by_ldadam(2)
    state = tx.init(params)
    assert optax.tree.get(state, "projector")["w"].shape == (6, 2)
    assert int(optax.tree.get(state, "count")) == 0
    whole = ldadamw(1e-2, rank=2).init(params)
    assert optax.tree.get(whole, "projector")["w"].shape == (6, 2)
    replaced = optax.tree.set(state, count=jnp.asarray(7, jnp.int32))
    assert int(replaced.count) == 7


@pytest.mark.parametrize("residual", ["error_feedback", "none"])
def test_state_is_what_is_documented(residual):
    spec = LDAdamDimensionNumbers(1, 2)
    tx = scale_by_ldadam(2, residual=residual, weight_dimension_numbers=spec)
    state = tx.init({"wide": jnp.ones((3, 5, 8)), "tall": jnp.ones((3, 8, 5))})
    assert state.count.dtype == jnp.int32
    assert state.count.shape == ()
    for name in ("wide", "tall"):
        assert state.mu[name].shape == state.nu[name].shape == (3, 2, 8)
        assert state.projector[name].shape == (3, 5, 2)
    if residual == "error_feedback":
        assert state.error["tall"].shape == (3, 8, 5)
    else:
        assert state.error is None
    assert state.error_scale is None
    assert state.residual_norm is None


def test_init_is_repeatable_and_differs_between_leaves():
    params = {"a": jnp.ones((6, 9)), "b": jnp.ones((6, 9))}
    first, second = (scale_by_ldadam(2).init(params).projector for _ in range(2))
    np.testing.assert_array_equal(first["a"], second["a"])
    jitted = jax.jit(scale_by_ldadam(2).init)(params).projector
    np.testing.assert_allclose(first["a"], jitted["a"], atol=1e-6)


def test_state_types_do_not_change():
    """`jax.typeof` sees what shape and dtype do not: weak types and sharding."""
    params = params_like()
    tx = ldadamw(1e-2, **SETTINGS)
    state = tx.init(params)
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    for update in (tx.update, jax.jit(tx.update)):
        updates, after = update(gradients_like(params)[0], state, params)
        assert types(after) == types(state)
        assert types(updates) == types(params)
    assert types(jax.jit(tx.init)(params)) == types(state)


def test_one_trace():
    params = params_like()
    tx = ldadamw(1e-2, **SETTINGS)
    traces = []

    def update(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params)

    jitted, state = jax.jit(update), tx.init(params)
    for grads in gradients_like(params):
        _, state = jitted(grads, state, params)
    assert len(traces) == 1


def test_learning_rate_of_numpy():
    tx = ldadamw(np.float32(1e-2), rank=2)
    params = {"w": jnp.ones((6, 9))}
    last(run(tx, params, gradients_like(params, 1)))


# Trees


@pytest.mark.parametrize("empty", [None, optax.MaskedNode(), {}, ()])
def test_empty_nodes(empty):
    params = {"w": jnp.ones((6, 9)), "nothing": empty, "b": jnp.ones(9)}
    for tx in (ldadamw(1e-2, rank=2), ldadam(1e-2, rank=2)):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    alone = {"w": params["w"], "nothing": empty}
    tx = scale_by_ldadam(2)
    updates, _ = jax.jit(tx.update)(alone, tx.init(alone))
    assert jax.tree.structure(updates) == jax.tree.structure(alone)


@pytest.mark.parametrize("params", [{}, (), {"b": None}], ids=repr)
def test_no_leaf_at_all(params):
    tx = ldadamw(1e-2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates == params


def test_none_is_a_tree_without_leaves_for_the_bare_transformation():
    # ldadamw decays weights: there None as params means that none were given.
    tx = scale_by_ldadam(2)
    updates, _ = tx.update(None, tx.init(None), None)
    assert updates is None


def test_single_array_as_params():
    matrix = jnp.ones((6, 9))
    tx = ldadamw(1e-2, rank=2)
    updates, _ = jax.jit(tx.update)(matrix, tx.init(matrix), matrix)
    assert updates.shape == matrix.shape


def test_bare_transformation_needs_no_params():
    tx = scale_by_ldadam(2)
    grads = {"w": jnp.ones((6, 9))}
    state = tx.init(grads)
    updates, _ = tx.update(grads, state)
    assert float(jnp.vdot(updates["w"], grads["w"])) > 0  # a direction to descend


def test_extra_arguments_are_accepted():
    params = {"w": jnp.ones((6, 9))}
    for tx in (scale_by_ldadam(2), ldadamw(1e-2, rank=2)):
        tx.update(params, tx.init(params), params, value=1.0, unknown="x")


@pytest.mark.parametrize("error_dtype", [None, "bfloat16"])
def test_abstract_init(error_dtype):
    """`init` on shapes gives the shapes that it gives on values."""
    params = params_like()
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    tx = ldadamw(1e-2, **SETTINGS, error_dtype=error_dtype)
    expected = jax.eval_shape(tx.init, params)
    for abstract in (jax.eval_shape(tx.init, shapes), tx.init(shapes)):
        like = lambda leaf: (leaf.shape, leaf.dtype)
        assert jax.tree.structure(abstract) == jax.tree.structure(expected)
        assert [like(leaf) for leaf in jax.tree.leaves(abstract)] == [
            like(leaf) for leaf in jax.tree.leaves(expected)
        ]


# Dtypes


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float16", "float32"),
    ],
)
def test_dtype_mixes(param_dtype, grad_dtype):
    """Updates in the parameter's dtype, state in float32, the step near float32's."""
    params = params_like(param_dtype)
    grads = [
        jax.tree.map(lambda g: g.astype(grad_dtype), g)
        for g in gradients_like(params_like())
    ]
    tx = ldadamw(1e-2, rank=2)
    update = jax.jit(tx.update)
    state, reference_state = tx.init(params), tx.init(params_like())
    for g in grads:
        updates, state = update(g, state, params)
        as_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), g)
        expected, reference_state = update(as_float32, reference_state, params_like())
        for leaf in jax.tree.leaves(updates):
            assert leaf.dtype == param_dtype
    for leaf in jax.tree.leaves(ldadam_state(state)):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.int8)  # int8: the form
    eps = float(jnp.finfo(param_dtype).eps)
    kernel = lambda tree: np.asarray(tree["dense"]["kernel"], np.float64)
    np.testing.assert_allclose(kernel(updates), kernel(expected), atol=0.01 * 4 * eps)


def test_float64_leaves_are_computed_in_float64(x64):
    params = {"w": jnp.ones((6, 9), jnp.float64), "v": jnp.ones((6, 9), jnp.float32)}
    tx = ldadamw(1e-2, rank=2)
    (updates, state) = jax.jit(tx.update)(params, tx.init(params), params)
    state = ldadam_state(state)
    for name, dtype in (("w", jnp.float64), ("v", jnp.float32)):
        assert updates[name].dtype == dtype
        for tree in (state.mu, state.nu, state.projector, state.error):
            assert tree[name].dtype == dtype


def test_storage_dtypes():
    params = {"w": jnp.ones((6, 9))}
    tx = scale_by_ldadam(
        2,
        mu_dtype="bfloat16",
        nu_dtype=jnp.float32,
        projector_dtype=jnp.bfloat16,
        error_dtype="bfloat16",
    )
    updates, state = tx.update(params, tx.init(params))
    dtypes = [getattr(state, f)["w"].dtype for f in ("mu", "nu", "projector", "error")]
    assert dtypes == [jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    assert updates["w"].dtype == jnp.float32
