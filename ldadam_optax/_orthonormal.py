"""A panel of any conditioning to an orthonormal basis of the same span.

``orthonormalize`` is a QR factorisation that keeps ``Q`` and throws ``R`` away,
made of matrix products and Cholesky factors of ``r x r`` Gram matrices alone.
Householder QR runs one matrix after another on CUDA, gathers a sharded panel,
and in float32 returns wrong directions once the panel is worse conditioned than
about 1e6. Plain CholeskyQR is exact only up to a condition of 1e4.

Panels are kept as rows, ``(r, k)``: the long axis last, which accelerators store
without padding. Choices made here:

* Multiplying a panel by a lower triangular matrix with a positive diagonal (a
  scaling of its rows, an inverse Cholesky factor) leaves ``Q`` as it is. Rows are
  scaled to unit norm first, so that only the angles between them count.
* The Gram matrix is shifted by ``(r + 10) eps`` before it is factorised (Fukaya et
  al., 2020), and each pass divides the condition of the panel by up to
  ``1 / sqrt(r eps)``. Passes are repeated until the Gram matrix is close to the
  identity: one or two for a gradient of ordinary conditioning. Where rounding makes a
  Gram matrix indefinite all the same, the pass is taken again with a larger shift.
* The last correction needs no factor at all: ``(I - half(E)) Q`` with
  ``E = Q Q^T - I`` squares what orthogonality is missing.
* All products run at float32 accuracy (``Precision.HIGHEST``) on each backend.
"""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST

# Distance of the Gram matrix from the identity at which the passes stop. A basis
# that is kept is corrected once more, to the square of it; an intermediate basis
# only has to be well conditioned.
_CLOSE = 1e-3
_WELL_CONDITIONED = 0.5
# Three passes suffice for a panel of float32 of any condition (measured up to 1e20);
# more are for float64 and for a shift that rounding has beaten and that is raised.
_MOST_PASSES = 8
_RAISE_SHIFT = 32.0

# Ranks up to which an inverse factor is read off a bordered Cholesky factor, or in
# halves off two, and the border over 1/eps: beyond the inverse of any Gram matrix that
# is shifted by a few eps.
_LARGEST_BORDERED = 96
_BORDER = 1e3


def orthonormalize(panel_rk: jax.Array) -> jax.Array:
    """Orthonormalise rows one after another: ``Q^T`` of the QR of the transpose.

    Args:
      panel_rk: ``r <= k`` independent rows whose norms neither under- nor overflow
        when squared, shape ``(..., r, k)``, float32 or float64.

    Returns:
      Orthonormal rows of which the first ``j`` span what the first ``j`` of the
      panel span, with positive inner products, shape ``(..., r, k)``. A NaN in the
      panel shows as NaN.

    Example:
      >>> rows = orthonormalize(jnp.array([[3.0, 4.0, 0.0], [1.0, 1.0, 2.0]]))
      >>> bool(jnp.allclose(rows @ rows.T, jnp.eye(2), atol=1e-6))
      True

    References:
      Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa: Shifted Cholesky QR for
      computing the QR factorization of ill-conditioned matrices, SIAM J. Sci.
      Comput. 42 (2020), A477-A503.
    """
    return _correct(*_cholesky_passes(panel_rk, _CLOSE))


def precondition(panel_rk: jax.Array) -> jax.Array:
    """Return well-conditioned rows of the same nested spans.

    What :func:`orthonormalize` does, without the accuracy: the rows are independent,
    not orthonormal. Enough between the two halves of a power step.

    Args:
      panel_rk: As for :func:`orthonormalize`.

    Returns:
      Rows whose Gram matrix is within 0.5 of the identity, shape ``(..., r, k)``.
    """
    return _cholesky_passes(panel_rk, _WELL_CONDITIONED)[0]


def _cholesky_passes(
    panel_rk: jax.Array, tolerance: float
) -> tuple[jax.Array, jax.Array]:
    """Repeat shifted CholeskyQR until the Gram matrix is near the identity."""

    def unfinished(carry):
        _, gram_rr, _, passes = carry
        far = jnp.any(_distance_to_identity(gram_rr) > tolerance)
        return (passes == 0) | (far & (passes < _MOST_PASSES))

    def one_pass(carry):
        panel_rk, gram_rr, shift_11, passes = carry
        inverse_rr = _inverse_factor(gram_rr, shift_11)
        exists_11 = jnp.isfinite(inverse_rr[..., -1:, -1:])  # a NaN runs to the end
        inverse_rr = jnp.where(exists_11, inverse_rr, _identity(gram_rr))
        shift_11 = jnp.where(exists_11, shift_11, _RAISE_SHIFT * shift_11)
        panel_rk = jnp.matmul(inverse_rr, panel_rk, precision=HIGHEST)
        return panel_rk, _gram(panel_rk), shift_11, passes + 1

    rows, eps = panel_rk.shape[-2], jnp.finfo(panel_rk.dtype).eps
    shift_11 = jnp.full_like(panel_rk[..., :1, :1], (rows + 10) * eps)
    start = (panel_rk, _gram(panel_rk), shift_11, jnp.int32(0))
    return jax.lax.while_loop(unfinished, one_pass, start)[:2]


