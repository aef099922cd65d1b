"""The state around a step: taken apart, checked, put together, read by users."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldadam_optax._checks import check_array
from ldadam_optax._dimension_numbers import (
    MatrixView,
    WeightDimensionNumbers,
    leaf_name,
    matrix_views,
)
from ldadam_optax._fields import (
    FIELDS,
    LeafState,
    ScaleByLDAdamState,
    form_of,
    stored_fields,
)
from ldadam_optax._options import Options
from ldadam_optax._quantization import BLOCK
from ldadam_optax._step import Leaf


def names_of(tree: Any) -> list[str]:
    """The quoted path of each leaf."""
    return [leaf_name(path) for path, _ in jax.tree.leaves_with_path(tree)]


def split_state(
    state: Any, names: Sequence[str]
) -> tuple[list[LeafState], dict[str, Any]]:
    """Split the state into one for each leaf, with the structure of each field.

    Raises:
      TypeError: if it is no :class:`ScaleByLDAdamState`.
      ValueError: if it has other leaves than the updates, or no valid step count.
    """
    if not isinstance(state, ScaleByLDAdamState):
        raise TypeError(
            "update needs the ScaleByLDAdamState that init made, got "
            f"{type(state).__name__}."
        )
    check_scalar("count", state.count, jnp.integer)
    check_scalar("c", state.c, jnp.floating)
    columns, structures = [], {}
    for field in FIELDS:
        tree = getattr(state, field.name)
        leaves, structures[field.name] = jax.tree.flatten(tree)
        if tree is not None and (found := names_of(tree)) != list(names):
            raise ValueError(
                f"The state's {field.name} has the leaves {found}, the updates "
                f"{list(names)}: pass the state that init made for these parameters."
            )
        columns.append([None] * len(names) if tree is None else leaves)
    return [LeafState(*row) for row in zip(*columns, strict=True)], structures


def join_state(
    common: dict[str, Any], states: Sequence[LeafState], structures: dict[str, Any]
) -> ScaleByLDAdamState:
    """Undo :func:`split_state`; ``common`` are the fields of the whole state."""
    columns = {}
    for field in FIELDS:
        values = [getattr(state, field.name) for state in states]
        structure = structures.get(field.name, jax.tree.structure(None))
        columns[field.name] = structure.unflatten([v for v in values if v is not None])
    return ScaleByLDAdamState(**common, **columns)


def check_state(
    state: ScaleByLDAdamState,
    states: Sequence[LeafState],
    names: Sequence[str],
    leaves: Sequence[Leaf],
    options: Options,
) -> None:
    """Refuse a state of other options or parameters.

    Raises:
      ValueError: where a field is missing, not used, of another shape or dtype, or to
        be read in another way than these options do; it names the leaf.
    """
    for name, leaf, found in zip(names, leaves, states, strict=True):
        expected = stored_fields(leaf.view, options, leaf.dtype)
        for field, value, want in zip(FIELDS, found, expected, strict=True):
            _check_field(f"{field.name} of {name}", value, want, leaf.view)
    want = form_of(
        [leaf.view for leaf in leaves], options, [leaf.dtype for leaf in leaves]
    )
    form = tuple(getattr(state.form, "shape", ()))
    compressed = {1: "rows", 2: "columns"}
    if len(form) != 2 or form[0] not in compressed:
        raise ValueError(
            f"The state's form must have one of the shapes that init gives it, got "
            f"{state.form!r}: pass the state that init made for these parameters."
        )
    if form[0] != want[0]:
        raise ValueError(
            f"In this state the {compressed[form[0]]} of square matrices such as "
            f"{_first_square(names, leaves)} are compressed, with "
            f"side={options.side!r} their {compressed[want[0]]}: pass the side that "
            "the state was made with."
        )
    if leaves and form[1] != want[1]:
        meaning = {1: "e + c U mu", 2: "e"}
        raise ValueError(
            f"The error of {names[0]} is stored as {meaning.get(form[1])}, and "
            f"error_dtype={options.error_dtype!r} reads it as {meaning[want[1]]}: it "
            "was cast after it was stored. Restore the state with the options that it "
            "was saved under, then call convert_error."
        )


def check_params(updates: Any, params: Any) -> None:
    """Raise a ValueError unless the parameters have the shapes of the updates."""
    found = jax.tree.leaves_with_path(updates)
    wanted = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    if len(found) != len(wanted):
        raise ValueError(
            f"There are {len(found)} updates and {len(wanted)} parameters: pass the "
            "parameters that the gradients are of."
        )
    for (path, leaf), shape in zip(found, wanted, strict=True):
        if np.shape(leaf) != shape:
            raise ValueError(
                f"The update of {leaf_name(path)} has shape {np.shape(leaf)}, and its "
                f"parameter {shape}."
            )


def check_scalar(field: str, value: Any, kind: Any) -> None:
    """Raise a ValueError unless a field of the whole state is a scalar of its kind."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", object)
    if shape != () or not jnp.issubdtype(dtype, kind):
        raise ValueError(
            f"The state's {field} must be an array of shape () and of a dtype of "
            f"{kind.__name__} kind, got {value!r}: pass the state that init made."
        )


