"""The step of one leaf, as a list of named steps, and the state it starts from.

Legend, for one matrix seen as ``m x n`` with the axis ``m`` compressed to ``r``
(batch axes in front are left out). A prime marks the value of the step before.

==================  ====================  ==========  ==============================
mathematics         code                  shape       meaning
==================  ====================  ==========  ==============================
g                   ``grad``              the leaf's  gradient of this step
e                   ``error``             the leaf's  what earlier steps left over
a = g + e'                                            corrected gradient
c                   ``owed``              ()          ``b1 / (1 - b1)``
a + c U' mu'        ``signal``            the leaf's  all that a step reads in full
U, U'               ``basis``, ``prev_-   (m, r)      orthonormal basis; state field
                    basis``                           ``projector``
Q = U^T U'                                (r, r)      change of basis
U^T signal          ``coords``            (r, n)      the signal in the basis
ghat = U^T a        ``grad_rn``           (r, n)      corrected gradient in the basis
mu, nu              ``mu``, ``nu``        (r, n)      moments in the basis
t - 1               ``count``             ()          steps taken before this one
==================  ====================  ==========  ==============================

Five products are of full size: two in ``next_basis``, ``coords``, one in
``store_error``, and the update. The update's is at the backend's default precision,
as nothing that is kept depends on it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._error_feedback import (
    FEW_BITS,
    ErrorBuffer,
    add_error,
    init_error,
    momentum_weight,
    store_error,
)
from ldadam_optax._moments import (
    Decay,
    Moments,
    adam_direction,
    carry_moments,
    update_moments,
)
from ldadam_optax._order import in_one_place, settle
from ldadam_optax._orthonormal import HIGHEST
from ldadam_optax._random import seed_of, seed_within
from ldadam_optax._recovery import recover_residual
from ldadam_optax._sharding import fit, leaf_specs, on_mesh
from ldadam_optax._subspace import Tracked, change_of_basis, next_basis, random_basis


class LeafPlan(NamedTuple):
    """What is static about a leaf, and what one compilation serves.

    Attributes:
      view: The leaf as a matrix.
      dtype: Dtype of the arithmetic, ``'float32'`` or ``'float64'``.
      update_dtype: Dtype of the update.
      sharding: The leaf's sharding, where it is known.
      in_turn: Slices along axis 0, a batch axis, are updated one after another.
    """

    view: MatrixView
    dtype: str
    update_dtype: str
    sharding: jax.sharding.NamedSharding | None
    in_turn: bool = False


class Options(NamedTuple):
    """What is static and the same for all leaves; the factory documents it."""

    error_feedback: bool
    recovery_scaling: bool
    subspace: str
    subspace_init: str
    mu_dtype: str | None
    nu_dtype: str | None
    projector_dtype: str | None
    error_dtype: str | None
    error_accumulated: bool = False  # see ``add_error``

    def uses(self, field: str) -> bool:
        """True if the state has this field."""
        return {
            "error": self.error_feedback,
            "error_scale": self.error_feedback and self.error_dtype in FEW_BITS,
            "residual_norm": self.recovery_scaling,
        }.get(field, True)


class Hyperparameters(NamedTuple):
    """Scalars that may be traced."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    rho: jax.typing.ArrayLike


class Seeds(NamedTuple):
    """Seeds of a leaf's random bits, uint32: of the step before and of this one."""

    prev: jax.Array
    now: jax.Array


class LeafState(NamedTuple):
    """The fields of ``ScaleByLDAdamState`` that each leaf has, for one leaf."""

    mu: jax.Array
    nu: jax.Array
    projector: jax.Array
    error: jax.Array | None
    error_scale: jax.Array | None
    residual_norm: jax.Array | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_leaf(plan: LeafPlan, options: Options, salt: jax.Array) -> LeafState:
    """Zero moments, a random basis and nothing left over, as the leaf is sharded."""

    def init(salt: jax.Array) -> LeafState:
        view, dtype = plan.view, plan.dtype
        key = jax.random.fold_in(jax.random.key(0), salt)
        basis = random_basis(view, key, dtype)
        buffer = init_error(view, options.error_dtype or dtype)
        state = LeafState(
            jnp.zeros(view.coords_shape, options.mu_dtype or dtype),
            jnp.zeros(view.coords_shape, options.nu_dtype or dtype),
            basis.astype(options.projector_dtype or dtype),
            buffer.error,
            buffer.scale,
            jnp.zeros(view.batch_shape, dtype),
        )
        return _used(state, options)

    if plan.sharding is None:
        return init(salt)
    specs = _specs(plan, jax.eval_shape(init, salt))
    return on_mesh(init, plan.sharding, specs)(salt)


@functools.partial(jax.jit, static_argnums=(0, 1))
def update_leaf(
    plan: LeafPlan,
    options: Options,
    salt: jax.Array,
    hyperparameters: Hyperparameters,
    count: jax.Array,
    grad: jax.Array,
    state: LeafState,
) -> tuple[jax.Array, LeafState]:
    """Take one step on one leaf.

    Args:
      plan: What is static about the leaf.
      options: What is static for all leaves.
      salt: A number that tells leaves apart, uint32.
      hyperparameters: Scalars.
      count: Steps taken before this one, int32.
      grad: Gradient, of the leaf's shape.
      state: State of the leaf.

    Returns:
      ``(update, state)``, of the dtypes and shardings of the leaf and its old state.
    """
    step = functools.partial(_steps_in_turn if plan.in_turn else _step, plan, options)
    seeds = Seeds(seed_of(count - 1, salt), seed_of(count, salt))
    if plan.sharding is not None:
        specs = (plan.sharding.spec, _specs(plan, state))
        step = on_mesh(step, plan.sharding, specs)
    return step(hyperparameters, count, seeds, grad, state)


