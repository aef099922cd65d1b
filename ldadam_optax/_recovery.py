"""Without an error buffer: apply at once what projection lost.

The residual ``g - U ghat`` joins the update, each column divided by the root mean
square of what Adam divides by within the basis:

    update = U (d - f ghat) + f g,     f_j = limit / (s_j + eps)
    s_j^2 = max(mean_i nu_ij / (1 - b2^t), |g_j - U ghat_j|^2 / m)

with ``d`` Adam's direction. Momentum spreads a gradient over the steps that follow,
in sum ``g / sqrt(nu)``. The residual has none, so it has that weight at once. Fira's
weight, ``|d_j| / |ghat_j|``, is a fraction of it, as ``d`` is an average over noise.
The second term of ``s`` is the residual itself: where the basis holds next to nothing
of a column, the column moves as far as by Adam's first step and no farther. The norm of
what is added grows by at most 1 % a step.

References:
  Chen et al., Fira: Can we achieve full-rank training of LLMs under low-rank
  constraint?, arXiv:2410.01623, sections 4.2 and 4.3; joined to LDAdam's transport
  of the moments by SubTrack++, arXiv:2502.01586. The weight is this library's own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax._dimension_numbers import MatrixView

# Fira's limiter, section 4.3: gamma = 1.01.
_LARGEST_GROWTH = 1.01


class Recovery(NamedTuple):
    """How the residual enters the update.

    Attributes:
      coords_rn: ``d - f ghat``, to be lifted, shape ``(batch.., r, n)``.
      weight_n: ``f``, the gradient's weight in each column, shape ``(batch.., n)``.
      norm: Norm of the scaled residual after the limit, shape ``(batch..,)``.
    """

    coords_rn: jax.Array
    weight_n: jax.Array
    norm: jax.Array


def recover_residual(
    view: MatrixView,
    grad: jax.Array,
    grad_rn: jax.Array,
    direction_rn: jax.Array,
    square_rn: jax.Array,
    eps: jax.Array,
    prev_norm: jax.Array,
) -> Recovery:
    """Scale the residual of one step.

    Args:
      view: The leaf as a matrix.
      grad: Gradient, in the leaf's shape.
      grad_rn: ``ghat = U^T g``, shape ``(batch.., r, n)``.
      direction_rn: Adam's direction in the basis, shape ``(batch.., r, n)``.
      square_rn: ``nu / (1 - b2^t)``, shape ``(batch.., r, n)``.
      eps: Adam's epsilon.
      prev_norm: Norm of the step before, shape ``(batch..,)``; 0 where there is none.

    Returns:
      What to lift, what to add, and the norm to remember.
    """
    # One common scale keeps the squares of tiny and huge gradients in range.
    largest = jnp.max(jnp.abs(grad))
    scale = jnp.where(largest > 0, largest, 1)
    kept_n = jnp.sum((grad_rn / scale) ** 2, axis=-2)
    lost_n = view.sum_columns((grad / scale) ** 2) - kept_n
    residual_n = scale * jnp.sqrt(jnp.maximum(lost_n, 0))
    size_n = jnp.sqrt(jnp.mean(square_rn, axis=-2))
    weight_n = 1 / (jnp.maximum(size_n, residual_n / view.m**0.5) + eps)
    norm = jnp.sqrt(jnp.sum((weight_n * residual_n) ** 2, axis=-1))
    limit = jnp.where(prev_norm > 0, _LARGEST_GROWTH * prev_norm, norm)
    shrink = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1), 1)
    weight_n = shrink[..., None] * weight_n
    coords_rn = direction_rn - weight_n[..., None, :] * grad_rn
    return Recovery(coords_rn, weight_n, shrink * norm)
