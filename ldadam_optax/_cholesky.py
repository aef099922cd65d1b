"""The inverse Cholesky factor, as each backend computes it best.

* A GPU takes XLA's two calls, batched over all matrices.
* XLA cuts a factor of more than 128 rows into blocks for a TPU, and a triangular solve
  once more, in a loop. Cutting in halves here needs neither: the inverse of the first
  half's factor makes what is left of the second half.
* On the CPU, BLAS starts threads for a triangular solve, which fight with XLA's for the
  cores: a quarter to a third of a step at rank 128. There the inverse is read off a
  bordered factor, of halves likewise.

What it costs to keep: this module, and a choice by platform in the program. To measure
it again: ``python -m benchmarks.tpu_cycles`` and ``benchmarks.step_time`` with
:func:`inverse_cholesky` replaced by :func:`_by_solve`. To delete when those figures are
no worse.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ldadam_optax._lapack import one_by_one
from ldadam_optax._precision import matmul

# Rows up to which a factor is taken whole: XLA's block for a TPU, and where a bordered
# factor on the CPU still beats halves.
_TPU_BLOCK = 128
_CPU_BLOCK = 96
# The border over 1/eps: beyond the inverse of any Gram matrix shifted by a few eps.
_BORDER = 1e3


def inverse_cholesky(gram_rr: jax.Array) -> jax.Array:
    """``L^-1`` of ``L L^T = G``, ``(..., r, r)``; NaN where G is indefinite."""
    return jax.lax.platform_dependent(
        gram_rr,
        cpu=functools.partial(_by_halves, whole=_by_border, largest=_CPU_BLOCK),
        tpu=functools.partial(_by_halves, whole=_by_solve, largest=_TPU_BLOCK),
        default=_by_solve,
    )


def _by_halves(
    gram_rr: jax.Array, whole: Callable[[jax.Array], jax.Array], largest: int
) -> jax.Array:
    """``L^-1 = [[X, 0], [-Y C X, Y]]`` of ``L = [[X^-1, 0], [C, Y^-1]]``."""
    rows = gram_rr.shape[-1]
    if rows <= largest:
        return whole(gram_rr)
    half = -(-rows // 2)
    x = _by_halves(gram_rr[..., :half, :half], whole, largest)
    c = matmul(gram_rr[..., half:, :half], x.mT)
    rest = gram_rr[..., half:, half:] - matmul(c, c.mT)
    y = _by_halves(rest, whole, largest)
    corner = -matmul(y, matmul(c, x))
    upper = jnp.concatenate([x, jnp.zeros_like(c.mT)], axis=-1)
    lower = jnp.concatenate([corner, y], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def _by_solve(gram_rr: jax.Array) -> jax.Array:
    eye_rr = jnp.eye(gram_rr.shape[-1], dtype=gram_rr.dtype)
    return jax.lax.linalg.triangular_solve(
        jax.lax.linalg.cholesky(gram_rr, symmetrize_input=False),
        jnp.broadcast_to(eye_rr, gram_rr.shape),
        left_side=True,
        lower=True,
    )


def _by_border(gram_rr: jax.Array) -> jax.Array:
    """``[[G, I], [I, c I]]``, c large, has the factor ``[[L, 0], [L^-T, .]]``."""
    rows = gram_rr.shape[-1]
    i, j = (
        jax.lax.broadcasted_iota(jnp.int32, (2 * rows, 2 * rows), k) for k in (0, 1)
    )
    large = _BORDER / jnp.finfo(gram_rr.dtype).eps
    border = jnp.where(i == j, jnp.where(i < rows, 0, large), abs(i - j) == rows)
    padding = [(0, 0)] * (gram_rr.ndim - 2) + [(0, rows)] * 2
    padded = jnp.pad(gram_rr, padding)
    bordered = padded + jnp.broadcast_to(border.astype(padded.dtype), padded.shape)
    cholesky = functools.partial(jax.lax.linalg.cholesky, symmetrize_input=False)
    factor = one_by_one(cholesky, bordered)
    return factor[..., rows:, :rows].mT
