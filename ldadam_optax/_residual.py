"""What becomes of the residual, which is what projection onto the basis loses.

A :class:`ResidualRule` in :data:`RESIDUALS` says what is added to a gradient before the
step (``signal``) and what is made of the residual after it (``settle``).

**Error feedback.** The paper's error is ``e = a - U ghat + c (U' mu' - U mhat)``,
``c = b1/(1 - b1)``. A step needs it only through the signal ``a + c' M'``, with ``a = g
+ e'`` and the momentum ``M' = U' mu'``. In the dtype of the arithmetic the buffer
therefore holds ``s = e + c M``:

    signal = g + s',     s = signal - U (U^T signal - c mu)

one product less than keeping ``e``, and a gradient is consumed by adding it into the
buffer, which is where micro-batches can be accumulated too. As ``U^T e = 0``,
``e = (I - U U^T) s`` whenever it is wanted.

In fewer bits the buffer holds ``e``, whose part within the basis is exactly zero and
need not be rounded; ``s`` is then made again with one more product:

    signal = g + e' + c' U' mu',     e = signal - U (U^T signal)

``c'`` is the weight of the step that stored the momentum and comes from the state:
under a schedule of b1, the momentum of a step counts with the b1 of that step, in every
storage.

**Recovery.** No buffer: the residual joins the update at once, each column divided by
the root mean square of what Adam divides by within the basis:

    update = U (d - f ghat) + f g,     f_j = limit / (s_j + eps)
    s_j^2 = max(mean_i nu_ij / (1 - b2^t), |g_j - U ghat_j|^2 / m)

with ``d`` Adam's direction. Momentum spreads a gradient over the steps that follow, in
sum ``g / sqrt(nu)``. The residual has none, so it has that weight at once. Fira's
weight, ``|d_j| / |ghat_j|``, is a fraction of it, as ``d`` is an average over noise.
The second term of ``s`` is the residual itself: where the basis holds next to nothing
of a column, the column moves as far as by Adam's first step and no farther. The norm of
what is added grows by at most 1 % a step.

**Normalized.** As recovery, with a weight that gives each column of the residual the
same root mean square, whatever the gradient's size:

    update = U (d - f ghat) + f g,     f_j = 0.7 / (rms(g_j - U ghat_j) + eps)

It needs no state and no limit: from the first step on, what is added has the size that
recovery's reaches at the end.

**None.** The residual is dropped.

References:
  Robert et al., LDAdam, ICLR 2025, arXiv:2410.16103, algorithm 1. Chen et al., Fira:
  Can we achieve full-rank training of LLMs under low-rank constraint?,
  arXiv:2410.01623, sections 4.2 and 4.3; joined to LDAdam's transport of the moments by
  SubTrack++, arXiv:2502.01586. The weight of the recovery is this library's own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._quantization import ERROR_CODECS, Codec, Stored, block_axis
from ldadam_optax._scalars import Scalars

# Rounding to 4 bits adds 0.9 % of the buffer's own square each step (blocks of 32
# normal numbers), which piles up where the basis drains little more: at rank 1 of 32.
# What is read has the square of what was stored.
_SHARE_READ = {"int4": 0.99}
# Fira's limiter, section 4.3: gamma = 1.01.
_LARGEST_GROWTH = 1.01
# Root mean square of a column of the normalized residual, beside entries of Adam's
# direction of about one. Recovery's is about 0.5 once its limit lets it grow.
_NORMALIZED_SIZE = 0.7
# Of a column's square; below it, what is left is the rounding of what is held.
_LEAST_LOST = 1e-4


class Before(NamedTuple):
    """What a rule is given before the step, of one leaf.

    Attributes:
      view: The leaf as a matrix.
      s: Scalars of the step.
      grad: ``g``, in the leaf's shape and the dtype of the arithmetic.
      prev_basis: ``U'``, shape ``(batch.., m, r)``.
      prev_mu: ``mu'``, shape ``(batch.., r, n)``.
      prev: The leaf's fields of the state, as stored.
      error_dtype: Storage of the error, by its codec's name.
      accumulated: ``grad`` contains an exact buffer already.
      precision: Precision of full-size products.
    """

    view: MatrixView
    s: Scalars
    grad: jax.Array
    prev_basis: jax.Array
    prev_mu: jax.Array
    prev: Any
    error_dtype: str
    accumulated: bool
    precision: str | None


class After(NamedTuple):
    """What a rule is given after the step.

    Attributes:
      signal: What the rule has returned before the step, in the leaf's shape.
      basis: ``U``, shape ``(batch.., m, r)``.
      coords: ``U^T signal``, shape ``(batch.., r, n)``.
      ghat: ``U^T a``, likewise.
      mu: First moment, likewise.
      nu: Second moment, likewise.
      direction: Adam's direction, likewise.
    """

    signal: jax.Array
    basis: jax.Array
    coords: jax.Array
    ghat: jax.Array
    mu: jax.Array
    nu: jax.Array
    direction: jax.Array


class Settled(NamedTuple):
    """What a rule makes of the residual: ``update = U direction + outside``.

    Attributes:
      direction: What is lifted to the leaf, shape ``(batch.., r, n)``.
      outside: What is added beside it, in the leaf's shape; 0 for nothing.
      fields: Fields of the state that the rule keeps, by name.
    """

    direction: jax.Array
    outside: jax.Array | float
    fields: Mapping[str, jax.Array | None]


class ResidualRule(NamedTuple):
    """One thing to do with the residual.

    Attributes:
      momentum_weight: ``b1`` to ``c``, the weight of the momentum in the signal.
      signal: What the step projects, from the gradient and the state.
      settle: What is lifted, added and kept.
    """

    momentum_weight: Callable[[jax.Array], jax.Array]
    signal: Callable[[Before], jax.Array]
    settle: Callable[[Before, After], Settled]


def error_codec(view: MatrixView, error_dtype: str) -> tuple[Codec, int]:
    """The codec of an error buffer and the axis that it cuts into blocks.

    Blocks lie within a matrix: they mix no two of a batch.
    """
    return ERROR_CODECS[error_dtype], block_axis(view.shape, view.matrix_axes)


def holds_momentum(error_dtype: str, dtype: str) -> bool:
    """True where the buffer is ``s = e + c M``, in the dtype of the arithmetic."""
    return ERROR_CODECS[error_dtype].exact(dtype)


def error_feedback_signal(before: Before) -> jax.Array:
    """``g + s'``, or ``g + e' + c' U' mu'`` from fewer bits."""
    view, s, grad, prev = before.view, before.s, before.grad, before.prev
    codec, axis = error_codec(view, before.error_dtype)
    if codec.exact(grad.dtype.name):
        return grad if before.accumulated else grad + prev.error
    stored = Stored(prev.error, prev.error_scale)
    error = codec.decode(stored, axis, view.shape, s.prev_seed).astype(grad.dtype)
    error *= _SHARE_READ.get(before.error_dtype, 1.0)
    coords_rn = s.prev_c * before.prev_mu
    return grad + (error + view.lift(before.prev_basis, coords_rn, before.precision))


