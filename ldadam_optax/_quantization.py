"""Storage: how an array of the state is kept between steps, in as few bits as asked.

A :class:`Codec` turns an array into codes and scales and back. What is kept across
many steps is rounded stochastically: rounding to nearest would drop each contribution
that is small beside what is stored, the same way every step. The random bits are a hash
of the step and of the position (``_random.py``): the same on each machine and mesh.

================  ==========================================================  =========
codec             what is stored                                              bytes
================  ==========================================================  =========
``float32``, ..   the array, cast to nearest                                  4, 8, 2
``bfloat16``      the array, rounded stochastically                           2
``int8``          blocks of 32 on a uniform grid, subtractive dither          1.0625
``int4``          the same with 16 levels, two codes to a byte                0.5625
``int8`` of mu    blocks of 32, companded by ``2 x / (1 + |x|)``              1.0625
``int8`` of nu    blocks of 32, the square root on 256 levels                 1.0625
================  ==========================================================  =========

* *Subtractive dither* (Roberts 1962): the reader knows the random bits too and takes
  them off again, which halves the variance. The error buffer is stored so.
* *Moments* are rounded stochastically without it, so that zero is stored as zero, also
  where a neighbour of the same block is not: rows of an embedding that no token touches
  stay as they are. Companding and the square root follow FlashOptim
  (arXiv:2602.23349, section 3); uniform levels of nu diverge there. A second moment is
  read as at least half a level of its block: none is known better, and Adam divides by
  its root.
* A block's scale is a bfloat16. The axis that is cut into blocks is not the last one
  where another is divided by 32 (:func:`block_axis`): an accelerator keeps the last
  axis in its vector lanes, and cutting it means moving every element.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax._random import random_bits

BLOCK = 32
# The block's largest entry, in units. With dither of at most half a unit on either side
# int4 takes each of its sixteen codes, and int8 has half a unit to spare at its ends.
_LARGEST = {"int8": 127.0, "int4": 7.5}
_SQUARE_ROOT_LEVELS = 255.0
# Padding of less than one part in this many costs less than the last axis would.
_NEGLIGIBLE = 160


class Stored(NamedTuple):
    """An array as the state keeps it.

    Attributes:
      codes: The array itself in a float dtype, or int8 codes.
      scale: bfloat16, one for each block of codes; None for float dtypes.
    """

    codes: Any
    scale: Any = None


class Codec(NamedTuple):
    """One way to store arrays.

    Attributes:
      encode: ``(array, axis, seed)`` to :class:`Stored`; ``axis`` is cut into blocks.
      decode: ``(stored, axis, shape, seed)`` to an array of ``shape``, float32 or
      wider,
        given the seed of ``encode``.
      shapes: ``(shape, axis)`` to :class:`Stored` of ``jax.ShapeDtypeStruct``.
      exact: ``decode`` returns what ``encode`` was given, in the arithmetic's dtype.
    """

    encode: Callable[[jax.Array, int, jax.Array], Stored]
    decode: Callable[[Stored, int, tuple[int, ...], jax.Array], jax.Array]
    shapes: Callable[[tuple[int, ...], int], Stored]
    exact: Callable[[str], bool] = lambda dtype: False


def float_codec(dtype: str) -> Codec:
    """The array in another float dtype, rounded to nearest."""
    return Codec(
        encode=lambda array, axis, seed: Stored(array.astype(dtype)),
        decode=lambda stored, axis, shape, seed: stored.codes,
        shapes=lambda shape, axis: Stored(jax.ShapeDtypeStruct(shape, dtype)),
        exact=lambda compute_dtype: compute_dtype == dtype,
    )


def quantizer(
    dtype: str,
    compress: Callable[[jax.Array], jax.Array] | None = None,
    expand: Callable[[jax.Array], jax.Array] | None = None,
    *,
    low_bits: bool = False,
) -> Codec:
    """Blocks of 32 in int8 or int4, on a uniform or a companded grid.

    Args:
      dtype: ``'int8'`` or ``'int4'``.
      compress: Map of ``array / scale``, within [-1, 1], to codes from -128 to 127,
        not yet rounded; None for a uniform grid with subtractive dither.
      expand: Its inverse, of the rounded codes.
      low_bits: Round by the lower half of the random bits, so that two arrays of one
        seed are rounded independently.
    """

    def shapes(shape: tuple[int, ...], axis: int) -> Stored:
        blocks = -(-shape[axis] // BLOCK)
        per_block = BLOCK if dtype == "int8" else BLOCK // 2
        before, after = shape[:axis], shape[axis + 1 :]
        codes = jax.ShapeDtypeStruct((*before, blocks * per_block, *after), jnp.int8)
        scale = jax.ShapeDtypeStruct((*before, blocks, *after), jnp.bfloat16)
        return Stored(codes, scale)

    def encode(array: jax.Array, axis: int, seed: jax.Array) -> Stored:
        array = array.astype(jnp.float32)
        blocks = _split(_pad_to_blocks(array, axis), axis, BLOCK)
        largest = jnp.max(jnp.abs(blocks), axis=axis + 1)
        unit = largest if compress else largest / _LARGEST[dtype]
        scale = _round_up_bfloat16(unit)
        unit = jnp.where(scale == 0, 1, scale).astype(array.dtype)
        exact = array / _spread(unit, axis, array.shape)
        exact = compress(exact) if compress else exact
        dither = _dither(array.shape, seed, low_bits)
        dither = dither + 0.5 if compress else dither  # floor of uniform in (0, 1)
        codes = jnp.floor(exact + dither).astype(jnp.int8)
        codes = _pad_to_blocks(codes, axis)
        return Stored(_pack(codes, axis) if dtype == "int4" else codes, scale)

    def decode(
        stored: Stored, axis: int, shape: tuple[int, ...], seed: jax.Array
    ) -> jax.Array:
        codes, scale = stored
        assert scale is not None
        codes = _unpack(codes, axis) if dtype == "int4" else codes
        codes = jax.lax.slice_in_dim(codes, 0, shape[axis], axis=axis)
        exact = codes.astype(jnp.float32)
        exact = expand(exact) if expand else exact + (0.5 - _dither(shape, seed))
        return exact * _spread(scale.astype(jnp.float32), axis, shape)

    return Codec(encode, decode, shapes)


def _compress_mu(x: jax.Array) -> jax.Array:
    return _LARGEST["int8"] * 2 * x / (1 + jnp.abs(x))


def _expand_mu(codes: jax.Array) -> jax.Array:
    y = codes / _LARGEST["int8"]
    return y / (2 - jnp.abs(y))


def _compress_nu(x: jax.Array) -> jax.Array:
    return _SQUARE_ROOT_LEVELS * jnp.sqrt(x) - 128


def _expand_nu(codes: jax.Array) -> jax.Array:
    return (jnp.maximum(codes + 128, 0.5) / _SQUARE_ROOT_LEVELS) ** 2


def _stochastic_bfloat16() -> Codec:
    plain = float_codec("bfloat16")
    round_ = lambda array, axis, seed: Stored(
        round_to_bfloat16(array.astype(jnp.float32), seed)
    )
    return plain._replace(encode=round_)


_FLOATS = {name: float_codec(name) for name in ("float32", "float64", "float16")}
#: Storage of the error, by the name of ``error_dtype``.
ERROR_CODECS: dict[str, Codec] = {
    **_FLOATS,
    "bfloat16": _stochastic_bfloat16(),
    "int8": quantizer("int8"),
    "int4": quantizer("int4"),
}
_MOMENT_FLOATS = {**_FLOATS, "bfloat16": float_codec("bfloat16")}
#: Storage of the first moment, by the name of ``mu_dtype``.
MU_CODECS: dict[str, Codec] = {
    **_MOMENT_FLOATS,
    "int8": quantizer("int8", _compress_mu, _expand_mu),
}
#: Storage of the second moment, by the name of ``nu_dtype``.
NU_CODECS: dict[str, Codec] = {
    **_MOMENT_FLOATS,
    "int8": quantizer("int8", _compress_nu, _expand_nu, low_bits=True),
}
#: Float dtypes of a basis.
FLOATS = ("float32", "bfloat16", "float16", "float64")


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


def round_to_bfloat16(array: jax.Array, seed: jax.Array) -> jax.Array:
    """Round float32 to bfloat16 stochastically: add 16 random bits and cut 16."""
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    noise = random_bits(array.shape, seed) >> 16
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    result = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(array), result, array).astype(jnp.bfloat16)


def _dither(
    shape: tuple[int, ...], seed: jax.Array, low_bits: bool = False
) -> jax.Array:
    """Uniform in (-1/2, 1/2), of 16 bits: the ends are farther than any rounding."""
    bits = random_bits(shape, seed)
    bits = (bits & 0xFFFF if low_bits else bits >> 16).astype(jnp.float32)
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
