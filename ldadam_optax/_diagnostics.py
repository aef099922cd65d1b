"""What the subspace of each leaf does to a gradient, in five numbers.

A state knows the basis that the last step left and what waits in the error buffer. It
does not know the basis before, nor the one that the next step will take: how far a
basis turned is known from two states. So :func:`diagnostics` takes the state that a
gradient meets and, where it is at hand, the state that the step made of it. Within one
``jit`` that costs two products more, as the compiler drops what only the rest of the
step needs.

Everything is measured on what is stored and by the optimizer's own readers: the signal
of the residual rule, whatever the storage of the error. Full-size products are float32
accurate, as a small residual is a difference of large numbers; there are two, or three
with error feedback, where a step takes five. No decomposition is compiled: the
effective rank is a participation ratio, which needs the Gram matrix alone.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax._checks import compute_dtype
from ldadam_optax._dimension_numbers import (
    MatrixView,
    WeightDimensionNumbers,
    leaf_name,
)
from ldadam_optax._fields import LeafState
from ldadam_optax._options import Options
from ldadam_optax._precision import matmul
from ldadam_optax._random import salt_of
from ldadam_optax._residual import RESIDUALS, holds_momentum
from ldadam_optax._routing import path_names
from ldadam_optax._scalars import Hyperparameters, Scalars
from ldadam_optax._sharding import fit, leaf_specs, named_sharding, on_mesh
from ldadam_optax._state import (
    check_state,
    find_state,
    names_of,
    split_state,
    stored_options,
    stored_views,
)
from ldadam_optax._step import Leaf, before_step, read_leaf
from ldadam_optax._subspace import SUBSPACES, change_of_basis
from ldadam_optax._sums import check_sums


class LeafDiagnostics(NamedTuple):
    """Five numbers for each matrix of a leaf, arrays of the batch axes' shape.

    With ``g`` the gradient, ``e'`` the error that earlier steps left (zero without
    error feedback), ``a = g + e'``, ``U'`` the basis and ``c' U' mu'`` the momentum
    that the error buffer holds before the step, ``U`` the basis of the step (``U'``
    where no next state is given) and norms those of Frobenius:

    Attributes:
      share: ``|U^T a|^2 / |a|^2``, the share of the corrected gradient's square that
        the subspace holds, in [0, 1]; 1 at full rank.
      turned: ``|(I - U U^T) U'|^2 / r``, the share of the old subspace that lies
        outside of the new one: the mean squared sine of the principal angles between
        them, in [0, 1]. 0 where it stayed, whatever its columns do within it, and
        ``1 - r/m`` on average for two random ones. None without a next state.
      residual: ``|(I - U U^T)(a + c' U' mu')| / |g|``, what this step's projection
        loses, beside what comes in; with error feedback that is the norm of the error
        that the step hands on. At least 0, and above 1 where more waits in the buffer
        than a gradient brings.
      orthonormality: Largest entry of ``|U^T U - I|``, of the basis as stored: about
        1e-6 in float32, 1e-3 in bfloat16.
      effective_rank: ``|X|^4 / |X X^T|^2`` of ``X = U^T a``, the participation ratio of
        its squared singular values, in [1, r]: 1 where one direction holds all of it, r
        where each holds as much.
    """

    share: jax.Array
    turned: jax.Array | None
    residual: jax.Array
    orthonormality: jax.Array
    effective_rank: jax.Array


def diagnostics(
    grads: Any,
    state: Any,
    next_state: Any = None,
    *,
    error_accumulated: bool = False,
    side: str = "short",
    subspace: str = "power_iteration",
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> dict[str, LeafDiagnostics]:
    """Tell what the subspaces make of a gradient, leaf by leaf.

    ``state`` is the one that ``update`` is given together with these gradients. Alone
    it tells how much of them the subspace holds that *earlier* steps have found;
    together with the state that ``update`` returns, what this step's own subspace
    holds, and how far it turned. A ratio whose denominator is zero is NaN, or inf.

    Call it within the jitted step, or in one of its own beside it every so often:

        def diagnose(grads, state, params):
            return diagnostics(grads, state, tx.update(grads, state, params)[1])

    of which ``jax.jit`` runs no more than the new bases take.

    Args:
      grads: Gradients as LDAdam is given them: after what stands before it in a chain,
        such as clipping. Leaves that take AdamW may be there and are left out.
      state: State of :func:`scale_by_ldadam`, or of an optimizer with one in it, such
        as ``ldadamw``, before the step.
      next_state: The same after the step, or None.
      error_accumulated: The gradients contain the error buffer already, as those of
        :func:`accumulate_gradients` do.
      side: As given to the optimizer.
      subspace: As given to the optimizer.
      weight_dimension_numbers: As given to the optimizer.

    Returns:
      :class:`LeafDiagnostics` of each leaf that LDAdam takes, by its path
      (``'layers/0/query/kernel'``), float32 (float64 for float64 leaves).

    Raises:
      TypeError: if a gradient is not a real floating array.
      ValueError: if there is not one LDAdam state in each, if a state belongs to other
        leaves, shapes or options, told by the leaf's name, or if sums of gradients and
        errors are not said to be some.

    Example:
      >>> from ldadam_optax import ldadamw
      >>> tx = ldadamw(1e-2, rank=2)
      >>> params = {'kernel': jnp.ones((4, 6)), 'bias': jnp.ones(6)}
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> _, next_state = tx.update(grads, state, params)
      >>> found = diagnostics(grads, state, next_state)['kernel']
      >>> round(float(found.share), 3), round(float(found.effective_rank), 3)
      (1.0, 1.0)
      >>> bool(found.turned > 0.1), bool(found.residual < 1e-3)
      (True, True)

    References:
      The participation ratio of a spectrum: Bell, Dean: Atomic vibrations in vitreous
      silica, Discuss. Faraday Soc. 50 (1970). Principal angles: Golub, Van Loan, Matrix
      Computations, section 6.4.3.
    """
    check_sums(jax.tree.leaves(grads), error_accumulated)
    state = find_state(state)
    names = names_of(state.projector)
    if not names:
        return {}
    states, _ = split_state(state, names)
    views = stored_views(grads, names, states, side, weight_dimension_numbers)
    paths, own_grads = _leaves_of(grads, names)
    dtypes = [compute_dtype(*pair) for pair in zip(names, own_grads, strict=True)]
    leaves = [
        Leaf(view, dtype, dtype, error_accumulated)
        for view, dtype in zip(views, dtypes, strict=True)
    ]
    options = stored_options(states, dtypes, side, subspace)
    check_state(state, states, names, leaves, options)
    next_projectors = _projectors(next_state, names, leaves, options)
    salts = list(map(salt_of, names))
    numbers = [
        _of_leaf(leaf, options, named_sharding(grad), state.count, state.c, grad, *own)
        for leaf, grad, *own in zip(
            leaves, own_grads, salts, states, next_projectors, strict=True
        )
    ]
    return dict(zip(paths, numbers, strict=True))


def _leaves_of(grads: Any, names: Sequence[str]) -> tuple[list[str], list[Any]]:
    """Paths and gradients of the leaves of these quoted names."""
    by_name = {
        leaf_name(path): (path, g) for path, g in jax.tree.leaves_with_path(grads)
    }
    paths, own_grads = zip(*(by_name[name] for name in names), strict=True)
    return ["/".join(path_names(path)) for path in paths], list(own_grads)


def _projectors(
    state: Any, names: Sequence[str], leaves: Sequence[Leaf], options: Options
) -> list[jax.Array | None]:
    """The stored basis of each leaf, and None for each without a state."""
    if state is None:
        return [None] * len(names)
    state = find_state(state)
    states, _ = split_state(state, names)
    check_state(state, states, names, leaves, options)
    return [leaf_state.projector for leaf_state in states]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _of_leaf(
    leaf: Leaf,
    options: Options,
    sharding: jax.sharding.NamedSharding | None,
    *values: Any,
) -> LeafDiagnostics:
    """:func:`_measure`, on a mesh with results that lie as the batch axes do."""
    measure = functools.partial(_measure, leaf, options)
    if sharding is None:
        return measure(*values)
    spec = leaf_specs(leaf.view, sharding.spec, sharding.mesh)["residual_norm"]
    spec = fit(spec, leaf.view.batch_shape, sharding.mesh)
    turned = None if values[-1] is None else spec
    specs = LeafDiagnostics._make([spec, turned, spec, spec, spec])
    return on_mesh(measure, sharding, specs)(*values)


def _measure(
    leaf: Leaf,
    options: Options,
    count: jax.Array,
    prev_c: jax.Array,
    grad: jax.Array,
    salt: jax.Array,
    state: LeafState,
    next_projector: jax.Array | None,
) -> LeafDiagnostics:
    """The numbers of one leaf, from what a step reads."""
    view, lift = leaf.view, functools.partial(leaf.view.lift, precision="highest")
    zeros = Hyperparameters(0.0, 0.0, 0.0, 0.0)  # reading a state takes none of them
    s = Scalars.at(zeros, count, prev_c, prev_c, salt, leaf.dtype)
    prev_mu, _, prev_basis = read_leaf(leaf, options, s, state)
    before = before_step(leaf, options, s, grad, state, prev_basis, prev_mu)
    # g,  a + c' U' mu',  and a, all of one scale, as squares of tiny numbers vanish
    own_grad = _gradient(leaf, options, before.grad, state)
    signal = RESIDUALS[options.residual].signal(before)
    (own_grad, signal), scale = _scaled(view, own_grad, signal)
    momentum = s.prev_c * prev_mu / scale[..., None, None]
    holds = options.residual == "error_feedback"
    corrected = signal - lift(prev_basis, momentum) if holds else signal
    # U,  U^T a = U^T signal - c' U^T U' mu'
    basis, turned = prev_basis, None
    if next_projector is not None:
        rule = SUBSPACES[options.subspace]
        basis = rule.decode(next_projector, view, leaf.dtype)
        turned = _turned(basis, prev_basis)
    coords = view.project(signal, basis, "highest")
    ghat = coords - matmul(change_of_basis(basis, prev_basis), momentum)
    residual = signal - lift(basis, coords)
    square, of_panel = functools.partial(_square, view.matrix_axes), (-2, -1)
    held = _square(of_panel, ghat)
    return LeafDiagnostics(
        share=jnp.minimum(held / square(corrected), 1),
        turned=turned,
        residual=jnp.sqrt(square(residual) / square(own_grad)),
        orthonormality=_distance_to_orthonormal(basis),
        effective_rank=held**2 / _square(of_panel, matmul(ghat, ghat.mT)),
    )


def _gradient(
    leaf: Leaf, options: Options, grad: jax.Array, state: LeafState
) -> jax.Array:
    """``g`` alone, out of a sum with the buffer too."""
    exact = holds_momentum(options.error_dtype or leaf.dtype, leaf.dtype)
    return grad - state.error if leaf.accumulated and exact else grad


def _scaled(view: MatrixView, *arrays: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Arrays divided by the largest entry that each matrix has in any, and that."""
    axes = tuple(view.matrix_axes)
    largest = [jnp.max(jnp.abs(array), axis=axes) for array in arrays]
    scale = functools.reduce(jnp.maximum, largest)
    scale = jnp.where(scale > 0, scale, 1)
    return [array / jnp.expand_dims(scale, axes) for array in arrays], scale


def _turned(basis_mr: jax.Array, prev_basis_mr: jax.Array) -> jax.Array:
    """``|U' - U U^T U'|^2 / r``; formed, as ``r - |U^T U'|^2`` would cancel."""
    transfer_rr = change_of_basis(basis_mr, prev_basis_mr)
    outside_mr = prev_basis_mr - matmul(basis_mr, transfer_rr)
    return jnp.minimum(_square((-2, -1), outside_mr) / basis_mr.shape[-1], 1)


def _distance_to_orthonormal(basis_mr: jax.Array) -> jax.Array:
    gram_rr = change_of_basis(basis_mr, basis_mr)
    identity_rr = jnp.eye(gram_rr.shape[-1], dtype=gram_rr.dtype)
    excess_rr = gram_rr - jnp.broadcast_to(identity_rr, gram_rr.shape)
    return jnp.max(jnp.abs(excess_rr), axis=(-2, -1))


def _square(axes: Sequence[int], array: jax.Array) -> jax.Array:
    return jnp.sum(array**2, axis=tuple(axes))
