"""``scale_by_ldadam``: the tree of parameters around the step of one leaf.

Choices of ours, beside those that ``_subspace.py`` and ``_error_feedback.py`` list,
where the published torch code does otherwise:

* Step count and error live in the state, so a restored state is the whole run.
* Side, rank and error are properties of a leaf; nothing leaks from leaf to leaf.
* Arithmetic is float32 (float64 for float64 leaves), whatever the storage.

Trees are flattened each by itself and their leaves zipped, so that None, MaskedNode
and boxes with metadata of their own (``nn.Partitioned``, NNX variables) fit.
"""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldadam_optax._boxes import state_structure
from ldadam_optax._checks import (
    check_choice,
    check_ranges,
    compute_dtype,
    storage_dtype,
)
from ldadam_optax._dimension_numbers import (
    SIDES,
    MatrixView,
    WeightDimensionNumbers,
    check_rank,
    leaf_name,
    matrix_views,
)
from ldadam_optax._error_feedback import FEW_BITS, FLOATS, ErrorBuffer, read_error
from ldadam_optax._order import after
from ldadam_optax._random import seed_of
from ldadam_optax._sharding import lie_like, named_sharding, replicate_beside
from ldadam_optax._step import (
    Hyperparameters,
    LeafPlan,
    LeafState,
    Options,
    init_leaf,
    update_leaf,
)
from ldadam_optax._subspace import SUBSPACE_INITS, SUBSPACES

_LARGE_MATRIX = 256 * 256


