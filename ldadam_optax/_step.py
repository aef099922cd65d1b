"""One step of LDAdam on one leaf, as the paper writes it.

``tests/reference.py`` is the same step in float64 NumPy, one product at a time, with
the error stored as the paper stores it; ``docs/algorithm.md`` leads from there to here.

Legend, for one matrix seen as ``m x n`` with the axis ``m`` compressed to ``r`` (batch
axes in front are left out). A prime, ``prev_`` in code, marks the value of the step
before.

==================  ====================  ==========  ==============================
mathematics         code                  shape       meaning
==================  ====================  ==========  ==============================
g                   ``grad``              the leaf's  gradient of this step
e                   ``error``             the leaf's  what earlier steps left over
a = g + e'                                            corrected gradient
c                   ``s.c``               ()          ``b1 / (1 - b1)``
a + c' U' mu'       ``signal``            the leaf's  all that a step reads in full
B                   ``tracked``           the leaf's  what the basis follows
U, U'               ``basis``, ``prev_-   (m, r)      orthonormal basis; state field
                    basis``                           ``projector``
Q = U^T U'          ``transfer``          (r, r)      change of basis
U^T signal          ``coords``            (r, n)      the signal in the basis
ghat = U^T a        ``ghat``              (r, n)      corrected gradient in the basis
mhat, vhat          ``mhat``, ``vhat``    (r, n)      moments carried to the new basis
mu, nu              ``mu``, ``nu``        (r, n)      moments
t - 1               ``count``             ()          steps taken before this one
==================  ====================  ==========  ==============================

Five products are of full size: two where the basis moves (``_subspace.py``),
``coords``, one in the residual rule (``_residual.py``), and the update. All run at the
``precision`` of the options.
"""

from collections.abc import Generator, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._fields import LeafState, decode_moments, encode_moments
from ldadam_optax._moments import carry_moments
from ldadam_optax._options import Options
from ldadam_optax._residual import RESIDUALS, After, Before
from ldadam_optax._scalars import Scalars
from ldadam_optax._subspace import SUBSPACES, Moved, Tracked


class Leaf(NamedTuple):
    """What is static about a leaf.

    Attributes:
      view: The leaf as a matrix.
      dtype: Dtype of the arithmetic, ``'float32'`` or ``'float64'``.
      update_dtype: Dtype of the update.
      accumulated: The gradient contains an exact error buffer already.
      placement: Leaves of one placement lie on devices alike.
    """

    view: MatrixView
    dtype: str
    update_dtype: str
    accumulated: bool = False
    placement: Hashable = None


#: A step that yields what its basis follows. It is sent where the basis has moved, and
#: its state once more: an order of leaves can hold it back until then.
Step = Generator[Tracked, tuple[Moved, LeafState], tuple[jax.Array, LeafState]]


def ldadam_step(
    leaf: Leaf, options: Options, s: Scalars, grad: jax.Array, state: LeafState
) -> Step:
    """Take one step on one leaf; the bases of many leaves can move in one call.

    Args:
      leaf: What is static about the leaf.
      options: What is static for all leaves.
      s: Scalars.
      grad: Gradient, of the leaf's shape.
      state: The leaf's fields of the state.

    Yields:
      The matrix that the basis follows; is sent ``U`` and ``Q``, and ``state`` again.

    Returns:
      ``(update, state)``, of the dtypes of the leaf and of its old state.
    """
    view, residual = leaf.view, RESIDUALS[options.residual]
    prev_mu, _, prev_basis = read_leaf(leaf, options, s, state)
    before = before_step(leaf, options, s, grad, state, prev_basis, prev_mu)
    # B = rho M'/(1 - b1^(t-1)) + (1 - rho) a, at t = 1 a alone
    signal = residual.signal(before)
    alpha = jnp.where(s.first, 1, 1 - s.rho)
    gamma = jnp.where(s.first, 0, s.rho / s.prev_bias1) - alpha * s.prev_c
    # U = orthonormal basis of B (B^T U'),  Q = U^T U'
    (basis, transfer), state = yield Tracked(
        view,
        signal,
        alpha,
        gamma,
        prev_basis,
        prev_mu,
        s.seed,
        options.precision,
        leaf.placement,
    )
    prev_mu, prev_nu, _ = read_leaf(leaf, options, s, state)
    # mhat = Q mu',  ghat = U^T a = U^T signal - c' mhat
    mhat, vhat = carry_moments(prev_mu, prev_nu, transfer, s)
    coords = view.project(signal, basis, options.precision)
    ghat = coords - s.prev_c * mhat
    # Adam, in the coordinates of the basis
    mu = s.b1 * mhat + (1 - s.b1) * ghat
    nu = s.b2 * vhat + (1 - s.b2) * ghat**2
    direction = (mu / s.bias1) / (jnp.sqrt(nu / s.bias2) + s.eps)
    # what projection lost: kept, added or dropped
    after = After(signal, basis, coords, ghat, mu, nu, direction)
    settled = residual.settle(before, after)
    update = view.lift(basis, settled.direction, options.precision) + settled.outside
    return update.astype(leaf.update_dtype), _write(
        leaf, options, s, mu, nu, basis, settled.fields
    )


def read_leaf(
    leaf: Leaf, options: Options, s: Scalars, state: LeafState
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Out of storage: ``mu'``, ``nu'`` and ``U'``, in the dtype of the arithmetic."""
    view, dtype = leaf.view, leaf.dtype
    prev_mu, prev_nu = decode_moments(view, options, state, dtype, s.prev_seed)
    rule = SUBSPACES[options.subspace]
    return prev_mu, prev_nu, rule.decode(state.projector, view, dtype)


def before_step(
    leaf: Leaf,
    options: Options,
    s: Scalars,
    grad: jax.Array,
    state: LeafState,
    prev_basis: jax.Array,
    prev_mu: jax.Array,
) -> Before:
    """What a residual rule is given before the step."""
    return Before(
        leaf.view,
        s,
        grad.astype(leaf.dtype),
        prev_basis,
        prev_mu,
        state,
        options.error_dtype or leaf.dtype,
        leaf.accumulated,
        options.precision,
    )


def _write(leaf, options, s, mu, nu, basis, residual_fields) -> LeafState:
    """Into storage: what the next step reads."""
    rule = SUBSPACES[options.subspace]
    return LeafState(
        projector=rule.encode(basis, options.projector_dtype or leaf.dtype),
        **encode_moments(leaf.view, options, mu, nu, s.seed),
        **residual_fields,
    )