def check_stored(where: str, value: Any, want: Any, leaf: Any, way_out: str) -> None:
    """Raise a ValueError unless a stored array has the shape and dtype of its leaf."""
    check_array(where, value)
    shape, dtype = tuple(value.shape), jnp.dtype(value.dtype)
    if shape != want.shape or dtype != want.dtype:
        raise ValueError(
            f"{where} must have shape {want.shape} and dtype {want.dtype.name}, as the "
            f"leaf has shape {leaf}; the state's has shape {shape} and dtype "
            f"{dtype.name}. {way_out}"
        )


def _check_field(where: str, value: Any, want: Any, view: MatrixView) -> None:
    way_out = (
        "Pass the state that init made for these parameters and options; another "
        "storage of the error is had with convert_error."
    )
    if want is None and value is not None:
        raise ValueError(
            f"The state has {where}, which the options do not use. {way_out}"
        )
    if want is None:
        return
    if value is None:
        raise ValueError(f"The state lacks {where}, which the options need. {way_out}")
    check_stored(where, value, want, view.shape, way_out)


def _first_square(names: Sequence[str], leaves: Sequence[Leaf]) -> str:
    pairs = zip(names, leaves, strict=True)
    return next((n for n, leaf in pairs if leaf.view.m == leaf.view.n), "none")


def find_state(state: Any) -> ScaleByLDAdamState:
    """The one LDAdam state in a nest of optimizer states."""
    is_ours = lambda node: isinstance(node, ScaleByLDAdamState)
    found = [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]
    if len(found) != 1:
        raise ValueError(
            f"Need one ScaleByLDAdamState, found {len(found)} in "
            f"{type(state).__name__}: pass the one that is meant."
        )
    return found[0]


def stored_views(
    tree: Any,
    names: Sequence[str],
    states: Sequence[LeafState],
    side: str,
    dimension_numbers: WeightDimensionNumbers,
) -> list[MatrixView]:
    """Views of those leaves of ``tree`` that a state has, of the ranks that it has.

    Args:
      tree: Gradients, parameters or anything of their shapes; it may have more leaves.
      names: Quoted names of the state's leaves.
      states: Their state.
      side: As given to the optimizer.
      dimension_numbers: As given to the optimizer.

    Raises:
      ValueError: if the tree lacks a leaf, or where :func:`matrix_views` does.
    """
    lacking = sorted(set(names) - set(names_of(tree)))
    if lacking:
        raise ValueError(
            f"The state has {', '.join(lacking)}, which the tree that is given with it "
            "lacks: pass the state of an optimizer of these parameters."
        )
    views = matrix_views(tree, dimension_numbers, 1, side, names)
    ranks = [
        state.mu.shape[-2] if state.mu_scale is None else state.projector.shape[-1]
        for state in states
    ]
    pairs = zip(views, ranks, strict=True)
    return [dataclasses.replace(view, rank=rank) for view, rank in pairs]


def stored_options(
    states: Sequence[LeafState], dtypes: Sequence[str], side: str, subspace: str
) -> Options:
    """The options that a state's own fields tell, as far as reading it takes them.

    Args:
      states: State of each leaf, at least one.
      dtypes: Dtypes of their arithmetic.
      side: As given to the optimizer.
      subspace: As given to the optimizer.

    Returns:
      Options under which :func:`check_state` accepts the state. Of rules without a
      field of their own, which read a state alike, it names ``'none'``; products of
      full size are float32 accurate.
    """
    first = states[0]

    def storage(field: str) -> str | None:
        found = [getattr(state, field).dtype.name for state in states]
        return None if found == list(dtypes) else found[0]

    residual, error_dtype = "none", None
    if first.error is not None:
        residual, error_dtype = "error_feedback", storage("error")
        if first.error_scale is not None:
            codes_of_a_block = first.error.size // first.error_scale.size
            error_dtype = "int8" if codes_of_a_block == BLOCK else "int4"
    elif first.residual_norm is not None:
        residual = "recovery"
    return Options(
        residual=residual,
        side=side,
        subspace=subspace,
        subspace_init="randomized",
        subspace_interval=1,
        precision="highest",
        factorizations=None,
        mu_dtype=storage("mu"),
        nu_dtype=storage("nu"),
        projector_dtype=storage("projector"),
        error_dtype=error_dtype,
    )
