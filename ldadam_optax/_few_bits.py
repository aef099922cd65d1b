"""Arrays kept in 16, 8 or 4 bits, rounded stochastically.

Rounding to nearest would drop each contribution that is small beside the buffer,
the same way every step; stochastic rounding is right on average. The bits come
from a hash of the step and the position: the same on each machine and mesh. So the
reader of small integers knows them too and takes the noise off again (subtractive
dither, Roberts 1962): still right on average, with half of the variance, that of
rounding to nearest.

``int8`` and ``int4`` are stored in blocks of 32 along one axis, each with a bfloat16
scale: 1.0625 and 0.5625 bytes an element. Two 4-bit codes share a byte. The axis is
not the last one if that can be helped (:func:`block_axis`): an accelerator keeps the
last axis in its vector lanes, and cutting it into blocks means moving every element.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ldadam_optax._random import random_bits

BLOCK = 32
# Largest code: symmetric, so that a sign flip of the data is one of the codes.
_LARGEST_CODE = {"int8": 127, "int4": 7}
# Padding of less than one part in this many costs less than the last axis would.
_NEGLIGIBLE = 160


def block_axis(shape: tuple[int, ...], axes: Sequence[int]) -> int:
    """Which of ``axes`` is cut into blocks: one that they divide, the last one last.

    Example:
      >>> block_axis((768, 2048), (0, 1)), block_axis((768, 12, 64), (0, 1, 2))
      (0, 0)
      >>> block_axis((10, 64), (0, 1)), block_axis((5461, 2048), (0, 1))
      (1, 0)
    """

    def cost(axis: int) -> tuple[int, bool, int]:
        padding = -shape[axis] % BLOCK
        is_last = axis == len(shape) - 1
        return padding * _NEGLIGIBLE // shape[axis], is_last, -axis

    return min(axes, key=cost)


def encoded_shapes(
    shape: tuple[int, ...], dtype: str, axis: int
) -> tuple[tuple, tuple]:
    """Shapes of the codes and of the scales that hold an array of ``shape``."""
    blocks = -(-shape[axis] // BLOCK)
    per_block = BLOCK if dtype == "int8" else BLOCK // 2
    before, after = shape[:axis], shape[axis + 1 :]
    return (*before, blocks * per_block, *after), (*before, blocks, *after)


def encode(
    array: jax.Array, dtype: str, axis: int, seed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Round an array to blocks of small integers with a scale each.

    Args:
      array: Any shape, float32.
      dtype: ``'int8'`` or ``'int4'``.
      axis: Axis that is cut into blocks, not negative.
      seed: Seeds the rounding, uint32 scalar of ``_random.seed_of``.

    Returns:
      ``(codes, scales)`` of :func:`encoded_shapes`, int8 and bfloat16.
    """
    blocks = _to_blocks(array, axis)
    within = axis + 1  # the axis of 32
    largest = jnp.max(jnp.abs(blocks), axis=within)
    scales = _round_up_bfloat16(largest / _LARGEST_CODE[dtype])
    unit = jnp.expand_dims(scales.astype(array.dtype), within)
    exact = blocks / jnp.where(unit == 0, 1, unit)
    codes = jnp.floor(exact + _dither(blocks.shape, seed)).astype(jnp.int8)
    if dtype == "int4":
        codes = _pack(codes, within)
    return codes.reshape(encoded_shapes(array.shape, dtype, axis)[0]), scales


def decode(
    codes: jax.Array,
    scales: jax.Array,
    axis: int,
    shape: tuple[int, ...],
    seed: jax.Array,
) -> jax.Array:
    """Return what :func:`encode` rounded under the same seed, float32 of ``shape``."""
    before, after = shape[:axis], shape[axis + 1 :]
    within = axis + 1
    blocks = codes.reshape(*before, scales.shape[axis], -1, *after)
    if blocks.shape[within] < BLOCK:
        blocks = _unpack(blocks, within)
    unit = jnp.expand_dims(scales.astype(jnp.float32), within)
    exact = blocks.astype(jnp.float32) + (0.5 - _dither(blocks.shape, seed))
    values = (exact * unit).reshape(*before, -1, *after)
    return jax.lax.slice_in_dim(values, 0, shape[axis], axis=axis)


def round_to_bfloat16(array: jax.Array, seed: jax.Array) -> jax.Array:
    """Round float32 to bfloat16 stochastically: add 16 random bits and cut 16."""
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    noise = random_bits(array.shape, seed) >> 16
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    result = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(array), result, array).astype(jnp.bfloat16)


def _dither(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Uniform in [0, 1), to 24 bits."""
    return (random_bits(shape, seed) >> 8).astype(jnp.float32) * 2.0**-24


def _to_blocks(array: jax.Array, axis: int) -> jax.Array:
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % BLOCK)
    padded = jnp.pad(array, padding)
    return padded.reshape(*array.shape[:axis], -1, BLOCK, *array.shape[axis + 1 :])


def _round_up_bfloat16(scale: jax.Array) -> jax.Array:
    """The next bfloat16, so that no code exceeds the largest; NaN stays NaN."""
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    upper = jax.lax.bitcast_convert_type(
        (bits + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000), jnp.float32
    )
    return jnp.where(jnp.isfinite(scale), upper, scale).astype(jnp.bfloat16)


def _pack(codes: jax.Array, axis: int) -> jax.Array:
    """Two halves of a block to the low and the high four bits of its bytes."""
    low, high = jnp.split(codes, 2, axis=axis)
    return (low & 0x0F) | (high << 4)


def _unpack(packed: jax.Array, axis: int) -> jax.Array:
    low = (packed << 4) >> 4
    return jnp.concatenate([low, packed >> 4], axis=axis)
