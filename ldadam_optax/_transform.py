"""``scale_by_ldadam``: the tree around the step of one leaf.

Legend, for one matrix seen as ``m x n`` with the axis ``m`` compressed to ``r``
(batch axes in front are left out). A prime marks the value of the step before.

======================  ================  =========  ==============================
mathematics             code              shape      meaning
======================  ================  =========  ==============================
g                       ``grad``          (m, n)     gradient of this step
e                       ``error``         (m, n)     what earlier steps left over
a = g + e'                                (m, n)     corrected gradient
c                       ``momentum_-      ()         ``b1 / (1 - b1)``
                        weight``
a + c U' mu'            ``signal``        (m, n)     all that a step reads in full
U, U'                   ``basis``,        (m, r)     orthonormal basis; state field
                        ``prev_basis``               ``projector``
Q = U^T U'              ``transfer``      (r, r)     change of basis
mu, nu                  ``mu``, ``nu``    (r, n)     moments in the basis
b1 b2 rho eps t         ``count``: t - 1  ()         decay rates, mix, epsilon, step
======================  ================  =========  ==============================

Choices of ours, beside those that ``_subspace.py`` and ``_error_feedback.py`` list:

* Step count and error live in the state, so a restored state is the whole run.
* Side, rank and error are properties of a leaf; nothing leaks from leaf to leaf.
* Arithmetic is float32 (float64 for float64 leaves), whatever the storage.
"""

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldadam_optax._dimension_numbers import (
    SIDES,
    MatrixView,
    WeightDimensionNumbers,
    check_rank,
    leaf_name,
    matrix_views,
)
from ldadam_optax._error_feedback import (
    FEW_BITS,
    FLOATS,
    ErrorBuffer,
    init_error,
    load_error,
    momentum_weight,
    read_error,
    store_error,
)
from ldadam_optax._moments import (
    Decay,
    Moments,
    adam_direction,
    carry_moments,
    update_moments,
)
from ldadam_optax._orthonormal import HIGHEST
from ldadam_optax._recovery import recover_residual
from ldadam_optax._subspace import (
    SUBSPACE_INITS,
    SUBSPACES,
    Tracked,
    change_of_basis,
    next_basis,
    random_basis,
)


class ScaleByLDAdamState(NamedTuple):
    """State of :func:`scale_by_ldadam`; trees have the structure of the parameters.

    Attributes:
      count: Steps taken, int32, shape ``()``.
      mu: First moment in the basis, ``(batch.., r, n)``, ``mu_dtype``.
      nu: Second moment in the basis, ``(batch.., r, n)``, ``nu_dtype``.
      projector: Orthonormal basis, ``(batch.., m, r)``, ``projector_dtype``.
      error: None without error feedback. In the dtype of the arithmetic it holds
        ``e + b1/(1 - b1) U mu`` in the parameter's shape; in bfloat16 or float16 the
        error ``e`` itself; for int8 and int4 the codes of ``e``, int8, with the
        last axis padded to blocks of 32 (and halved for int4). Read it with
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
        update at once, scaled as Adam scales the rest (Fira).
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
    _check_hyperparameters(b1=b1, b2=b2, eps=eps, rho=rho)
    _check_choice("side", side, SIDES)
    options = _Options(
        error_feedback=bool(error_feedback),
        recovery_scaling=bool(recovery_scaling),
        subspace=_check_choice("subspace", subspace, SUBSPACES),
        subspace_init=_check_choice("subspace_init", subspace_init, SUBSPACE_INITS),
        mu_dtype=_storage_name("mu_dtype", mu_dtype, FLOATS),
        nu_dtype=_storage_name("nu_dtype", nu_dtype, FLOATS),
        projector_dtype=_storage_name("projector_dtype", projector_dtype, FLOATS),
        error_dtype=_storage_name("error_dtype", error_dtype, FLOATS + FEW_BITS),
    )
    if error_feedback and recovery_scaling:
        raise ValueError(
            "recovery_scaling applies at once what error_feedback keeps for later; "
            "got both. Pass error_feedback=False with recovery_scaling=True."
        )

    def plan(params: Any) -> list[_Leaf]:
        views = matrix_views(params, weight_dimension_numbers, rank, side)
        paths = [path for path, _ in jax.tree.leaves_with_path(params)]
        return [_Leaf(leaf_name(p), v) for p, v in zip(paths, views, strict=True)]

    def init_fn(params: Any) -> ScaleByLDAdamState:
        params, treedef = jax.tree.flatten(params)
        states = [
            _init_leaf(leaf, options, _compute_dtype(leaf.name, param))
            for leaf, param in zip(plan(treedef.unflatten(params)), params, strict=True)
        ]
        trees = _join_states(states, _field_structures(treedef, options))
        return ScaleByLDAdamState(jnp.zeros([], jnp.int32), **trees)

    def update_fn(updates: Any, state: ScaleByLDAdamState, params: Any = None, **extra):
        del extra
        _check_state(state)
        leaves = plan(updates)
        grads, treedef = jax.tree.flatten(updates)
        targets = grads if params is None else jax.tree.leaves(params)
        states, treedefs = _split_state(state, len(leaves))
        results = []
        for leaf, grad, target, prev in zip(
            leaves, grads, targets, states, strict=True
        ):
            _check_shapes(leaf, prev)
            results.append(
                _update_leaf(
                    leaf.view,
                    options,
                    _compute_dtype(leaf.name, target),
                    jnp.dtype(target.dtype).name,
                    np.uint32(leaf.salt),
                    _Hyperparameters(b1, b2, eps, rho),
                    state.count,
                    grad,
                    prev,
                )
            )
        trees = _join_states([new for _, new in results], treedefs)
        count = optax.safe_increment(state.count)
        return (
            treedef.unflatten([update for update, _ in results]),
            ScaleByLDAdamState(count, **trees),
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
      params: Parameters, or anything of their shapes; needed only where int8 or int4
        codes pad the last axis.
      side: As given to the optimizer.
      weight_dimension_numbers: As given to the optimizer.

    Returns:
      Tree of errors in the parameters' shapes, float32 or float64.

    Raises:
      ValueError: if the state has no error buffer.

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
    shapes = state.error if params is None else params
    views = matrix_views(shapes, weight_dimension_numbers, 1, side)
    states, treedefs = _split_state(state, len(views))
    errors = [
        read_error(
            dataclasses.replace(view, rank=leaf.projector.shape[-1]),
            ErrorBuffer(leaf.error, leaf.error_scale),
            leaf.projector,
        )
        for view, leaf in zip(views, states, strict=True)
    ]
    return treedefs["error"].unflatten(errors)


class _Options(NamedTuple):
    """What is static for all leaves."""

    error_feedback: bool
    recovery_scaling: bool
    subspace: str
    subspace_init: str
    mu_dtype: str | None
    nu_dtype: str | None
    projector_dtype: str | None
    error_dtype: str | None


class _Hyperparameters(NamedTuple):
    """What may be traced, each a scalar."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    rho: jax.typing.ArrayLike


