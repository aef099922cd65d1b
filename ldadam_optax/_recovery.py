"""Without an error buffer: apply at once what projection lost.

The residual ``g - U ghat`` joins the update, each column scaled as Adam scaled the
part of it that the basis holds:

    update = U (d - f ghat) + f g,     f_j = limit |d_j| / |ghat_j|

with ``d`` Adam's direction. The norm of what is added grows by at most 1 % a step.

References:
  Chen et al., Fira: Can we achieve full-rank training of LLMs under low-rank
  constraint?, arXiv:2410.01623, sections 4.2 and 4.3; joined to LDAdam's transport
  of the moments by SubTrack++, arXiv:2502.01586.
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
    prev_norm: jax.Array,
) -> Recovery:
    """Scale the residual of one step.

    Args:
      view: The leaf as a matrix.
      grad: Gradient, in the leaf's shape.
      grad_rn: ``ghat = U^T g``, shape ``(batch.., r, n)``.
      direction_rn: Adam's direction in the basis, shape ``(batch.., r, n)``.
      prev_norm: Norm of the step before, shape ``(batch..,)``; 0 where there is none.

    Returns:
      What to lift, what to add, and the norm to remember.
    """
    # One common scale keeps the squares of tiny and huge gradients in range.
    largest = jnp.max(jnp.abs(grad))
    scale = jnp.where(largest > 0, largest, 1)
    kept_n = jnp.sum((grad_rn / scale) ** 2, axis=-2)
    lost_n = jnp.maximum(view.sum_columns((grad / scale) ** 2) - kept_n, 0)
    size_n = scale * jnp.sqrt(kept_n)
    direction_n = jnp.sqrt(jnp.sum(direction_rn**2, axis=-2))
    weight_n = jnp.where(size_n > 0, direction_n / jnp.where(size_n > 0, size_n, 1), 0)
    norm = jnp.sqrt(jnp.sum((weight_n * scale) ** 2 * lost_n, axis=-1))
    limit = jnp.where(prev_norm > 0, _LARGEST_GROWTH * prev_norm, norm)
    shrink = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1), 1)
    weight_n = shrink[..., None] * weight_n
    coords_rn = direction_rn - weight_n[..., None, :] * grad_rn
    return Recovery(coords_rn, weight_n, shrink * norm)
