"""``ldadamw`` and ``ldadam``: LDAdam on matrices, AdamW on the rest.

Choices of ours: weight decay and learning rate follow the partition, once for the
whole tree, so a mask or a schedule sees all parameters. The moments of the AdamW
leaves too are float32 where the parameters are narrower (``optax.adamw`` keeps
them in the parameters' dtype), and they follow ``mu_dtype`` and ``nu_dtype``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldadam_optax._checks import check_ranges
from ldadam_optax._dimension_numbers import WeightDimensionNumbers
from ldadam_optax._routing import route, tell_if_nothing_is_compressed
from ldadam_optax._transform import scale_by_ldadam


def ldadamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 16,
    b1: jax.typing.ArrayLike = 0.908,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    rho: jax.typing.ArrayLike = 0.908,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
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
    """LDAdam on matrices and AdamW on all other leaves, with decoupled weight decay.

    Without ``weight_dimension_numbers``, LDAdam takes each leaf of two axes that are
    both larger than the rank, unless it is an embedding or an output head by its name
    (``embedding``, ``embed_tokens``, ``wte``, ``lm_head`` and their like). With it,
    LDAdam takes the leaves that have a spec and AdamW those with None.

    Args:
      learning_rate: A scalar or a schedule.
      rank: Rank of the subspace, as for :func:`scale_by_ldadam`.
      b1: Decay rate of the first moment, of LDAdam and of AdamW.
      b2: Decay rate of the second moment, of LDAdam and of AdamW.
      eps: Added to the denominator, of LDAdam and of AdamW.
      rho: How far the subspace follows the momentum rather than the gradient.
      weight_decay: Strength of the decoupled weight decay; multiplied by the
        learning rate, as in ``optax.adamw``.
      mask: Leaves that decay: a (prefix) tree of bools, or a callable of the
        parameters that returns one; None for all.
      error_feedback: As for :func:`scale_by_ldadam`, like all that follow.
      recovery_scaling: Add to each update at once what projection lost.
      side: Which axis is compressed.
      subspace: How the basis moves.
      subspace_init: Where the basis starts.
      mu_dtype: Storage of the first moment.
      nu_dtype: Storage of the second moment.
      projector_dtype: Storage of the basis.
      error_dtype: Storage of the error.
      weight_dimension_numbers: Which leaves LDAdam takes, and which of their axes
        form the matrix.

    Returns:
      The optimizer. Its state is that of ``optax.chain`` of ``optax.partition`` with
      the groups ``'ldadam'`` and ``'adamw'``, of the weight decay, and of the
      learning rate.

    Raises:
      TypeError: as :func:`scale_by_ldadam`.
      ValueError: as :func:`scale_by_ldadam`, and if ``weight_decay`` is negative.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> params = {'kernel': jnp.ones((24, 40)), 'bias': jnp.ones(40)}
      >>> loss = lambda p: jnp.sum((jnp.ones(24) @ p['kernel'] + p['bias']) ** 2)
      >>> tx = ldadamw(1e-2, rank=4, weight_decay=0.1)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Robert, Safaryan, Modoranu, Alistarh: LDAdam: Adaptive optimization from
      low-dimensional gradient statistics, ICLR 2025, arXiv:2410.16103.
    """
    check_ranges(weight_decay=weight_decay)
    return _optimizer(
        learning_rate,
        optax.add_decayed_weights(weight_decay, mask),
        rank=rank,
        b1=b1,
        b2=b2,
        eps=eps,
        rho=rho,
        error_feedback=error_feedback,
        recovery_scaling=recovery_scaling,
        side=side,
        subspace=subspace,
        subspace_init=subspace_init,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        projector_dtype=projector_dtype,
        error_dtype=error_dtype,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
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
    """:func:`ldadamw` without weight decay; ``update`` needs no parameters.

    Args and errors are those of :func:`ldadamw`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = ldadam(1e-2, rank=2)
      >>> state = tx.init({'kernel': jnp.ones((4, 6)), 'bias': jnp.ones(6)})
    """
    return _optimizer(
        learning_rate,
        rank=rank,
        b1=b1,
        b2=b2,
        eps=eps,
        rho=rho,
        error_feedback=error_feedback,
        recovery_scaling=recovery_scaling,
        side=side,
        subspace=subspace,
        subspace_init=subspace_init,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        projector_dtype=projector_dtype,
        error_dtype=error_dtype,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def _optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *decay: optax.GradientTransformation,
    weight_dimension_numbers: WeightDimensionNumbers,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Chain the directions of both groups, the weight decay and the learning rate."""
    scale_by_ldadam(**options)  # Bad hyperparameters fail here, in the factory.
    matrices = functools.partial(scale_by_ldadam, **options)
    rest = _scale_by_adam(
        options["b1"],
        options["b2"],
        options["eps"],
        options["mu_dtype"],
        options["nu_dtype"],
    )
    return optax.chain(
        _partition(matrices, rest, weight_dimension_numbers, options["rank"]),
        *decay,
        optax.scale_by_learning_rate(learning_rate),
    )


def _partition(
    matrices: Callable[..., optax.GradientTransformation],
    rest: optax.GradientTransformation,
    weight_dimension_numbers: WeightDimensionNumbers,
    rank: int,
) -> optax.GradientTransformationExtraArgs:
    """``optax.partition`` whose specs are resolved once, on the whole tree."""

    def resolved(params: Any) -> optax.GradientTransformationExtraArgs:
        specs = route(params, weight_dimension_numbers, rank)
        labels = ["adamw" if spec is None else "ldadam" for spec in specs]
        treedef = jax.tree.structure(params)
        ldadam = matrices(weight_dimension_numbers=treedef.unflatten(specs))
        # A callable, as the tree itself may be one (an Equinox module).
        return optax.partition(
            {"ldadam": ldadam, "adamw": rest}, lambda _: treedef.unflatten(labels)
        )

    def init_fn(params):
        if weight_dimension_numbers is None:
            specs = route(params, None, rank)
            tell_if_nothing_is_compressed(params, specs, rank)
        return resolved(params).init(params)

    def update_fn(updates, state, params=None, **extra_args):
        return resolved(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scale_by_adam(b1, b2, eps, mu_dtype, nu_dtype) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` with the arithmetic and the state types of LDAdam."""
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def wide(leaf):
        return jnp.promote_types(leaf.dtype, jnp.float32)

    def stored(state):
        if nu_dtype is None:
            return state
        return state._replace(nu=optax.tree.cast(state.nu, nu_dtype))

    def init_fn(params):
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, wide(x)), params)
        return stored(adam.init(zeros))

    def update_fn(updates, state, params=None):
        targets = updates if params is None else params
        updates = jax.tree.map(lambda g: g.astype(wide(g)), updates)
        directions, state = adam.update(updates, state)
        directions = jax.tree.map(lambda d, p: d.astype(p.dtype), directions, targets)
        return directions, stored(state)

    return optax.GradientTransformation(init_fn, update_fn)
