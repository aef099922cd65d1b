"""What projection lost from the gradient and from the momentum, and how it is kept.

The paper's error is ``e = a - U ghat + c (U' mu' - U mhat)``, ``c = b1/(1 - b1)``.
A step needs it only through the signal ``a' + c M`` of the next step, with
``a' = g' + e`` and the momentum ``M = U mu``. In the dtype of the arithmetic the
buffer therefore holds ``s = e + c M``:

    signal = g + s',     s = signal - U mu

one product less than keeping ``e``, and a gradient is consumed by adding it into
the buffer, which is where micro-batches can be accumulated too. As ``U^T e = 0``,
``e = (I - U U^T) s`` whenever it is wanted.

In fewer bits the buffer holds ``e``, whose part within the basis is exactly zero
and need not be rounded; ``s`` is then made again with one more product:

    signal = g + e' + c U' mu',     e = signal - U (U^T signal)

Both products run at ``Precision.HIGH`` there, three passes of bfloat16 on a TPU and
TF32 on a GPU: finer than the codes, and a TPU compiles it in a third less time.

Without error feedback the signal is the gradient, and ``c`` is zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax import _few_bits
from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._orthonormal import HIGHEST

FLOATS = ("float32", "bfloat16", "float16", "float64")
FEW_BITS = ("int8", "int4")
_HIGH = jax.lax.Precision.HIGH


class ErrorBuffer(NamedTuple):
    """The stored error of one leaf.

    Attributes:
      error: Leaf-shaped, ``s`` in the dtype of the arithmetic or ``e`` in fewer
        bits; int8 codes of ``_few_bits.encoded_shapes`` for int8 and int4.
      scale: bfloat16, one for each block of codes; None for float dtypes.
    """

    error: Any
    scale: jax.Array | None = None


def momentum_weight(b1: jax.Array, error_feedback: bool) -> jax.Array:
    """``c = b1 / (1 - b1)``, the momentum's weight in the signal, or zero."""
    return b1 / (1 - b1) if error_feedback else jnp.zeros_like(b1)


def init_error(view: MatrixView, error_dtype: str) -> ErrorBuffer:
    """Return an empty buffer."""
    if error_dtype in FEW_BITS:
        axis = _block_axis(view)
        codes, scales = _few_bits.encoded_shapes(view.shape, error_dtype, axis)
        return ErrorBuffer(jnp.zeros(codes, jnp.int8), jnp.zeros(scales, jnp.bfloat16))
    return ErrorBuffer(jnp.zeros(view.shape, error_dtype))


def add_error(
    view: MatrixView,
    grad: jax.Array,
    buffer: ErrorBuffer,
    *,
    accumulated: bool,
    momentum_weight: jax.Array,
    basis_mr: jax.Array,
    mu_rn: jax.Array,
    seed: jax.Array,
) -> jax.Array:
    """Return the signal ``g + e' + c U' mu'``.

    Args:
      view: The leaf as a matrix.
      grad: ``g``, in the leaf's shape and the dtype of the arithmetic.
      buffer: What the step before has stored.
      accumulated: ``grad`` already contains a buffer that ``holds_momentum``.
      momentum_weight: ``c``.
      basis_mr: ``U'``, shape ``(batch.., m, r)``.
      mu_rn: ``mu'``, shape ``(batch.., r, n)``.
      seed: The seed under which the step before has stored.
    """
    if holds_momentum(buffer.error.dtype, grad.dtype):
        return grad if accumulated else grad + buffer.error
    momentum = view.lift(basis_mr, momentum_weight * mu_rn, precision=_HIGH)
    stored = _decode(view, buffer, seed)
    return grad + (stored.astype(grad.dtype) + momentum)


def store_error(
    view: MatrixView,
    signal: jax.Array,
    error_dtype: str,
    *,
    basis_mr: jax.Array,
    coords_rn: jax.Array,
    mu_rn: jax.Array,
    seed: jax.Array,
) -> ErrorBuffer:
    """Return what this step leaves over.

    Args:
      view: The leaf as a matrix.
      signal: ``a + c M'``, in the leaf's shape.
      error_dtype: One of :data:`FLOATS` or :data:`FEW_BITS`.
      basis_mr: ``U``, shape ``(batch.., m, r)``.
      coords_rn: ``U^T signal``, shape ``(batch.., r, n)``.
      mu_rn: ``mu``, shape ``(batch.., r, n)``.
      seed: Seeds the stochastic rounding, uint32 scalar.
    """
    if holds_momentum(error_dtype, signal.dtype):
        return ErrorBuffer(signal - view.lift(basis_mr, mu_rn, precision=HIGHEST))
    error = signal - view.lift(basis_mr, coords_rn, precision=_HIGH)
    if error_dtype in FEW_BITS:
        error = error.astype(jnp.float32)
        axis = _block_axis(view)
        return ErrorBuffer(*_few_bits.encode(error, error_dtype, axis, seed))
    if error_dtype == "bfloat16":
        error = error.astype(jnp.float32)
        return ErrorBuffer(_few_bits.round_to_bfloat16(error, seed))
    return ErrorBuffer(error.astype(error_dtype))


def read_error(
    view: MatrixView, buffer: ErrorBuffer, basis_mr: jax.Array, seed: jax.Array
) -> jax.Array:
    """Return ``e``: what is stored, less its part within the basis ``U``."""
    stored = _decode(view, buffer, seed)
    dtype = jnp.promote_types(stored.dtype, jnp.float32)
    stored, basis_mr = stored.astype(dtype), basis_mr.astype(dtype)
    coords_rn = view.project(stored, basis_mr, precision=HIGHEST)
    return stored - view.lift(basis_mr, coords_rn, precision=HIGHEST)


def holds_momentum(error_dtype: jax.typing.DTypeLike, dtype) -> bool:
    """True where the buffer is ``s = e + c M``, in the dtype of the arithmetic."""
    return error_dtype == dtype


def _decode(view: MatrixView, buffer: ErrorBuffer, seed: jax.Array) -> jax.Array:
    """Return the array in the leaf's shape, stored under this seed."""
    if buffer.scale is None:
        return buffer.error
    axis = _block_axis(view)
    return _few_bits.decode(buffer.error, buffer.scale, axis, view.shape, seed)


def _block_axis(view: MatrixView) -> int:
    """Blocks lie within a matrix: they mix no two of a batch."""
    return _few_bits.block_axis(view.shape, sorted(view.m_axes + view.n_axes))
