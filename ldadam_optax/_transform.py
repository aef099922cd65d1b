"""``scale_by_ldadam``: the tree of parameters around the step of one leaf.

Choices of ours, beside those that ``_subspace.py`` and ``_residual.py`` list, where the
published torch code does otherwise:

* Step count and error live in the state, so a restored state is the whole run.
* Side, rank and error are properties of a leaf; nothing leaks from leaf to leaf.
* Arithmetic is float32 (float64 for float64 leaves), whatever the storage.

Trees are flattened each by itself and their leaves zipped, so that None, MaskedNode
and boxes with metadata of their own (``nn.Partitioned``, NNX variables) fit.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldadam_optax._boxes import state_structure
from ldadam_optax._checks import compute_dtype
from ldadam_optax._dimension_numbers import (
    MatrixView,
    WeightDimensionNumbers,
    matrix_views,
)
from ldadam_optax._fields import (
    LeafState,
    ScaleByLDAdamState,
    form_of,
    stored_fields,
    used_fields,
)
from ldadam_optax._options import Options, checked_options
from ldadam_optax._random import salt_of
from ldadam_optax._residual import RESIDUALS
from ldadam_optax._scalars import Hyperparameters
from ldadam_optax._schedule import LeafPlan, is_large_stack, update_leaves
from ldadam_optax._sharding import (
    fit,
    leaf_specs,
    named_sharding,
    on_mesh,
    replicate_beside,
    shard_like,
)
from ldadam_optax._state import (
    check_params,
    check_state,
    join_state,
    names_of,
    split_state,
)
from ldadam_optax._step import Leaf
from ldadam_optax._subspace import SUBSPACES
from ldadam_optax._sums import check_sums


def scale_by_ldadam(
    rank: int | float = 16,
    b1: jax.typing.ArrayLike = 0.908,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    rho: jax.typing.ArrayLike = 0.908,
    *,
    residual: str = "error_feedback",
    side: str = "short",
    subspace: str = "power_iteration",
    subspace_init: str = "randomized",
    subspace_interval: int | None = None,
    precision: str | None = None,
    factorizations: str | None = None,
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
      rank: Rank of the subspace, clipped to the side that is compressed; a float in
        (0, 1) is that fraction of the side, rounded to a multiple of 8 where the side
        allows it.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the denominator, > 0.
      rho: How far the subspace follows the momentum rather than the gradient,
        in [0, 1].
      residual: What becomes of what projection lost: ``'error_feedback'`` keeps it and
        adds it to the next gradient; ``'recovery'`` adds it to the update at once,
        divided by what Adam divides by within the basis, and keeps one number for each
        matrix; ``'normalized'`` does the same with the residual's columns scaled to
        one size, and keeps nothing; ``'none'`` drops it.
      side: Which axis is compressed: ``'short'`` or ``'long'`` (the rows of a square
        matrix), ``'left'`` the rows (reduction axes), ``'right'`` the columns.
      subspace: How the basis moves: ``'power_iteration'``, one warm-started block
        power step; ``'svd'``, exact singular vectors; ``'randomized_svd'``.
      subspace_init: Where it starts: ``'randomized'``, or ``'svd'`` of the first
        gradient, which puts an SVD into the compiled step.
      subspace_interval: Steps from one move of a basis to the next; None for every
        step. Leaves take turns, so that each step costs the same; in the first step
        all move.
      precision: Precision of the products of full size: None for the backend's own
        (bfloat16 on a TPU, TF32 on a GPU, float32 on a CPU), ``'high'``,
        ``'highest'`` for float32 everywhere, or ``'bfloat16'`` to round their operands
        on every backend. Gram matrices, factors and changes of basis are float32.
      factorizations: ``'together'`` factorises the Gram matrices of all leaves of one
        rank in one batched call; ``'in_turn'`` updates one leaf after another, with
        the temporaries of one. None takes leaves in turn where jax's default backend
        is a TPU, and together elsewhere.
      mu_dtype: Storage of the first moment: float32 (float64 for float64 leaves) for
        None, float64, bfloat16, float16, or ``'int8'``, in blocks of 32 with a scale
        each, companded.
      nu_dtype: Storage of the second moment, likewise; its square root in int8.
      projector_dtype: Storage of the basis: a float dtype, None for float32.
      error_dtype: Storage of the error: None or float32, bfloat16, float16, float64, or
        ``'int8'`` and ``'int4'``, blocks of 32 with a scale each. All narrower than
        float32 but float16 are rounded stochastically.
      weight_dimension_numbers: Which axes form the matrix: None where each leaf has
        two axes; a :class:`LDAdamDimensionNumbers`; a prefix tree of them; or a
        callable of the parameters that returns one.

    Returns:
      A gradient transformation with state :class:`ScaleByLDAdamState`.

    Raises:
      TypeError: if the rank is not a Python int or another option no number, or from
        ``init`` if a leaf is not of a real floating dtype, or from ``update`` if the
        state is not one of ``init``'s.
      ValueError: if a hyperparameter is out of range, or from ``init`` if a leaf is
        not a matrix, or from ``update`` if state or parameters are not those of the
        updates.

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
    options = checked_options(
        rank=rank,
        b1=b1,
        b2=b2,
        eps=eps,
        rho=rho,
        residual=residual,
        side=side,
        subspace=subspace,
        subspace_init=subspace_init,
        subspace_interval=subspace_interval,
        precision=precision,
        factorizations=factorizations,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        projector_dtype=projector_dtype,
        error_dtype=error_dtype,
    )
    hyperparameters = Hyperparameters(b1, b2, eps, rho)

    def views_of(tree: Any) -> list[MatrixView]:
        return matrix_views(tree, weight_dimension_numbers, rank, side)

    def init_fn(params: Any) -> Any:
        leaves, names = jax.tree.leaves(params), names_of(params)
        views = views_of(params)
        dtypes = [compute_dtype(*pair) for pair in zip(names, leaves, strict=True)]
        states = [
            _init_leaf(options, *parts)
            for parts in zip(names, views, dtypes, leaves, strict=True)
        ]
        structures = {
            field.name: state_structure(params, views, states, field.name)
            for field in used_fields(options)
        }
        common = {
            "count": jnp.zeros([], jnp.int32),
            "c": jnp.zeros([], float),
            "form": jnp.zeros(form_of(views, options, dtypes), jnp.int8),
        }
        return join_state(_beside(common, leaves), states, structures)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        error_accumulated: bool = False,
        **extra: Any,
    ) -> tuple[Any, Any]:
        del extra
        grads, treedef = jax.tree.flatten(updates)
        check_sums(grads, error_accumulated)
        if params is not None:
            check_params(updates, params)
        targets = grads if params is None else jax.tree.leaves(params)
        names, views = names_of(updates), views_of(updates)
        states, structures = split_state(state, names)
        plans = [
            _plan(turn, *parts, error_accumulated)
            for turn, parts in enumerate(zip(names, views, targets, strict=True))
        ]
        check_state(state, states, names, [plan.leaf for plan in plans], options)
        new_updates, new_states = _update_on_meshes(
            plans, options, hyperparameters, state, grads, states, targets
        )
        weight = RESIDUALS[options.residual].momentum_weight
        c = weight(jnp.asarray(b1, state.c.dtype))
        common = {
            "count": optax.safe_increment(state.count),
            "c": jnp.broadcast_to(c, state.c.shape),
            "form": state.form,
        }
        return treedef.unflatten(new_updates), join_state(
            _beside(common, targets), new_states, structures
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _plan(
    turn: int, name: str, view: MatrixView, target: Any, accumulated: bool
) -> LeafPlan:
    """Everything static about a leaf, whose update goes to ``target``."""
    update_dtype = jnp.dtype(target.dtype).name
    dtype = compute_dtype(name, target)
    leaf = Leaf(view, dtype, update_dtype, bool(accumulated), _placement(turn, target))
    sliced = is_large_stack(view, _first_axis_is_whole(target))
    return LeafPlan(leaf, salt_of(name), turn, sliced)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _random_start(
    options: Options,
    view: MatrixView,
    dtype: str,
    sharding: jax.sharding.NamedSharding | None,
    salt: jax.Array,
) -> LeafState:
    """Zeros in every field but the basis, which starts at random."""

    def init(salt: jax.Array) -> LeafState:
        key = jax.random.fold_in(jax.random.key(0), salt)
        rule = SUBSPACES[options.subspace]
        basis = rule.encode(
            rule.start(view, key, dtype), options.projector_dtype or dtype
        )
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), stored_fields(view, options, dtype)
        )
        return zeros._replace(projector=basis)

    if sharding is None:
        return init(salt)
    specs = _specs(view, options, dtype, sharding)
    return on_mesh(init, sharding, specs)(salt)


def _init_leaf(
    options: Options, name: str, view: MatrixView, dtype: str, leaf: Any
) -> LeafState:
    salt = replicate_beside(salt_of(name), leaf)
    return _random_start(options, view, dtype, named_sharding(leaf), salt)


def _update_on_meshes(
    plans: Sequence[LeafPlan],
    options: Options,
    hyperparameters: Hyperparameters,
    state: ScaleByLDAdamState,
    grads: Sequence[Any],
    states: Sequence[LeafState],
    targets: Sequence[Any],
) -> tuple[list[Any], list[Any]]:
    """One compiled step for all leaves of one mesh; most models have one."""
    shardings = [named_sharding(target) for target in targets]
    groups: dict[Any, list[int]] = {}
    for i, sharding in enumerate(shardings):
        groups.setdefault(sharding and sharding.mesh, []).append(i)
    new_updates: list[Any] = [None] * len(plans)
    new_states: list[Any] = [None] * len(plans)
    for members in groups.values():
        pick = lambda values, members=members: [values[i] for i in members]
        updates, changed = _update_group(
            tuple(pick(plans)),
            tuple(pick(shardings)),
            options,
            hyperparameters,
            state.count,
            state.c,
            pick(grads),
            pick(states),
        )
        for i, update, new_state in zip(members, updates, changed, strict=True):
            new_updates[i] = shard_like(update, targets[i], state.count < 0)
            new_states[i] = new_state
    return new_updates, new_states


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _update_group(
    plans: tuple[LeafPlan, ...],
    shardings: tuple[jax.sharding.NamedSharding | None, ...],
    options: Options,
    *values: Any,
) -> tuple[list[jax.Array], list[LeafState]]:
    """:func:`update_leaves` with results sharded as parameters and state are."""
    step = functools.partial(update_leaves, plans, options)
    if shardings[0] is None:
        return step(*values)
    update_specs = [sharding.spec for sharding in shardings if sharding is not None]
    state_specs = [
        _specs(plan.leaf.view, options, plan.leaf.dtype, sharding)
        for plan, sharding in zip(plans, shardings, strict=True)
    ]
    return on_mesh(step, shardings[0], (update_specs, state_specs))(*values)


def _specs(view: MatrixView, options: Options, dtype: str, sharding: Any) -> LeafState:
    """Specs of a leaf's state, each valid for the shape of its field."""
    specs = leaf_specs(view, sharding.spec, sharding.mesh)
    return LeafState(
        **{
            name: None
            if field is None
            else fit(specs[name], field.shape, sharding.mesh)
            for name, field in stored_fields(view, options, dtype)._asdict().items()
        }
    )


def _beside(values: dict[str, Any], leaves: Sequence[Any]) -> dict[str, Any]:
    """The values on the mesh of the leaves, so that no step changes their type."""
    on_a_mesh = [leaf for leaf in leaves if named_sharding(leaf) is not None]
    if not on_a_mesh:
        return values
    return {k: replicate_beside(v, on_a_mesh[0]) for k, v in values.items()}


def _placement(turn: int, leaf: Any) -> Hashable:
    """Equal for leaves of one shape that lie on the same devices in the same way."""
    sharding = named_sharding(leaf)
    if sharding is None:  # what only the compiler knows of may differ
        return None if jax.device_count() == 1 else turn
    return sharding.spec


def _first_axis_is_whole(leaf: Any) -> bool:
    """True where no device holds a part of the leaf's first axis alone."""
    sharding = named_sharding(leaf)
    if sharding is None:
        return jax.device_count() == 1
    return next(iter(sharding.spec), None) is None