def _steps_in_turn(
    plan: LeafPlan,
    options: Options,
    hyperparameters: Hyperparameters,
    count: jax.Array,
    seeds: Seeds,
    grad: jax.Array,
    state: LeafState,
) -> tuple[jax.Array, LeafState]:
    """:func:`_step` on one after another of the leaf's slices along axis 0.

    Updates take the gradients' place and new state the old one's, so that temporaries
    are those of one slice.
    """
    plan_of_one = plan._replace(view=plan.view.within_axis_0())
    in_place = grad.dtype == plan.update_dtype

    def one(i: jax.Array, carry: tuple[jax.Array, LeafState]):
        def read(stack: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)

        def write(stack: jax.Array, value: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(stack, value, i, 0)

        updates, state = carry
        update, new_state = _step(
            plan_of_one,
            options,
            hyperparameters,
            count,
            Seeds(*(seed_within(seed, i) for seed in seeds)),
            read(updates if in_place else grad),
            jax.tree.map(read, state),
        )
        return write(updates, update), jax.tree.map(write, state, new_state)

    updates = grad if in_place else jnp.zeros(grad.shape, plan.update_dtype)
    return jax.lax.fori_loop(0, grad.shape[0], one, (updates, state))


def _step(
    plan: LeafPlan,
    options: Options,
    hyperparameters: Hyperparameters,
    count: jax.Array,
    seeds: Seeds,
    grad: jax.Array,
    state: LeafState,
) -> tuple[jax.Array, LeafState]:
    view, dtype = plan.view, plan.dtype
    b1, b2, eps, rho = (jnp.asarray(value, dtype) for value in hyperparameters)
    decay = Decay.at(count, b1, b2)
    never = count < 0
    owed = momentum_weight(b1, options.error_feedback)
    prev = Moments(state.mu.astype(dtype), state.nu.astype(dtype))
    prev_basis = state.projector.astype(dtype)
    grad = grad.astype(dtype)

    signal = grad
    if state.error is not None:
        buffer = ErrorBuffer(state.error, state.error_scale)
        signal = add_error(
            view,
            grad,
            buffer,
            accumulated=options.error_accumulated,
            momentum_weight=owed,
            basis_mr=prev_basis,
            mu_rn=prev.mu,
            seed=seeds.prev,
        )

    tracked = _tracked(signal, owed, rho, decay, count, prev_basis, prev.mu)
    basis = next_basis(
        view,
        tracked,
        count,
        seeds.now,
        subspace=options.subspace,
        subspace_init=options.subspace_init,
    )
    basis = in_one_place(basis, prev_basis, never)
    carried = carry_moments(prev, change_of_basis(basis, prev_basis), decay)
    coords = view.project(signal, basis, precision=HIGHEST)
    grad_rn = coords - owed * carried.mu
    moments = update_moments(carried, grad_rn, decay)
    direction = adam_direction(moments, decay, eps)

    buffer, norm = ErrorBuffer(None, None), None
    if options.error_feedback:
        buffer = store_error(
            view,
            signal,
            options.error_dtype or dtype,
            basis_mr=basis,
            coords_rn=coords,
            mu_rn=moments.mu,
            seed=seeds.now,
        )
        buffer, direction = settle(buffer, direction, never)
        update = view.lift(basis, direction)
    elif state.residual_norm is not None:
        square_rn = moments.nu / decay.bias2
        recovery = recover_residual(
            view, grad, grad_rn, direction, square_rn, eps, state.residual_norm
        )
        norm, (lifted, weight) = settle(recovery.norm, recovery[:2], never)
        update = view.lift(basis, lifted) + view.columns(weight) * grad
    else:
        update = view.lift(basis, direction)
    new_state = LeafState(
        moments.mu.astype(state.mu.dtype),
        moments.nu.astype(state.nu.dtype),
        basis.astype(state.projector.dtype),
        buffer.error,
        buffer.scale,
        norm,
    )
    return update.astype(plan.update_dtype), new_state


def _tracked(signal, owed, rho, decay, count, prev_basis, prev_mu) -> Tracked:
    """``B = rho M'/(1 - b1^(t-1)) + (1 - rho) a``, and ``a`` alone at t = 1."""
    alpha = jnp.where(count == 0, 1, 1 - rho)
    gamma = jnp.where(count == 0, 0, rho / decay.prev_bias1) - alpha * owed
    return Tracked(signal, alpha, gamma, prev_basis, prev_mu)


def _used(state: LeafState, options: Options) -> LeafState:
    """The state without the fields that the options do not use."""
    return LeafState._make(
        value if options.uses(field) else None
        for field, value in zip(LeafState._fields, state, strict=True)
    )


def _specs(plan: LeafPlan, state: LeafState) -> LeafState:
    """Specs of the leaf's state, each valid for the shape of its field."""
    assert plan.sharding is not None
    mesh = plan.sharding.mesh
    specs = leaf_specs(plan.view, plan.sharding.spec, mesh)
    return LeafState._make(
        None if value is None else fit(specs[field], value.shape, mesh)
        for field, value in zip(LeafState._fields, state, strict=True)
    )
