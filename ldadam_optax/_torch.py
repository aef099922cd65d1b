"""The state of the published torch optimizer, taken over in mid-run.

Torch is not imported: a ``state_dict`` is a dict of what can become a NumPy array. The
published class (IST-DASLab/LDAdam, and its copy in the package ``zij``) keeps two parts
of the algorithm elsewhere: the steps done in an attribute, the errors in ``.grad``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldadam_optax._adam import ScaleByAdamState
from ldadam_optax._dimension_numbers import (
    LDAdamDimensionNumbers,
    MatrixView,
    WeightDimensionNumbers,
    matrix_view,
    resolve_dimension_numbers,
)
from ldadam_optax._fields import ScaleByLDAdamState
from ldadam_optax._routing import path_names


class _Parameter(NamedTuple):
    """What torch has of one parameter, and its number."""

    index: int
    state: Mapping[str, Any]
    error: Any


def from_torch(
    state_dict: Mapping[str, Any],
    names: Sequence[str | None],
    state: Any,
    params: Any,
    *,
    completed_steps: int,
    errors: Mapping[int, Any] | None = None,
    transposed: bool = True,
    side: str = "short",
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> Any:
    """Return an optimizer's state with what a torch ``LDAdamW`` had.

    The next step is the one that torch would have taken. Moments, projectors and errors
    are copied; the state's dtypes stay.

    Args:
      state_dict: ``optimizer.state_dict()`` of torch, of tensors or of arrays.
      names: For each of torch's parameters, in the order of ``param_groups``, the name
        of its leaf here, such as ``'layers/0/up/kernel'``; None for one without a leaf.
        A leaf that stacks matrices along batch axes is named once for each, in order.
      state: State that ``init`` of ``ldadamw`` or :func:`scale_by_ldadam` made, alone
        or within ``optax.chain`` and its like. Moments in float dtypes, and the error
        buffer, if any, in that of the arithmetic.
      params: Parameters, or anything of their shapes.
      completed_steps: ``optimizer.completed_steps``, which torch does not save.
      errors: ``.grad`` of torch's parameters, by their numbers, read after a step and
        before the next gradient is added; needed by a state with an error buffer.
      transposed: Whether a square leaf holds the transpose of torch's weight, as
        ``kernel`` of Flax does of ``nn.Linear``. Sides that differ tell it themselves.
      side: As given to the optimizer.
      weight_dimension_numbers: As given to the optimizer.

    Returns:
      A state of the same structure, with all step counts at ``completed_steps``.

    Raises:
      ValueError: if a name, a shape or a rank does not fit, or if torch compressed the
        other side of a matrix; the leaf is named.

    Example:
      See ``docs/migrating.md``.
    """
    leaves = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    parameters = _by_name(state_dict, names, errors or {})
    if strangers := sorted(set(parameters) - set(leaves)):
        raise ValueError(f"names has {strangers}, params only {sorted(leaves)}.")
    specs = dict(zip(leaves, _specs(params, weight_dimension_numbers), strict=True))
    steps = jnp.asarray(completed_steps, jnp.int32)

    taken = set()

    def of(name: str) -> list[_Parameter]:
        if name not in parameters:
            raise ValueError(f"{name!r} has state here, but names does not have it.")
        taken.add(name)
        return parameters[name]

    def moment(key: str) -> Callable[[str, Any], np.ndarray]:
        return lambda name, leaf: _full_moment(name, of(name), key, leaf, transposed)

    def convert(node: Any) -> Any:
        if isinstance(node, ScaleByLDAdamState):
            matrices = {
                name: _matrix(
                    name, of(name), leaves[name], specs[name], side, transposed
                )
                for name, _ in _named(node.mu)
            }
            return _fill_ldadam(node, matrices)._replace(count=steps)
        if isinstance(node, ScaleByAdamState):
            _check_floats(node)
            mu, nu = _fill(node.mu, moment("m")), _fill(node.nu, moment("v"))
            return node._replace(count=steps, mu=mu, nu=nu)
        if isinstance(node, optax.ScaleByScheduleState):
            return optax.ScaleByScheduleState(steps)
        return node

    kinds = (ScaleByLDAdamState, ScaleByAdamState, optax.ScaleByScheduleState)
    new = jax.tree.map(convert, state, is_leaf=lambda node: isinstance(node, kinds))
    if left := sorted(set(parameters) - taken):
        raise ValueError(
            f"The state has no moments of LDAdam or AdamW for {left}: pass the state "
            "of ldadamw, or name what stays behind None in names."
        )
    return new


class _Matrix(NamedTuple):
    """One leaf in this library's layout; ``error`` holds ``e + c U mu``."""

    mu: np.ndarray
    nu: np.ndarray
    projector: np.ndarray
    error: np.ndarray | None
    c: float


