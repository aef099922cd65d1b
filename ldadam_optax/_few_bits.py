"""Arrays kept in 16, 8 or 4 bits, rounded stochastically.

Rounding to nearest would drop each contribution that is small beside the buffer,
the same way every step; stochastic rounding is right on average. The bits come
from a hash of the step and the position: the same on each machine and mesh.

``int8`` and ``int4`` are stored in blocks of 32 along the last axis, each with a
bfloat16 scale: 1.0625 and 0.5625 bytes an element. Two 4-bit codes share a byte.
"""

import jax
import jax.numpy as jnp

from ldadam_optax._random import random_bits

BLOCK = 32
# Largest code: symmetric, so that a sign flip of the data is one of the codes.
_LARGEST_CODE = {"int8": 127, "int4": 7}


def encoded_shapes(shape: tuple[int, ...], dtype: str) -> tuple[tuple, tuple]:
    """Shapes of the codes and of the scales that hold an array of ``shape``."""
    blocks = -(-shape[-1] // BLOCK)
    per_block = BLOCK if dtype == "int8" else BLOCK // 2
    return (*shape[:-1], blocks * per_block), (*shape[:-1], blocks)


def encode(
    array: jax.Array, dtype: str, count: jax.Array, salt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Round an array to blocks of small integers with a scale each.

    Args:
      array: Any shape, float32.
      dtype: ``'int8'`` or ``'int4'``.
      count: Step count, int32 scalar; with ``salt`` it seeds the rounding.
      salt: Separates the leaves.

    Returns:
      ``(codes, scales)`` of :func:`encoded_shapes`, int8 and bfloat16.
    """
    blocks = _to_blocks(array)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    scales = _round_up_bfloat16(largest / _LARGEST_CODE[dtype])
    unit = scales.astype(array.dtype)[..., None]
    exact = blocks / jnp.where(unit == 0, 1, unit)
    bits = random_bits(blocks.shape, count, salt) >> 8
    codes = jnp.floor(exact + bits.astype(array.dtype) * 2.0**-24).astype(jnp.int8)
    if dtype == "int4":
        codes = _pack(codes)
    return codes.reshape(*array.shape[:-1], -1), scales


def decode(codes: jax.Array, scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return what :func:`encode` rounded, float32 of ``shape``."""
    blocks = codes.reshape(*scales.shape, -1)
    if blocks.shape[-1] < BLOCK:
        blocks = _unpack(blocks)
    values = blocks.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
    return values.reshape(*shape[:-1], -1)[..., : shape[-1]]


def round_to_bfloat16(array: jax.Array, count: jax.Array, salt: jax.Array) -> jax.Array:
    """Round float32 to bfloat16 stochastically: add 16 random bits and cut 16."""
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    noise = random_bits(array.shape, count, salt) >> 16
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    result = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(array), result, array).astype(jnp.bfloat16)


def _to_blocks(array: jax.Array) -> jax.Array:
    padding = -array.shape[-1] % BLOCK
    if padding:
        array = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, padding)])
    return array.reshape(*array.shape[:-1], -1, BLOCK)


def _round_up_bfloat16(scale: jax.Array) -> jax.Array:
    """The next bfloat16, so that no code exceeds the largest; NaN stays NaN."""
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    upper = jax.lax.bitcast_convert_type(
        (bits + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000), jnp.float32
    )
    return jnp.where(jnp.isfinite(scale), upper, scale).astype(jnp.bfloat16)


def _pack(codes: jax.Array) -> jax.Array:
    """Two halves of a block to the low and the high four bits of its bytes."""
    low, high = jnp.split(codes, 2, axis=-1)
    return (low & 0x0F) | (high << 4)


def _unpack(packed: jax.Array) -> jax.Array:
    low = (packed << 4) >> 4
    return jnp.concatenate([low, packed >> 4], axis=-1)