class ScaleByLDAdamState(NamedTuple):
    """State of :func:`scale_by_ldadam`; trees have the structure of the parameters.

    Attributes:
      count: Steps taken, int32, shape ``()``.
      mu: First moment in the basis, ``(batch.., r, n)``, ``mu_dtype``.
      nu: Second moment in the basis, ``(batch.., r, n)``, ``nu_dtype``.
      projector: Orthonormal basis, ``(batch.., m, r)``, ``projector_dtype``.
      error: None without error feedback. In the dtype of the arithmetic it holds
        ``e + b1/(1 - b1) U mu`` in the parameter's shape; in bfloat16 or float16 the
        error ``e`` itself; for int8 and int4 the codes of ``e``, int8, with one
        axis padded to blocks of 32 (and halved for int4). Read it with
        :func:`ldadam_error`.
      error_scale: For int8 and int4 a bfloat16 scale for each block of 32; else None.
      residual_norm: With ``recovery_scaling`` the norm of what the last step added
        from outside the basis, float32, ``(batch..,)``; else None.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    projector: optax.Updates
    error: optax.Updates | None
    error_scale: optax.Updates | None = None
    residual_norm: optax.Updates | None = None


def scale_by_ldadam(
    rank: int = 16,
    b1: jax.typing.ArrayLike = 0.908,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    rho: jax.typing.ArrayLike = 0.908,
    *,
    error_feedback: bool = True,
    recovery_scaling: bool = False,
    side: str = "short",
    subspace: str = "power_iteration",
    subspace_init: str = "randomized",
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
    projector_dtype: jax.typing.DTypeLike | None = None,
    error_dtype: jax.typing.DTypeLike | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates by Adam's rule in a low-rank subspace that follows the gradient.

    For a gradient :math:`G_t` of shape (m, n), with what earlier steps left over,
    :math:`A_t = G_t + E_{t-1}`, and the momentum :math:`M_t = U_t \mu_t`,

    .. math::
      B_t &= \rho M_{t-1} / (1 - \beta_1^{t-1}) + (1 - \rho) A_t \\
      U_t &= \operatorname{qr}(B_t B_t^T U_{t-1}), \quad Q_t = U_t^T U_{t-1} \\
      \mu_t &= \beta_1 Q_t \mu_{t-1} + (1 - \beta_1) U_t^T A_t \\
      \nu_t &= \beta_2 \hat\nu_t + (1 - \beta_2) (U_t^T A_t)^2 \\
      E_t &= A_t - (M_t - \beta_1 M_{t-1}) / (1 - \beta_1)

    with :math:`\hat\nu_t` the second moment seen from the new basis, and the update
    is :math:`U_t` times Adam's bias-corrected direction. Like ``scale_by_adam`` it
    has no learning rate and no sign.

    Args:
      rank: Rank of the subspace, clipped to the side that is compressed.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator, > 0.
      rho: How far the subspace follows the momentum rather than the gradient,
        in [0, 1].
      error_feedback: Keep what projection lost and add it to the next gradient.
      recovery_scaling: Without error feedback, add what projection lost to the
        update at once, divided by what Adam divides by within the basis.
      side: Which axis is compressed: ``'short'`` or ``'long'`` (the rows of a square
        matrix), ``'left'`` the rows (reduction axes), ``'right'`` the columns.
      subspace: How the basis moves: ``'power_iteration'``, one warm-started block
        power step; ``'svd'``, exact singular vectors; ``'randomized_svd'``.
      subspace_init: Where it starts: ``'randomized'``, or ``'svd'`` of the first
        gradient, which puts an SVD into the compiled step.
      mu_dtype: Storage of the first moment; None for float32 (float64 for float64
        leaves), as for the three below.
      nu_dtype: Storage of the second moment.
      projector_dtype: Storage of the basis.
      error_dtype: Storage of the error: float32, bfloat16, float16, float64, or
        ``'int8'`` and ``'int4'``, blocks of 32 with a scale each. All narrower than
        float32 but float16 are rounded stochastically.
      weight_dimension_numbers: Which axes form the matrix: None where each leaf has
        two axes; a :class:`LDAdamDimensionNumbers`; a prefix tree of them; or a
        callable of the parameters that returns one.

    Returns:
      A gradient transformation with state :class:`ScaleByLDAdamState`.

    Raises:
      TypeError: if the rank is not a Python int, or from ``init`` if a leaf is not
        of a real floating dtype, or from ``update`` if the state is not one of
        ``init``'s.
      ValueError: if a hyperparameter is out of range, or from ``init`` if a leaf is
        not a matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> tx = optax.chain(scale_by_ldadam(rank=2), optax.scale(-1e-2))
      >>> params = {'kernel': jnp.ones((4, 6))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({'kernel': jnp.ones((4, 6))}, state, params)
      >>> state[0].mu['kernel'].shape, state[0].projector['kernel'].shape
      ((2, 6), (4, 2))

    References:
      Robert, Safaryan, Modoranu, Alistarh: LDAdam: Adaptive optimization from
      low-dimensional gradient statistics, ICLR 2025, arXiv:2410.16103, algorithm 1.
    """
    check_rank(rank)
    check_ranges(b1=b1, b2=b2, eps=eps, rho=rho)
    check_choice("side", side, SIDES)
    options = Options(
        error_feedback=bool(error_feedback),
        recovery_scaling=bool(recovery_scaling),
        subspace=check_choice("subspace", subspace, SUBSPACES),
        subspace_init=check_choice("subspace_init", subspace_init, SUBSPACE_INITS),
        mu_dtype=storage_dtype("mu_dtype", mu_dtype, FLOATS),
        nu_dtype=storage_dtype("nu_dtype", nu_dtype, FLOATS),
        projector_dtype=storage_dtype("projector_dtype", projector_dtype, FLOATS),
        error_dtype=storage_dtype("error_dtype", error_dtype, FLOATS + FEW_BITS),
    )
    if error_feedback and recovery_scaling:
        raise ValueError(
            "recovery_scaling applies at once what error_feedback keeps for later; "
            "got both. Pass error_feedback=False with recovery_scaling=True."
        )

    def named_views(tree: Any) -> list[tuple[str, MatrixView]]:
        views = matrix_views(tree, weight_dimension_numbers, rank, side)
        return list(zip(_names(tree), views, strict=True))

    def init_fn(params: Any) -> Any:
        leaves = jax.tree.leaves(params)
        named, states = named_views(params), []
        for (name, view), leaf in zip(named, leaves, strict=True):
            salt = replicate_beside(_salt(name), leaf)
            states.append(init_leaf(_plan(name, view, leaf), options, salt))
        views = [view for _, view in named]
        treedefs = {
            field: state_structure(params, views, states, field)
            if options.uses(field)
            else jax.tree.structure(None)
            for field in LeafState._fields
        }
        return _join(_count_beside(leaves), states, treedefs)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        error_accumulated: bool = False,
        **extra: Any,
    ) -> tuple[Any, Any]:
        del extra
        step = options._replace(error_accumulated=bool(error_accumulated))
        grads, treedef = jax.tree.flatten(updates)
        targets = grads if params is None else jax.tree.leaves(params)
        states, treedefs = _split(state, _names(updates))
        hyperparameters = Hyperparameters(b1, b2, eps, rho)
        views = named_views(updates)
        results: list[Any] = [None] * len(grads)
        ready = state.count
        # From the last to the first, as backpropagation makes the gradients, and each
        # once the state before it is whole, lest many leaves be half done together.
        for i in reversed(range(len(grads))):
            name, view = views[i]
            _check_shape(name, view, states[i])
            update, new_state = update_leaf(
                _plan(name, view, targets[i]),
                step,
                _salt(name),
                hyperparameters,
                state.count,
                after(ready, grads[i]),
                states[i],
            )
            results[i] = (lie_like(update, targets[i], state.count < 0), new_state)
            ready = new_state
        count = optax.safe_increment(state.count)
        return (
            treedef.unflatten([update for update, _ in results]),
            _join(count, [new for _, new in results], treedefs),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ldadam_error(
    state: ScaleByLDAdamState,
    params: Any = None,
    *,
    side: str = "short",
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> Any:
    """Return the paper's error buffer ``e``, whatever form the state keeps it in.

    As ``U^T e = 0``, it is ``(I - U U^T)`` times what is stored.

    Args:
      state: State of :func:`scale_by_ldadam` with error feedback.
      params: Parameters, or anything of their shapes; needed for int8 and int4.
      side: As given to the optimizer.
      weight_dimension_numbers: As given to the optimizer.

    Returns:
      Tree of errors in the parameters' shapes, float32 or float64.

    Raises:
      ValueError: if the state has no error buffer, or has it as int8 or int4 codes
        and ``params`` is None.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_ldadam(rank=1)
      >>> state = tx.init(jnp.ones((2, 3)))
      >>> _, state = tx.update(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), state)
      >>> ldadam_error(state).shape
      (2, 3)
    """
    if state.error is None:
        raise ValueError("The state has no error buffer: error_feedback was False.")
    if state.error_scale is not None and params is None:
        raise ValueError(
            "Codes of int8 or int4 do not tell the parameters' shapes: pass params."
        )
    shapes = state.error if params is None else params
    views = matrix_views(shapes, weight_dimension_numbers, 1, side)
    names = _names(shapes)
    states, treedefs = _split(state, names)
    errors = [
        read_error(
            dataclasses.replace(view, rank=leaf.projector.shape[-1]),
            ErrorBuffer(leaf.error, leaf.error_scale),
            leaf.projector,
            seed_of(state.count - 1, _salt(name)),
        )
        for name, view, leaf in zip(names, views, states, strict=True)
    ]
    return treedefs["error"].unflatten(errors)


def _plan(name: str, view: MatrixView, leaf: Any) -> LeafPlan:
    """Everything static about a leaf: a parameter, a gradient or an abstract value."""
    sharding = named_sharding(leaf)
    return LeafPlan(
        view,
        compute_dtype(name, leaf),
        jnp.dtype(leaf.dtype).name,
        sharding,
        _in_turn(view, sharding),
    )


def _in_turn(view: MatrixView, sharding: jax.sharding.NamedSharding | None) -> bool:
    """Whether a stack is better updated one matrix after another.

    A large matrix keeps a device busy by itself; temporaries are those of one, and a
    TPU compiles a plain product many times faster than a batched one. A stack that is
    split over devices, or that may be, is not cut: each slice would be gathered.
    """
    large = view.m * view.n >= _LARGE_MATRIX
    if sharding is None:
        whole = jax.device_count() == 1
    else:
        whole = next(iter(sharding.spec), None) is None
    return 0 in view.batch_axes and large and whole


def _count_beside(leaves: list[Any]) -> jax.Array:
    """Zero, on the mesh of the leaves, so that no step changes its type."""
    on_mesh = [leaf for leaf in leaves if named_sharding(leaf) is not None]
    count = jnp.zeros([], jnp.int32)
    return replicate_beside(count, on_mesh[0]) if on_mesh else count


def _names(tree: Any) -> list[str]:
    return [leaf_name(path) for path, _ in jax.tree.leaves_with_path(tree)]


def _salt(name: str) -> np.uint32:
    """A number that tells leaves apart, the same under any mask."""
    return np.uint32(zlib.crc32(name.encode()))


def _split(
    state: ScaleByLDAdamState, names: list[str]
) -> tuple[list[LeafState], dict[str, Any]]:
    """Split the state into one for each leaf, with the structure of each field."""
    if not isinstance(state, ScaleByLDAdamState):
        raise TypeError(
            "update needs the ScaleByLDAdamState that init made, got "
            f"{type(state).__name__}."
        )
    if _names(state.mu) != names:
        raise ValueError(
            f"The state has the leaves {_names(state.mu)}, the updates {names}: pass "
            "the state that init made for these parameters."
        )
    columns, treedefs = [], {}
    for field in LeafState._fields:
        leaves, treedefs[field] = jax.tree.flatten(getattr(state, field))
        absent = getattr(state, field) is None
        columns.append([None] * len(names) if absent else leaves)
    return [LeafState(*row) for row in zip(*columns, strict=True)], treedefs


def _join(
    count: jax.typing.ArrayLike, states: list[LeafState], treedefs: dict[str, Any]
) -> ScaleByLDAdamState:
    """Undo :func:`_split`."""
    columns = {
        field: [value for s in states if (value := getattr(s, field)) is not None]
        for field in LeafState._fields
    }
    return ScaleByLDAdamState(
        jnp.asarray(count),
        **{field: treedefs[field].unflatten(columns[field]) for field in columns},
    )


def _check_shape(name: str, view: MatrixView, state: LeafState) -> None:
    if state.mu.shape != view.coords_shape:
        raise ValueError(
            f"{name} has shape {view.shape}, for which mu has shape "
            f"{view.coords_shape}; the state's has {state.mu.shape}: pass the state "
            "that init made for these parameters and options."
        )