def _matrix(
    name: str,
    parameters: list[_Parameter],
    leaf: Any,
    spec: Any,
    side: str,
    transposed: bool,
) -> _Matrix:
    """All matrices of a leaf, from one of torch's parameters each."""
    view = matrix_view(repr(name), leaf.shape, spec, min(leaf.shape), side)
    _check_count(name, parameters, math.prod(view.batch_shape))
    rows = [_oriented(name, one, view, transposed) for one in parameters]
    mu, nu, basis = (
        np.stack(part) for part in zip(*(r[:3] for r in rows), strict=True)
    )
    batch = lambda array: array.reshape(*view.batch_shape, *array.shape[1:])
    b1 = parameters[0].state["beta1"]
    c = b1 / (1 - b1)
    errors = [error for *_, error in rows if error is not None]
    if len(errors) < len(rows):
        return _Matrix(batch(mu), batch(nu), batch(basis), None, c)
    order = (*view.batch_axes, *view.m_axes, *view.n_axes)
    buffer = np.stack(errors) + c * (basis @ mu)
    in_order = buffer.reshape([leaf.shape[axis] for axis in order])
    error = in_order.transpose(np.argsort(order))
    return _Matrix(batch(mu), batch(nu), batch(basis), error, c)


def _oriented(
    name: str, one: _Parameter, view: MatrixView, transposed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """``mu, nu, basis, error`` of one matrix with the compressed axis first."""
    projector = one.state.get("previous_projector")
    basis = getattr(projector, "ortho_matrix", projector)
    if basis is None:
        raise ValueError(
            f"Torch's parameter {one.index} has no projector for {name!r}: it took no "
            "step, or it is in a group without low rank; name its leaf None in "
            "weight_dimension_numbers then."
        )
    left = bool(one.state["left_proj"])
    turn = lambda array: array if left else array.T
    mu, nu, basis = (turn(_array(x)) for x in (one.state["m"], one.state["v"], basis))
    m, n = basis.shape[0], mu.shape[1]
    torch_shape = (m, n) if left else (n, m)
    groups = sorted((view.m_axes, view.n_axes), key=min)  # In the leaf's own order.
    here = tuple(math.prod(view.shape[axis] for axis in axes) for axes in groups)
    if left == _is_transposed(name, torch_shape, here, transposed):
        groups.reverse()
    if view.m_axes != groups[0]:
        raise ValueError(
            f"{name!r}: torch compressed the {'rows' if left else 'columns'} of its "
            f"weight of shape {torch_shape}, this optimizer the other side. Pass "
            "another side, or change reduction_axis and output_axis of the leaf's "
            "dimension numbers for each other, here and in the optimizer."
        )
    error = None
    if one.error is not None:
        error = turn(_array(one.error))
    elif one.state.get("error_feedback") is False:
        error = np.zeros((m, n), mu.dtype)
    return mu, nu, basis, error


def _fill_ldadam(
    state: ScaleByLDAdamState, matrices: Mapping[str, _Matrix]
) -> ScaleByLDAdamState:
    """The state with the arrays of the matrices in place of its own."""
    _check_floats(state)
    fields = {
        field: _fill(
            getattr(state, field), lambda name, _, f=field: getattr(matrices[name], f)
        )
        for field in ("mu", "nu", "projector")
    }
    if state.error is None:
        return state._replace(**fields)
    weights = sorted({matrix.c for matrix in matrices.values()})
    if len(weights) > 1:
        b1s = [c / (1 + c) for c in weights]
        raise ValueError(f"One b1 for all matrices is needed, torch has {b1s}.")
    fields["c"] = jnp.full_like(state.c, weights[0])
    for name, leaf in _named(state.error):
        if matrices[name].error is None:
            raise ValueError(
                f"The state has an error buffer for {name!r}: pass errors, which torch "
                "has in .grad of its parameters."
            )
        if leaf.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"{name!r}: the error buffer must be float32 or float64 to be taken "
                f"over, got {leaf.dtype}. Take it over so, then use convert_error."
            )
    error = _fill(state.error, lambda name, _: matrices[name].error)
    return state._replace(**fields, error=error)