class _Leaf(NamedTuple):
    """A leaf's quoted path and its view as a matrix."""

    name: str
    view: MatrixView

    @property
    def salt(self) -> int:
        """A number that tells leaves apart, the same under any mask."""
        return zlib.crc32(self.name.encode())


class _LeafState(NamedTuple):
    """The fields of :class:`ScaleByLDAdamState` for one leaf."""

    mu: jax.Array
    nu: jax.Array
    projector: jax.Array
    error: jax.Array | None
    error_scale: jax.Array | None
    residual_norm: jax.Array | None


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _update_leaf(
    view: MatrixView,
    options: _Options,
    dtype: str,
    update_dtype: str,
    salt: jax.Array,
    hyperparameters: _Hyperparameters,
    count: jax.Array,
    grad: jax.Array,
    state: _LeafState,
) -> tuple[jax.Array, _LeafState]:
    """Take one step on one leaf: ``(update, new state)``."""
    b1, b2, eps, rho = (jnp.asarray(value, dtype) for value in hyperparameters)
    decay = Decay.at(count, b1, b2)
    owed = momentum_weight(b1, options.error_feedback)
    prev = Moments(state.mu.astype(dtype), state.nu.astype(dtype))
    prev_basis = state.projector.astype(dtype)
    grad = grad.astype(dtype)

    signal = grad
    if options.error_feedback:
        signal = grad + load_error(
            view,
            ErrorBuffer(state.error, state.error_scale),
            momentum_weight=owed,
            basis_mr=prev_basis,
            mu_rn=prev.mu,
        )

    # B = rho M'/(1 - b1^(t-1)) + (1 - rho) a; a alone at t = 1.
    alpha = jnp.where(count == 0, 1, 1 - rho)
    gamma = jnp.where(count == 0, 0, rho / decay.prev_bias1) - alpha * owed
    basis = next_basis(
        view,
        Tracked(signal, alpha, gamma, prev_basis, prev.mu),
        count,
        subspace=options.subspace,
        subspace_init=options.subspace_init,
    )

    carried = carry_moments(prev, change_of_basis(basis, prev_basis), decay)
    coords = view.project(signal, basis, precision=HIGHEST)
    grad_rn = coords - owed * carried.mu
    moments = update_moments(carried, grad_rn, decay)
    direction = adam_direction(moments, decay, eps)

    buffer, norm = ErrorBuffer(None), None
    if options.error_feedback:
        buffer = store_error(
            view,
            signal,
            options.error_dtype or dtype,
            basis_mr=basis,
            coords_rn=coords,
            mu_rn=moments.mu,
            count=count,
            salt=salt,
        )
    if options.recovery_scaling:
        recovery = recover_residual(view, grad, grad_rn, direction, state.residual_norm)
        update = view.lift(basis, recovery.coords_rn)
        update = update + view.columns(recovery.weight_n) * grad
        norm = recovery.norm
    else:
        update = view.lift(basis, direction)
    new_state = _LeafState(
        moments.mu.astype(state.mu.dtype),
        moments.nu.astype(state.nu.dtype),
        basis.astype(state.projector.dtype),
        buffer.error,
        buffer.scale,
        norm,
    )
    return update.astype(update_dtype), new_state


