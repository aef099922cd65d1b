"""Adam's moments in the coordinates of a basis that moves.

Choices that the paper leaves open: where the estimate of a second moment comes out
negative it is taken by its absolute value, as in the published code. All
arithmetic is in the dtype of the arguments, whatever the moments are stored in. The
change of basis is float32 accurate; what it carries is an average over noisy gradients,
and the two products that carry it run at ``'high'``: three passes of bfloat16 on a TPU.
"""

import jax
import jax.numpy as jnp

from ldadam_optax._precision import product
from ldadam_optax._scalars import Scalars


def carry_moments(
    prev_mu: jax.Array, prev_nu: jax.Array, transfer_rr: jax.Array, s: Scalars
) -> tuple[jax.Array, jax.Array]:
    """Estimate the moments in the new basis, given ``Q = U^T U'``.

    ``mhat = Q mu'``. The second moment of a rotated coordinate is the rotated
    variance plus the square of the rotated mean, with off-diagonal covariances
    taken as zero: ``vhat = |(Q o Q)(nu' - mu'^2) + mhat^2|``, all unbiased.

    Args:
      prev_mu: ``mu'``, shape ``(batch.., r, n)``.
      prev_nu: ``nu'``, shape ``(batch.., r, n)``.
      transfer_rr: ``Q``, shape ``(batch.., r, r)``.
      s: Scalars of this step.

    Returns:
      ``(mhat, vhat)`` in the new basis. ``Q = I`` returns ``nu'`` as it was.

    References:
      Robert et al., LDAdam, ICLR 2025, arXiv:2410.16103, section 3.
    """
    variance = prev_nu / s.prev_bias2 - (prev_mu / s.prev_bias1) ** 2
    mhat = product(transfer_rr, prev_mu, "high")
    rotated = product(transfer_rr**2, variance, "high")
    vhat = s.prev_bias2 * jnp.abs(rotated + (mhat / s.prev_bias1) ** 2)
    return mhat, vhat