def _full_moment(
    name: str, parameters: list[_Parameter], key: str, leaf: Any, transposed: bool
) -> np.ndarray:
    """A moment of AdamW, in the leaf's shape."""
    _check_count(name, parameters, 1)
    moment = _array(parameters[0].state[key])
    if moment.ndim == 2:
        sizes = (leaf.shape[0], math.prod(leaf.shape[1:]))
        if _is_transposed(name, moment.shape, sizes, transposed):
            moment = moment.T
    if moment.size != math.prod(leaf.shape):
        raise ValueError(
            f"{name!r} has shape {leaf.shape}, torch's parameter {moment.shape}."
        )
    return moment.reshape(leaf.shape)


def _fill(tree: Any, value: Callable[[str, Any], Any]) -> Any:
    """The tree with other values, in the dtypes and on the devices of its own."""
    arrays, treedef = jax.tree.flatten(tree)
    filled = []
    for (name, old), array in zip(_named(tree), arrays, strict=True):
        new = value(name, old)
        if new.shape != old.shape:
            raise ValueError(
                f"{name!r}: the state here has shape {old.shape}, torch's comes to "
                f"{new.shape}: give the optimizer torch's rank."
            )
        filled.append(jax.device_put(jnp.asarray(new, old.dtype), array.sharding))
    return treedef.unflatten(filled)


def _by_name(
    state_dict: Mapping[str, Any],
    names: Sequence[str | None],
    errors: Mapping[int, Any],
) -> dict[str, list[_Parameter]]:
    """Torch's parameters by the name of their leaf here."""
    indices = [i for group in state_dict["param_groups"] for i in group["params"]]
    if len(indices) != len(names):
        raise ValueError(
            f"Torch has {len(indices)} parameters, names has {len(names)}: give one "
            "for each, None for those without a leaf."
        )
    found: dict[str, list[_Parameter]] = {}
    for index, name in zip(indices, names, strict=True):
        if name is not None:
            one = _Parameter(index, state_dict["state"][index], errors.get(index))
            found.setdefault(name, []).append(one)
    return found


def _specs(params: Any, dimension_numbers: WeightDimensionNumbers) -> list[Any]:
    """The spec of each leaf; by default any matrix may be one."""
    if dimension_numbers is not None:
        return resolve_dimension_numbers(dimension_numbers, params)
    return [LDAdamDimensionNumbers()] * len(jax.tree.leaves(params))


def _is_transposed(
    name: str, torch_shape: tuple[int, ...], here: tuple[int, ...], transposed: bool
) -> bool:
    """Whether a matrix is torch's transposed; equal sides cannot tell."""
    if here not in (torch_shape, torch_shape[::-1]):
        raise ValueError(
            f"{name!r} is a matrix of {here}, torch's weight has shape {torch_shape}."
        )
    return transposed if here[0] == here[1] else here != torch_shape


def _check_floats(state: ScaleByLDAdamState | ScaleByAdamState) -> None:
    if state.mu_scale is not None or state.nu_scale is not None:
        raise ValueError(
            "Moments in int8 cannot be taken over: give mu_dtype and nu_dtype a float "
            "dtype."
        )


def _check_count(name: str, parameters: list[_Parameter], count: int) -> None:
    if len(parameters) != count:
        raise ValueError(
            f"{name!r} has {count} matrices; names has it {len(parameters)} times."
        )


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def _name(path: Any) -> str:
    return "/".join(path_names(path))


def _array(value: Any) -> np.ndarray:
    """A NumPy array of an array or of a tensor; NumPy has no bfloat16."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        return value.numpy()
    return np.asarray(value)
