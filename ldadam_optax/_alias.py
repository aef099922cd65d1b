"""``ldadamw`` and ``ldadam``: LDAdam on matrices, AdamW on the rest.

Choice of ours: weight decay and learning rate follow the partition, once for the whole
tree, so a mask or a schedule sees all parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from ldadam_optax._adam import scale_by_adam
from ldadam_optax._chain import Link, chain, check_leaves
from ldadam_optax._checks import check_array, check_bool, check_schedules
from ldadam_optax._dimension_numbers import WeightDimensionNumbers, leaf_name
from ldadam_optax._options import checked_options
from ldadam_optax._routing import checked_mask, route, tell_if_nothing_is_compressed
from ldadam_optax._transform import scale_by_ldadam
from ldadam_optax._weights import round_weights_stochastically


def ldadamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float = 16,
    b1: jax.typing.ArrayLike = 0.908,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    rho: jax.typing.ArrayLike = 0.908,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
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
    stochastic_rounding: bool = False,
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
      residual: What becomes of what projection lost, as for :func:`scale_by_ldadam`,
        like all that follow.
      side: Which axis is compressed.
      subspace: How the basis moves.
      subspace_init: Where the basis starts.
      subspace_interval: Steps from one move of a basis to the next.
      precision: Precision of the products of full size.
      factorizations: Leaves together or in turn.
      mu_dtype: Storage of the first moment.
      nu_dtype: Storage of the second moment.
      projector_dtype: Storage of the basis.
      error_dtype: Storage of the error.
      stochastic_rounding: Round bfloat16 weights stochastically, by
        :func:`round_weights_stochastically` at the end of the chain; their updates
        are float32 then.
      weight_dimension_numbers: Which leaves LDAdam takes, and which of their axes
        form the matrix.

    Returns:
      The optimizer. Its state is that of ``optax.chain`` of ``optax.partition`` with
      the groups ``'ldadam'`` and ``'adamw'``, of the weight decay, and of the
      learning rate.

    Raises:
      TypeError: as :func:`scale_by_ldadam`; if learning rate or decay is no number and
        no schedule; from ``init`` if the mask is no tree of bools; or from ``update``
        if the state is that of another optimizer.
      ValueError: as :func:`scale_by_ldadam`; if ``weight_decay`` is negative; from
        ``init`` if the mask does not fit the parameters; or from ``update`` if the
        state, or the parameters, do not fit the updates.

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
    check_schedules(weight_decay=weight_decay)
    return _optimizer(
        learning_rate,
        _weight_decay(weight_decay, mask),
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
        stochastic_rounding=stochastic_rounding,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
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
    stochastic_rounding: bool = False,
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
        stochastic_rounding=stochastic_rounding,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def _weight_decay(weight_decay: optax.ScalarOrSchedule, mask: Any) -> Link:
    scheduled, masked = callable(weight_decay), mask is not None
    return Link(
        "weight_decay",
        optax.add_decayed_weights(weight_decay, checked_mask(mask) if masked else None),
        ("inner_state",) * masked + ("count",) * scheduled,
    )


def _optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *decay: Link,
    weight_dimension_numbers: WeightDimensionNumbers,
    stochastic_rounding: bool,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Chain the directions of both groups, the weight decay and the learning rate."""
    checked = checked_options(**options)  # Bad ones fail here, in the factory.
    if learning_rate is not None:  # which is optax's word for no scaling
        check_schedules(learning_rate=learning_rate)
    check_bool("stochastic_rounding", stochastic_rounding)
    matrices = functools.partial(scale_by_ldadam, **options)
    rest = scale_by_adam(
        options["b1"],
        options["b2"],
        options["eps"],
        checked.mu_dtype,
        checked.nu_dtype,
        checked.factorizations,
    )
    partition = _partition(matrices, rest, weight_dimension_numbers, options["rank"])
    rate = optax.scale_by_learning_rate(learning_rate)
    rounding = Link("stochastic_rounding", round_weights_stochastically(), ("count",))
    return chain(
        Link("matrices and other leaves", partition, ("inner_states",)),
        *decay,
        Link("learning_rate", rate, ("count",) * callable(learning_rate)),
        *([rounding] if stochastic_rounding else []),
    )


def _partition(
    matrices: Callable[..., optax.GradientTransformation],
    rest: optax.GradientTransformation,
    weight_dimension_numbers: WeightDimensionNumbers,
    rank: int | float,
) -> optax.GradientTransformationExtraArgs:
    """``optax.partition`` whose specs are resolved once, on the whole tree."""

    def resolved(params: Any) -> optax.GradientTransformationExtraArgs:
        for path, leaf in jax.tree.leaves_with_path(params):
            check_array(leaf_name(path), leaf)
        specs = route(params, weight_dimension_numbers, rank)
        labels = ["adamw" if spec is None else "ldadam" for spec in specs]
        treedef = jax.tree.structure(params)
        ldadam = matrices(weight_dimension_numbers=treedef.unflatten(specs))
        # A callable, as the tree itself may be one (an Equinox module).
        return optax.partition(
            {"ldadam": ldadam, "adamw": rest}, lambda _: treedef.unflatten(labels)
        )

    def init_fn(params):
        tx = resolved(params)
        if weight_dimension_numbers is None:
            tell_if_nothing_is_compressed(params, route(params, None, rank), rank)
        return tx.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        check_leaves(updates, state, params)
        return resolved(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
