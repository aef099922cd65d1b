"""The error buffer for users: the paper's error, and another storage of it."""

from typing import Any

import jax
import jax.numpy as jnp

from ldadam_optax._checks import compute_dtype, storage_dtype
from ldadam_optax._dimension_numbers import MatrixView, WeightDimensionNumbers
from ldadam_optax._fields import LeafState, ScaleByLDAdamState, coords_axis
from ldadam_optax._quantization import ERROR_CODECS, MU_CODECS, Stored, block_axis
from ldadam_optax._random import salt_of, seed_of
from ldadam_optax._residual import error_codec, holds_momentum
from ldadam_optax._state import (
    find_state,
    join_state,
    names_of,
    split_state,
    stored_views,
)
from ldadam_optax._subspace import SUBSPACES


def ldadam_error(
    state: Any,
    params: Any = None,
    *,
    side: str = "short",
    subspace: str = "power_iteration",
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> Any:
    """Return the paper's error buffer ``e``, whatever form the state keeps it in.

    As ``U^T e = 0``, it is ``(I - U U^T)`` times what is stored.

    Args:
      state: State of :func:`scale_by_ldadam` with error feedback, or of an optimizer
        with one in it, such as ``ldadamw``.
      params: Parameters, or anything of their shapes; needed for int8 and int4.
      side: As given to the optimizer.
      subspace: As given to the optimizer.
      weight_dimension_numbers: As given to the optimizer.

    Returns:
      Tree of errors in the parameters' shapes, float32 or float64.

    Raises:
      ValueError: if the state has no error buffer, or has it as int8 or int4 codes
        and ``params`` is None, or if there are several LDAdam states in it.

    Example:
      >>> import jax.numpy as jnp
      >>> from ldadam_optax import scale_by_ldadam
      >>> tx = scale_by_ldadam(rank=1)
      >>> state = tx.init(jnp.ones((2, 3)))
      >>> _, state = tx.update(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), state)
      >>> ldadam_error(state).shape
      (2, 3)
    """
    state = find_state(state)
    named, structures = _leaves(state, params, side, weight_dimension_numbers)
    errors = [_read(state, *leaf, subspace) for leaf in named]
    return structures["error"].unflatten(errors)


def convert_error(
    state: ScaleByLDAdamState,
    params: Any,
    error_dtype: jax.typing.DTypeLike,
    *,
    side: str = "short",
    subspace: str = "power_iteration",
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> ScaleByLDAdamState:
    """Return the state with its error buffer in another storage.

    To go on with an ``error_dtype`` other than the one that a checkpoint was written
    with: restore it under its own options, then convert. A plain cast will not do: in
    the dtype of the arithmetic the buffer holds ``e + c U mu``, in fewer bits ``e``.

    Args:
      state: State of :func:`scale_by_ldadam` with error feedback.
      params: Parameters, or anything of their shapes and dtypes.
      error_dtype: The new storage.
      side: As given to the optimizer.
      subspace: As given to the optimizer.
      weight_dimension_numbers: As given to the optimizer.

    Returns:
      A state for an optimizer of the same options with the new ``error_dtype``.

    Raises:
      ValueError: as :func:`ldadam_error`, or for an unknown ``error_dtype``.

    Example:
      >>> import jax.numpy as jnp
      >>> from ldadam_optax import scale_by_ldadam
      >>> params = jnp.ones((32, 64))
      >>> state = scale_by_ldadam(rank=4).init(params)
      >>> state = convert_error(state, params, 'int8')
      >>> _, state = scale_by_ldadam(rank=4, error_dtype='int8').update(params, state)
      >>> state.error.dtype
      dtype('int8')
    """
    new_dtype = storage_dtype("error_dtype", error_dtype, tuple(ERROR_CODECS))
    assert new_dtype is not None
    named, structures = _leaves(state, params, side, weight_dimension_numbers)
    params_by_name = dict(zip(names_of(params), jax.tree.leaves(params), strict=True))
    form, states = 2, []
    for name, view, leaf in named:
        dtype = compute_dtype(name, params_by_name[name])
        error = _read(state, name, view, leaf, subspace).astype(dtype)
        codec, axis = error_codec(view, new_dtype)
        if holds_momentum(new_dtype, dtype):
            form = 1
            basis = _basis(view, leaf, subspace, dtype)
            momentum = state.c.astype(dtype) * _mu(view, leaf, dtype)
            error += view.lift(basis, momentum, "highest")
        stored = codec.encode(error, axis, _seed(state, name))
        states.append(leaf._replace(error=stored.codes, error_scale=stored.scale))
    if states and states[0].error_scale is not None:
        structures["error_scale"] = structures["error"]
    else:
        structures.pop("error_scale")
    common = {
        "count": state.count,
        "c": state.c,
        "form": jnp.zeros((state.form.shape[0], form), jnp.int8),
    }
    return join_state(common, states, structures)


def _leaves(
    state: ScaleByLDAdamState, params: Any, side: str, specs: WeightDimensionNumbers
) -> tuple[list[tuple[str, MatrixView, LeafState]], dict[str, Any]]:
    """Name, view and state of each leaf that the state has."""
    if state.error is None:
        raise ValueError(
            "The state has no error buffer: residual was no error feedback."
        )
    if state.error_scale is not None and params is None:
        raise ValueError(
            "Codes of int8 or int4 do not tell the parameters' shapes: pass params."
        )
    names = names_of(state.error)
    shapes = state.error if params is None else params
    states, structures = split_state(state, names)
    views = stored_views(shapes, names, states, side, specs)
    return list(zip(names, views, states, strict=True)), structures


def _read(
    state: ScaleByLDAdamState,
    name: str,
    view: MatrixView,
    leaf: LeafState,
    subspace: str,
) -> jax.Array:
    """``(I - U U^T)`` times what is stored."""
    axis = block_axis(view.shape, view.matrix_axes)
    found = Stored(leaf.error, leaf.error_scale)
    codec = next(
        codec
        for codec in ERROR_CODECS.values()
        if jax.tree.map(_abstract, found) == codec.shapes(view.shape, axis)
    )
    stored = codec.decode(found, axis, view.shape, _seed(state, name))
    dtype = jnp.promote_types(stored.dtype, jnp.float32)
    stored, basis = stored.astype(dtype), _basis(view, leaf, subspace, dtype.name)
    coords = view.project(stored, basis, "highest")
    return stored - view.lift(basis, coords, "highest")


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _basis(view: MatrixView, leaf: LeafState, subspace: str, dtype: str) -> jax.Array:
    return SUBSPACES[subspace].decode(leaf.projector, view, dtype)


def _mu(view: MatrixView, leaf: LeafState, dtype: str) -> jax.Array:
    codec = MU_CODECS["int8" if leaf.mu_scale is not None else leaf.mu.dtype.name]
    stored = Stored(leaf.mu, leaf.mu_scale)
    return codec.decode(
        stored, coords_axis(view), view.coords_shape, jnp.uint32(0)
    ).astype(dtype)


def _seed(state: ScaleByLDAdamState, name: str) -> jax.Array:
    return seed_of(state.count - 1, salt_of(name))
