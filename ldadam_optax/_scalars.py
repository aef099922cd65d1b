"""Everything scalar of one step, as one thing."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax._random import seed_of


class Hyperparameters(NamedTuple):
    """Numbers that may be traced; the factory documents them."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    rho: jax.typing.ArrayLike


class Scalars(NamedTuple):
    """Scalars of the step ``t`` of one leaf, in the dtype of its arithmetic.

    Attributes:
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Adam's epsilon.
      rho: How far the basis follows the momentum.
      c: ``b1 / (1 - b1)``, the weight of the momentum in what this step stores; zero
        without error feedback.
      prev_c: ``c'``, the weight that the step before has stored with.
      bias1: ``1 - b1^t``.
      bias2: ``1 - b2^t``.
      prev_bias1: ``1 - b1^(t-1)``, and 1 at t = 1, where the moments are zero.
      prev_bias2: ``1 - b2^(t-1)``, likewise.
      first: True at t = 1.
      seed: Seeds the leaf's random bits of this step, uint32.
      prev_seed: The seed of the step before.
    """

    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    rho: jax.Array
    c: jax.Array
    prev_c: jax.Array
    bias1: jax.Array
    bias2: jax.Array
    prev_bias1: jax.Array
    prev_bias2: jax.Array
    first: jax.Array
    seed: jax.Array
    prev_seed: jax.Array

    @classmethod
    @functools.partial(jax.jit, static_argnums=(0, 6))
    def at(
        cls,
        hyperparameters: Hyperparameters,
        count: jax.Array,
        c: jax.Array,
        prev_c: jax.Array,
        salt: jax.typing.ArrayLike,
        dtype: str,
    ) -> "Scalars":
        """Scalars of the step after ``count`` steps; traced once for all leaves."""
        b1, b2, eps, rho = (jnp.asarray(value, dtype) for value in hyperparameters)
        before, first = count.astype(dtype), count == 0
        return cls(
            b1,
            b2,
            eps,
            rho,
            c.astype(dtype),
            prev_c.astype(dtype),
            1 - b1 ** (before + 1),
            1 - b2 ** (before + 1),
            jnp.where(first, 1, 1 - b1**before),
            jnp.where(first, 1, 1 - b2**before),
            first,
            seed_of(count, salt),
            seed_of(count - 1, salt),
        )
