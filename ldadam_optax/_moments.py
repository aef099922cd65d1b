"""Adam's moments in the coordinates of a basis that moves.

Choices that the paper leaves open: where the estimate of a second moment comes out
negative it is taken by its absolute value, as in the published code. All
arithmetic is in the dtype of the arguments, whatever the moments are stored in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax._orthonormal import HIGHEST


class Moments(NamedTuple):
    """First and second moment, each of shape ``(batch.., r, n)``."""

    mu: jax.Array
    nu: jax.Array


class Decay(NamedTuple):
    """Decay rates and what remains of a bias after ``t - 1`` and after ``t`` steps.

    Attributes:
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      prev_bias1: ``1 - b1^(t-1)``, and 1 at t = 1, where the moments are zero.
      prev_bias2: The same of ``b2``.
      bias1: ``1 - b1^t``.
      bias2: ``1 - b2^t``.
    """

    b1: jax.Array
    b2: jax.Array
    prev_bias1: jax.Array
    prev_bias2: jax.Array
    bias1: jax.Array
    bias2: jax.Array

    @classmethod
    def at(cls, count: jax.Array, b1: jax.Array, b2: jax.Array) -> "Decay":
        """Decay of the step that follows ``count`` steps, in the dtype of ``b1``."""
        before = count.astype(b1.dtype)
        prev_bias1 = jnp.where(count == 0, 1, 1 - b1**before)
        prev_bias2 = jnp.where(count == 0, 1, 1 - b2**before)
        return cls(
            b1,
            b2,
            prev_bias1,
            prev_bias2,
            1 - b1 ** (before + 1),
            1 - b2 ** (before + 1),
        )


def carry_moments(moments: Moments, transfer_rr: jax.Array, decay: Decay) -> Moments:
    """Estimate the moments in the new basis, given ``Q = U^T U'``.

    ``mhat = Q mu'``. The second moment of a rotated coordinate is the rotated
    variance plus the square of the rotated mean, with off-diagonal covariances
    taken as zero: ``vhat = |(Q o Q)(nu' - mu'^2) + mhat^2|``, all unbiased.

    Args:
      moments: ``mu'`` and ``nu'``, shape ``(batch.., r, n)``.
      transfer_rr: ``Q``, shape ``(batch.., r, r)``.
      decay: Decay of this step.

    Returns:
      Moments in the new basis. ``Q = I`` returns ``nu'`` as it was.

    References:
      Robert et al., LDAdam, ICLR 2025, arXiv:2410.16103, section 3.
    """
    mean = moments.mu / decay.prev_bias1
    variance = moments.nu / decay.prev_bias2 - mean**2
    mu = jnp.matmul(transfer_rr, moments.mu, precision=HIGHEST)
    rotated = jnp.matmul(transfer_rr**2, variance, precision=HIGHEST)
    nu = decay.prev_bias2 * jnp.abs(rotated + (mu / decay.prev_bias1) ** 2)
    return Moments(mu, nu)


def update_moments(moments: Moments, grad_rn: jax.Array, decay: Decay) -> Moments:
    """Exponential moving averages of the projected gradient and of its square."""
    mu = decay.b1 * moments.mu + (1 - decay.b1) * grad_rn
    nu = decay.b2 * moments.nu + (1 - decay.b2) * grad_rn**2
    return Moments(mu, nu)


def adam_direction(moments: Moments, decay: Decay, eps: jax.Array) -> jax.Array:
    """``mu/(1-b1^t) / (sqrt(nu/(1-b2^t)) + eps)``, shape ``(batch.., r, n)``."""
    mean = moments.mu / decay.bias1
    return mean / (jnp.sqrt(moments.nu / decay.bias2) + eps)
