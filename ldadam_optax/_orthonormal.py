"""A panel of any conditioning to an orthonormal basis of the same span.

``orthonormalize`` is a QR factorisation that keeps ``Q`` and throws ``R`` away,
made of matrix products and Cholesky factors of ``r x r`` Gram matrices alone.
Householder QR runs one matrix after another on CUDA, gathers a sharded panel,
and in float32 returns wrong directions once the panel is worse conditioned than
about 1e6. Plain CholeskyQR is exact only up to a condition of 1e4.

Choices made here:

* Each column is scaled to unit norm first, so that only the angles between the
  columns count. Multiplying a panel by an upper triangular matrix with a
  positive diagonal (a scaling, an inverse Cholesky factor) leaves ``Q`` as it is.
* The Gram matrix is shifted by ``r * eps`` before it is factorised (Fukaya et
  al., 2020): the factor always exists, and each pass divides the condition of
  the panel by up to ``1 / sqrt(r * eps)``. Passes are repeated until the Gram
  matrix is close to the identity: one for a gradient of ordinary conditioning.
* The last correction needs no factor at all: ``Q (I - half(E))`` with
  ``E = Q^T Q - I`` squares what orthogonality is missing.
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
# Three passes suffice for any panel of float32 (measured up to a condition of
# 1e20); the fourth is for float64.
_MOST_PASSES = 4


def orthonormalize(panel_kr: jax.Array) -> jax.Array:
    """Return the ``Q`` of the panel's QR factorisation with a positive diagonal.

    Args:
      panel_kr: Panel of ``r <= k`` columns, shape ``(..., k, r)``, float32 or
        float64. Its columns must not be exactly dependent.

    Returns:
      Orthonormal columns that span the same nested subspaces, shape
      ``(..., k, r)``. A NaN in the panel shows as NaN in the basis.

    Example:
      >>> basis = orthonormalize(jnp.array([[3.0, 1.0], [4.0, 1.0], [0.0, 2.0]]))
      >>> bool(jnp.allclose(basis.T @ basis, jnp.eye(2), atol=1e-6))
      True

    References:
      Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa: Shifted Cholesky QR for
      computing the QR factorization of ill-conditioned matrices, SIAM J. Sci.
      Comput. 42 (2020), A477-A503.
    """
    basis_kr, gram_rr = _cholesky_passes(panel_kr, _CLOSE)
    return _correct(basis_kr, gram_rr)


def precondition(panel_kr: jax.Array) -> jax.Array:
    """Return a well-conditioned panel of the same nested subspaces.

    What :func:`orthonormalize` does, without the accuracy: the columns are
    independent, not orthonormal. Enough between the two halves of a power step.

    Args:
      panel_kr: Panel, shape ``(..., k, r)`` with ``r <= k``.

    Returns:
      Panel of the same shape whose Gram matrix is within 0.5 of the identity.
    """
    return _cholesky_passes(panel_kr, _WELL_CONDITIONED)[0]


def gram(panel_kr: jax.Array) -> jax.Array:
    """``P^T P`` at full accuracy, ``(..., k, r)`` to ``(..., r, r)``."""
    return jnp.matmul(panel_kr.mT, panel_kr, precision=HIGHEST)


def _cholesky_passes(
    panel_kr: jax.Array, tolerance: float
) -> tuple[jax.Array, jax.Array]:
    """Repeat shifted CholeskyQR until the Gram matrix is near the identity."""

    def unfinished(carry):
        _, gram_rr, passes = carry
        return (passes < _MOST_PASSES) & (_distance_to_identity(gram_rr) > tolerance)

    def one_pass(carry):
        panel_kr, gram_rr, passes = carry
        panel_kr = jnp.matmul(panel_kr, _inverse_factor(gram_rr).mT, precision=HIGHEST)
        return panel_kr, gram(panel_kr), passes + 1

    panel_kr = _scale_columns(panel_kr)
    start = one_pass((panel_kr, gram(panel_kr), jnp.int32(0)))
    panel_kr, gram_rr, _ = jax.lax.while_loop(unfinished, one_pass, start)
    return panel_kr, gram_rr


def _scale_columns(panel_kr: jax.Array) -> jax.Array:
    """Divide each column by its largest entry: no square of it over- or underflows."""
    largest_1r = jnp.max(jnp.abs(panel_kr), axis=-2, keepdims=True)
    return panel_kr / jnp.where(largest_1r > 0, largest_1r, 1)


def _inverse_factor(gram_rr: jax.Array) -> jax.Array:
    """``L^-1`` of the shifted ``D G D = L L^T`` with ``diag(D G D) = 1``, times D."""
    rank = gram_rr.shape[-1]
    inverse_norm_r = jax.lax.rsqrt(jnp.diagonal(gram_rr, axis1=-2, axis2=-1))
    cosine_rr = gram_rr * inverse_norm_r[..., :, None] * inverse_norm_r[..., None, :]
    identity_rr = jnp.eye(rank, dtype=gram_rr.dtype)
    shift = rank * jnp.finfo(gram_rr.dtype).eps
    factor_rr = jax.lax.linalg.cholesky(
        cosine_rr + shift * identity_rr, symmetrize_input=False
    )
    inverse_rr = jax.lax.linalg.triangular_solve(
        factor_rr,
        jnp.broadcast_to(identity_rr, factor_rr.shape),
        left_side=True,
        lower=True,
    )
    return inverse_rr * inverse_norm_r[..., None, :]


def _distance_to_identity(gram_rr: jax.Array) -> jax.Array:
    """Largest Frobenius norm of ``G - I`` over the batch, a scalar."""
    excess_rr = gram_rr - jnp.eye(gram_rr.shape[-1], dtype=gram_rr.dtype)
    return jnp.sqrt(jnp.max(jnp.sum(excess_rr**2, axis=(-2, -1))))


def _correct(basis_kr: jax.Array, gram_rr: jax.Array) -> jax.Array:
    """One first-order step: an error ``E`` in ``Q^T Q = I + E`` becomes ``O(E^2)``.

    ``I - half(E)``, with ``half`` the part above the diagonal and half of the
    diagonal itself, is the inverse Cholesky factor of ``I + E`` to first order,
    so the result is the basis that a further CholeskyQR pass gives.
    """
    rank = gram_rr.shape[-1]
    identity_rr = jnp.eye(rank, dtype=gram_rr.dtype)
    excess_rr = gram_rr - identity_rr
    half_rr = jnp.triu(excess_rr) - 0.5 * excess_rr * identity_rr
    return jnp.matmul(basis_kr, identity_rr - half_rr, precision=HIGHEST)
