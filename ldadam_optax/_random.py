"""Random bits that depend on the step and on the position in the array alone.

Stochastic rounding and the revival of lost directions need many cheap bits of
modest quality. A hash of the position gives the same bits however the array is
sharded, costs a few integer operations that fuse into the loop that uses them,
and needs no key in the state.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Multipliers and shifts of Wang Yi's and Chris Wellons' "lowbias32" integer hash,
# https://nullprogram.com/blog/2018/07/31/ (bias 0.17, public domain).
_HASH_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))
_GOLDEN_RATIO = 0x9E3779B9


def salt_of(name: str) -> np.uint32:
    """A number that tells leaves apart, the same under any mask."""
    return np.uint32(zlib.crc32(name.encode()))


def seed_of(count: jax.Array, salt: jax.typing.ArrayLike) -> jax.Array:
    """One seed for a leaf and a step, uint32 scalar.

    Args:
      count: Step count, int32 scalar.
      salt: Separates leaves.
    """
    return _mix(
        count.astype(jnp.uint32) * jnp.uint32(_GOLDEN_RATIO)
        + jnp.asarray(salt, jnp.uint32)
    )


def seed_within(seed: jax.Array, position: jax.Array) -> jax.Array:
    """The seed that gives a slice along axis 0 the bits that the whole array has there.

    Example:
      >>> seed = seed_of(jnp.int32(1), salt=0)
      >>> whole, part = random_bits((2, 3), seed), seed_within(seed, jnp.int32(1))
      >>> bool((whole[1] == random_bits((3,), part)).all())
      True
    """
    return _mix(seed + position.astype(jnp.uint32) * jnp.uint32(_GOLDEN_RATIO))


def random_bits(shape: Sequence[int], seed: jax.Array) -> jax.Array:
    """Hash each position together with the seed.

    Args:
      shape: Shape of the result, of fewer than 2**32 elements per two axes.
      seed: uint32 scalar of :func:`seed_of` or :func:`seed_within`.

    Returns:
      Uniform bits, uint32, shape ``shape``.

    Example:
      >>> random_bits((2, 3), seed_of(jnp.int32(1), salt=0)).dtype
      dtype('uint32')
    """
    bits = seed
    for axis in range(len(shape)):
        position = jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
        bits = seed_within(bits, position)
    return bits


def random_uniform(shape: Sequence[int], seed: jax.Array, dtype) -> jax.Array:
    """Independent and uniform in [-1, 1), to 24 bits, of the given shape and dtype."""
    bits = random_bits(shape, seed) >> 8
    return bits.astype(dtype) * 2.0**-23 - 1


def _mix(bits: jax.Array) -> jax.Array:
    for shift, multiplier in _HASH_ROUNDS:
        bits = (bits ^ (bits >> shift)) * jnp.uint32(multiplier)
    return bits ^ (bits >> 15)