def _init_leaf(leaf: _Leaf, options: _Options, dtype: str) -> _LeafState:
    """Zero moments, a random basis and nothing left over."""
    view = leaf.view
    key = jax.random.fold_in(jax.random.key(0), leaf.salt)
    buffer = ErrorBuffer(None)
    if options.error_feedback:
        buffer = init_error(view, options.error_dtype or dtype)
    norm = jnp.zeros(view.batch_shape, dtype) if options.recovery_scaling else None
    return _LeafState(
        jnp.zeros(view.coords_shape, options.mu_dtype or dtype),
        jnp.zeros(view.coords_shape, options.nu_dtype or dtype),
        random_basis(view, key, dtype).astype(options.projector_dtype or dtype),
        buffer.error,
        buffer.scale,
        norm,
    )


def _split_state(
    state: ScaleByLDAdamState, number: int
) -> tuple[list[_LeafState], dict[str, Any]]:
    """Split the state into one for each leaf, with the structure of each field."""
    columns, treedefs = [], {}
    for field in _LeafState._fields:
        leaves, treedefs[field] = jax.tree.flatten(getattr(state, field))
        if getattr(state, field) is None:
            leaves = [None] * number
        if len(leaves) != number:
            raise ValueError(
                f"The state's {field} has {len(leaves)} leaves and the updates have "
                f"{number}: pass the state that init made for these parameters."
            )
        columns.append(leaves)
    return [_LeafState(*row) for row in zip(*columns, strict=True)], treedefs


def _join_states(states: list[_LeafState], treedefs: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`_split_state`: the fields of :class:`ScaleByLDAdamState`."""
    present = {
        field: [
            leaf for leaf in (getattr(s, field) for s in states) if leaf is not None
        ]
        for field in _LeafState._fields
    }
    return {field: treedefs[field].unflatten(present[field]) for field in present}


def _field_structures(treedef: Any, options: _Options) -> dict[str, Any]:
    """Structure of each field of the state; None where the options do not use it."""
    used = {
        "error": options.error_feedback,
        "error_scale": options.error_feedback and options.error_dtype in FEW_BITS,
        "residual_norm": options.recovery_scaling,
    }
    absent = jax.tree.structure(None)
    return {
        field: treedef if used.get(field, True) else absent
        for field in _LeafState._fields
    }


def _check_hyperparameters(**values: Any) -> None:
    """Raise where a number is out of range; traced and array values pass."""
    rules = {
        "b1": ("in [0, 1)", lambda x: 0 <= x < 1),
        "b2": ("in [0, 1)", lambda x: 0 <= x < 1),
        "eps": ("> 0", lambda x: x > 0),
        "rho": ("in [0, 1]", lambda x: 0 <= x <= 1),
    }
    for name, value in values.items():
        rule, holds = rules[name]
        if isinstance(value, jax.core.Tracer):
            continue
        if not holds(value):
            raise ValueError(f"{name} must be {rule}, got {name}={value}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {name}={value!r}.")
    return value


def _storage_name(
    name: str, dtype: jax.typing.DTypeLike | None, choices: tuple[str, ...]
) -> str | None:
    """Name of a storage dtype, checked; None stays None."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype).name
    except TypeError:
        found = dtype
    if found not in choices:
        raise ValueError(f"{name} must be None or one of {choices}, got {dtype!r}.")
    return str(found)


def _compute_dtype(name: str, leaf: Any) -> str:
    """float64 for a float64 leaf, float32 for any other real floating leaf."""
    dtype = jnp.dtype(leaf.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} has dtype {dtype.name}; LDAdam updates real floating leaves. "
            "Keep it away with optax.masked, or train its real and imaginary parts "
            "with optax.contrib.split_real_and_imaginary."
        )
    return "float64" if dtype == np.float64 else "float32"


def _check_state(state: Any) -> None:
    if not isinstance(state, ScaleByLDAdamState):
        raise TypeError(
            "update needs the ScaleByLDAdamState that init made, got "
            f"{type(state).__name__}."
        )


def _check_shapes(leaf: _Leaf, state: _LeafState) -> None:
    if state.mu.shape != leaf.view.coords_shape:
        raise ValueError(
            f"{leaf.name} has shape {leaf.view.shape}, for which mu has shape "
            f"{leaf.view.coords_shape}; the state's has {state.mu.shape}: pass the "
            "state that init made for these parameters and options."
        )
