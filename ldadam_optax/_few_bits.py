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
# The block's largest entry, in units. With dither of at most half a unit on either side
# int4 takes each of its sixteen codes, and int8 has half a unit to spare at its ends.
_LARGEST = {"int8": 127.0, "int4": 7.5}
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
    blocks = _split(_pad_to_blocks(array, axis), axis, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=axis + 1)
    scales = _round_up_bfloat16(largest / _LARGEST[dtype])
    unit = scales.astype(array.dtype)
    exact = array / _spread(jnp.where(unit == 0, 1, unit), axis, array.shape)
    codes = jnp.floor(exact + _dither(array.shape, seed)).astype(jnp.int8)
    codes = _pad_to_blocks(codes, axis)
    return (_pack(codes, axis) if dtype == "int4" else codes), scales


def decode(
    codes: jax.Array,
    scales: jax.Array,
    axis: int,
    shape: tuple[int, ...],
    seed: jax.Array,
) -> jax.Array:
    """Return what :func:`encode` rounded under the same seed, float32 of ``shape``."""
    if codes.shape[axis] < scales.shape[axis] * BLOCK:
        codes = _unpack(codes, axis)
    codes = jax.lax.slice_in_dim(codes, 0, shape[axis], axis=axis)
    exact = codes.astype(jnp.float32) + (0.5 - _dither(shape, seed))
    return exact * _spread(scales.astype(jnp.float32), axis, shape)


def round_to_bfloat16(array: jax.Array, seed: jax.Array) -> jax.Array:
    """Round float32 to bfloat16 stochastically: add 16 random bits and cut 16."""
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    noise = random_bits(array.shape, seed) >> 16
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    result = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(array), result, array).astype(jnp.bfloat16)


def _dither(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Uniform in (-1/2, 1/2), of 16 bits: the ends are farther than any rounding."""
    bits = (random_bits(shape, seed) >> 16).astype(jnp.float32)
    return bits * 2.0**-16 - (0.5 - 2.0**-17)


def _pad_to_blocks(array: jax.Array, axis: int) -> jax.Array:
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % BLOCK)
    return jnp.pad(array, padding)


def _spread(scales: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
    """Each scale to the elements of its block, in the shape of the array."""
    blocks = (*scales.shape[: axis + 1], BLOCK, *scales.shape[axis + 1 :])
    spread = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), blocks)
    return jax.lax.slice_in_dim(_join(spread, axis), 0, shape[axis], axis=axis)


def _split(array: jax.Array, axis: int, size: int) -> jax.Array:
    """``(.., k, ..)`` to ``(.., k / size, size, ..)``."""
    return array.reshape(*array.shape[:axis], -1, size, *array.shape[axis + 1 :])


def _join(blocks: jax.Array, axis: int) -> jax.Array:
    """``(.., k / size, size, ..)`` to ``(.., k, ..)``."""
    return blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])


def _round_up_bfloat16(scale: jax.Array) -> jax.Array:
    """The next bfloat16, so that no code exceeds the largest; NaN stays NaN."""
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    upper = jax.lax.bitcast_convert_type(
        (bits + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000), jnp.float32
    )
    return jnp.where(jnp.isfinite(scale), upper, scale).astype(jnp.bfloat16)


def _pack(codes: jax.Array, axis: int) -> jax.Array:
    """Two halves of a block to the low and the high four bits of its bytes."""
    low, high = jnp.split(_split(codes, axis, BLOCK), 2, axis=axis + 1)
    return _join((low & 0x0F) | (high << 4), axis)


def _unpack(packed: jax.Array, axis: int) -> jax.Array:
    halves = _split(packed, axis, BLOCK // 2)
    low, high = (halves << 4) >> 4, halves >> 4
    return _join(jnp.concatenate([low, high], axis=axis + 1), axis)