def feed_back(before: Before, after: After) -> Settled:
    """Keep the error for the next step; the update is the lifted direction alone."""
    view, s, signal = before.view, before.s, after.signal
    codec, axis = error_codec(view, before.error_dtype)
    applied_rn = after.coords
    if codec.exact(signal.dtype.name):
        applied_rn = applied_rn - s.c * after.mu
    # Behind a barrier, or XLA makes one product of this and the update and passes twice
    # over its result (the basis), and holds a copy of the signal until then.
    signal, basis = jax.lax.optimization_barrier((signal, after.basis))
    kept = signal - view.lift(basis, applied_rn, before.precision)
    stored = codec.encode(kept, axis, s.seed)
    fields = {"error": stored.codes, "error_scale": stored.scale}
    return Settled(after.direction, 0.0, fields)


def recover(before: Before, after: After) -> Settled:
    """Add the residual at once, as far as Adam would move it."""
    view, s = before.view, before.s
    residual_n, _ = _column_norms(before, after)
    size_n = jnp.sqrt(jnp.mean(after.nu / s.bias2, axis=-2))
    weight_n = 1 / (jnp.maximum(size_n, residual_n / view.m**0.5) + s.eps)
    norm = jnp.sqrt(jnp.sum((weight_n * residual_n) ** 2, axis=-1))
    prev_norm = before.prev.residual_norm
    limit = jnp.where(prev_norm > 0, _LARGEST_GROWTH * prev_norm, norm)
    shrink = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1), 1)
    fields = {"residual_norm": shrink * norm}
    return _add_residual(before, after, shrink[..., None] * weight_n, fields)


def normalize(before: Before, after: After) -> Settled:
    """Add the residual at once, each column of one root mean square."""
    residual_n, grad_n = _column_norms(before, after)
    known_n = jnp.maximum(residual_n, _LEAST_LOST**0.5 * grad_n)
    weight_n = _NORMALIZED_SIZE / (known_n / before.view.m**0.5 + before.s.eps)
    return _add_residual(before, after, weight_n, {})


def _column_norms(before: Before, after: After) -> tuple[jax.Array, jax.Array]:
    """``|g_j - U ghat_j|`` and ``|g_j|`` of each column, shape ``(batch.., n)``.

    By Pythagoras, so that the residual is never formed. One common scale keeps the
    squares of tiny and huge gradients in range; the basis follows the gradient, so what
    it sees tells the size of all, without a full pass.
    """
    largest = jnp.max(jnp.abs(after.ghat))
    scale = jnp.where(largest > 0, largest, 1)
    all_n = before.view.sum_columns((before.grad / scale) ** 2)
    kept_n = jnp.sum((after.ghat / scale) ** 2, axis=-2)
    lost_n = jnp.maximum(all_n - kept_n, 0)
    return scale * jnp.sqrt(lost_n), scale * jnp.sqrt(all_n)


def _add_residual(
    before: Before,
    after: After,
    weight_n: jax.Array,
    fields: Mapping[str, jax.Array | None],
) -> Settled:
    """``f (g - U ghat)``, without a product of its own."""
    direction_rn = after.direction - weight_n[..., None, :] * after.ghat
    return Settled(direction_rn, before.view.columns(weight_n) * before.grad, fields)


def drop(before: Before, after: After) -> Settled:
    """The lifted direction alone."""
    del before
    return Settled(after.direction, 0.0, {})


#: Residual rules by the name of the option ``residual``.
RESIDUALS: dict[str, ResidualRule] = {
    "error_feedback": ResidualRule(
        lambda b1: b1 / (1 - b1), error_feedback_signal, feed_back
    ),
    "recovery": ResidualRule(jnp.zeros_like, lambda before: before.grad, recover),
    "normalized": ResidualRule(jnp.zeros_like, lambda before: before.grad, normalize),
    "none": ResidualRule(jnp.zeros_like, lambda before: before.grad, drop),
}