def _gram(panel_rk: jax.Array) -> jax.Array:
    """``P P^T``, ``(..., r, k)`` to ``(..., r, r)``."""
    return jnp.matmul(panel_rk, panel_rk.mT, precision=HIGHEST)


def _inverse_factor(gram_rr: jax.Array, shift_11: jax.Array) -> jax.Array:
    """``L^-1 D`` with ``L L^T = D G D + shift``, D making the diagonal of DGD one."""
    identity_rr = _identity(gram_rr)
    inverse_norm_r = jax.lax.rsqrt(jnp.sum(gram_rr * identity_rr, axis=-1))
    cosine_rr = gram_rr * inverse_norm_r[..., :, None] * inverse_norm_r[..., None, :]
    inverse_rr = _inverse_cholesky(cosine_rr + shift_11 * identity_rr)
    return inverse_rr * inverse_norm_r[..., None, :]


def _inverse_cholesky(gram_rr: jax.Array) -> jax.Array:
    """``L^-1`` of ``L L^T = G``, or NaN."""
    return jax.lax.platform_dependent(
        gram_rr, cpu=_inverse_without_solve, default=_inverse_by_solve
    )


def _inverse_by_solve(gram_rr: jax.Array) -> jax.Array:
    return jax.lax.linalg.triangular_solve(
        jax.lax.linalg.cholesky(gram_rr, symmetrize_input=False),
        _identity(gram_rr),
        left_side=True,
        lower=True,
    )


def _inverse_without_solve(gram_rr: jax.Array) -> jax.Array:
    """The same on the CPU, where BLAS starts threads for a triangular solve.

    They fight with XLA's for the cores: a quarter to a third of a step at rank 128. On
    a TPU the larger factors delay what waits for them, and gradients pile up.
    """
    rows = gram_rr.shape[-1]
    if rows <= _LARGEST_BORDERED:
        return _inverse_by_border(gram_rr)
    if rows <= 2 * _LARGEST_BORDERED:
        return _inverse_by_halves(gram_rr)
    return _inverse_by_solve(gram_rr)


def _inverse_by_border(gram_rr: jax.Array) -> jax.Array:
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
    factor = jax.lax.linalg.cholesky(bordered, symmetrize_input=False)
    return factor[..., rows:, :rows].mT


def _inverse_by_halves(gram_rr: jax.Array) -> jax.Array:
    """``L^-1 = [[X, 0], [-Y C X, Y]]`` of ``L = [[X^-1, 0], [C, Y^-1]]``."""
    half = gram_rr.shape[-1] // 2
    x = _inverse_by_border(gram_rr[..., :half, :half])
    c = jnp.matmul(gram_rr[..., half:, :half], x.mT, precision=HIGHEST)
    y = _inverse_by_border(gram_rr[..., half:, half:] - _gram(c))
    corner = -jnp.matmul(y, jnp.matmul(c, x, precision=HIGHEST), precision=HIGHEST)
    upper = jnp.concatenate([x, jnp.zeros_like(corner.mT)], axis=-1)
    lower = jnp.concatenate([corner, y], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def _distance_to_identity(gram_rr: jax.Array) -> jax.Array:
    """Frobenius norm of ``G - I``, one for each matrix of the batch."""
    excess_rr = gram_rr - _identity(gram_rr)
    return jnp.sqrt(jnp.sum(excess_rr**2, axis=(-2, -1)))


def _correct(basis_rk: jax.Array, gram_rr: jax.Array) -> jax.Array:
    """One first-order step: an error ``E`` in ``Q Q^T = I + E`` becomes ``O(E^2)``.

    ``I - half(E)``, with ``half`` the part below the diagonal and half of the
    diagonal itself, is the inverse Cholesky factor of ``I + E`` to first order, so
    the result is the basis that a further CholeskyQR pass gives.
    """
    identity_rr = _identity(gram_rr)
    excess_rr = gram_rr - identity_rr
    half_rr = jnp.tril(excess_rr) - 0.5 * excess_rr * identity_rr
    return jnp.matmul(identity_rr - half_rr, basis_rk, precision=HIGHEST)


def _identity(gram_rr: jax.Array) -> jax.Array:
    eye_rr = jnp.eye(gram_rr.shape[-1], dtype=gram_rr.dtype)
    return jnp.broadcast_to(eye_rr, gram_rr.shape)
