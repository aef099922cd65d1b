"""Panels of any conditioning to orthonormal bases of the same spans.

``orthonormalize`` is a QR factorisation that keeps ``Q`` and throws ``R`` away, made of
matrix products and Cholesky factors of ``r x r`` Gram matrices alone. Householder QR
runs one matrix after another on CUDA, gathers a sharded panel, and in float32 returns
wrong directions once the panel is worse conditioned than about 1e6. Plain CholeskyQR is
exact only up to a condition of 1e4.

A Gram matrix is ``r x r`` whatever the matrix it comes from. Functions here take a list
of panels, of different lengths and batch axes, and factorise the Gram matrices of all
that have one rank in one call (:func:`inverse_factors`).

Panels are kept as rows, ``(r, k)``: the long axis last, which accelerators store
without padding. Choices made here:

* Multiplying a panel by a lower triangular matrix with a positive diagonal (a scaling
  of its rows, an inverse Cholesky factor) leaves ``Q`` as it is. Rows are scaled to
  unit norm first, so that only the angles between them count.
* The Gram matrix is shifted by ``(r + 10) eps`` before it is factorised (Fukaya et al.,
  2020), and each pass divides the condition of the panel by up to ``1 / sqrt(r eps)``.
  Passes are repeated until the Gram matrices of all panels are close to the identity,
  in one loop for all: one pass for gradients of ordinary conditioning, three for
  float32 at any (measured up to 1e20). Where rounding makes a Gram matrix indefinite
  all the same, the pass is taken again with a larger shift.
* The last correction needs no factor at all: ``(I - half(E)) Q`` with ``E = Q Q^T - I``
  squares what orthogonality is missing.
* All products run at float32 accuracy on each backend.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ldadam_optax._cholesky import inverse_cholesky
from ldadam_optax._precision import matmul

# Distance of the Gram matrix from the identity at which the passes stop; the correction
# squares it.
_CLOSE = 1e-3
# More than float32 needs: for float64, and for a shift that rounding has beaten.
_MOST_PASSES = 8
_RAISE_SHIFT = 32.0


def orthonormalize(panels_rk: Sequence[jax.Array]) -> list[jax.Array]:
    """Orthonormalise rows one after another: ``Q^T`` of the QR of each transpose.

    Args:
      panels_rk: Panels of ``r <= k`` independent rows whose norms neither under- nor
        overflow when squared, each of shape ``(..., r, k)``, float32 or float64.

    Returns:
      Panels of orthonormal rows of which the first ``j`` span what the first ``j`` of
      the panel span, with positive inner products. A NaN in a panel shows as NaN.

    Example:
      >>> [rows] = orthonormalize([jnp.array([[3.0, 4.0, 0.0], [1.0, 1.0, 2.0]])])
      >>> bool(jnp.allclose(rows @ rows.T, jnp.eye(2), atol=1e-6))
      True

    References:
      Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa: Shifted Cholesky QR for
      computing the QR factorization of ill-conditioned matrices, SIAM J. Sci.
      Comput. 42 (2020), A477-A503.
    """
    pairs = zip(*_cholesky_passes(list(panels_rk)), strict=True)
    return [_correct(panel_rk, gram_rr) for panel_rk, gram_rr in pairs]


def preconditioners(panels_rk: Sequence[jax.Array]) -> list[jax.Array]:
    """Lower triangular factors that make the rows of each panel far from parallel.

    What one pass of :func:`orthonormalize` multiplies by, each of shape
    ``(..., r, r)``. Between the two halves of a power step conditioning is all that
    counts, and a factor can be applied after the product, to the shorter panel.
    """
    grams_rr = [_gram(panel_rk) for panel_rk in panels_rk]
    return inverse_factors(grams_rr, [_shift(panel_rk) for panel_rk in panels_rk])[0]


def _cholesky_passes(
    panels_rk: list[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Repeat shifted CholeskyQR until each Gram matrix is near the identity."""

    def unfinished(carry):
        _, grams_rr, _, passes = carry
        far = [jnp.any(_distance_to_identity(gram) > _CLOSE) for gram in grams_rr]
        return (passes == 0) | (jnp.any(jnp.stack(far)) & (passes < _MOST_PASSES))

    def one_pass(carry):
        panels_rk, grams_rr, shifts_11, passes = carry
        inverses_rr, shifts_11 = inverse_factors(grams_rr, shifts_11)
        panels_rk = [matmul(*pair) for pair in zip(inverses_rr, panels_rk, strict=True)]
        return panels_rk, list(map(_gram, panels_rk)), shifts_11, passes + 1

    if not panels_rk:
        return [], []
    start = panels_rk, list(map(_gram, panels_rk)), list(map(_shift, panels_rk))
    return jax.lax.while_loop(unfinished, one_pass, (*start, jnp.int32(0)))[:2]


def inverse_factors(
    grams_rr: Sequence[jax.Array], shifts_11: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """``L^-1 D`` with ``L L^T = D G D + shift``, D making the diagonal of DGD one.

    Args:
      grams_rr: Gram matrices, each of shape ``(..., r, r)``; those of one ``r`` and
        dtype are factorised in one call.
      shifts_11: Their shifts, each of shape ``(..., 1, 1)``.

    Returns:
      The inverse factors, or the identity where rounding made a matrix indefinite; and
      the shifts, raised there.
    """
    inverses_rr, shifts_11 = _in_one_batch(_inverse_factors, grams_rr, shifts_11)
    return inverses_rr, shifts_11


def _inverse_factors(gram_rr: jax.Array, shift_11: jax.Array) -> tuple[Any, Any]:
    """:func:`inverse_factors` of one batch."""
    identity_rr = _identity(gram_rr)
    inverse_norm_r = jax.lax.rsqrt(jnp.sum(gram_rr * identity_rr, axis=-1))
    rows_11, columns_11 = inverse_norm_r[..., :, None], inverse_norm_r[..., None, :]
    cosine_rr = gram_rr * rows_11 * columns_11
    inverse_rr = inverse_cholesky(cosine_rr + shift_11 * identity_rr)
    exists_11 = jnp.isfinite(inverse_rr[..., -1:, -1:])  # a NaN runs to the end
    return (
        jnp.where(exists_11, inverse_rr * columns_11, identity_rr),
        jnp.where(exists_11, shift_11, _RAISE_SHIFT * shift_11),
    )


def in_stacks(
    function: Callable[..., list[jax.Array]],
    placements: Sequence[Hashable],
    *lists: Sequence[jax.Array],
) -> list[jax.Array]:
    """``function`` of lists of panels, those alike stacked along a new first axis.

    A GPU launches one product for a stack, as it does for one panel.

    Args:
      function: Treats each panel by itself, whatever axes are in front.
      placements: Panels are stacked with others of their shapes and their placement.
      *lists: Panels, one list for each argument of ``function``.

    Returns:
      What ``function`` returns of the lists, to rounding.
    """
    keys = [
        (placement, *((panel.shape, panel.dtype) for panel in panels))
        for placement, *panels in zip(placements, *lists, strict=True)
    ]
    groups = _groups(keys)
    stacks = [
        [_stack([panels[i] for i in members]) for members in groups] for panels in lists
    ]
    results: list[Any] = [None] * len(placements)
    for members, stack in zip(groups, function(*stacks), strict=True):
        panels = stack if len(members) > 1 else [stack]
        for i, panel in zip(members, panels, strict=True):
            results[i] = panel
    return results


def _stack(panels: list[jax.Array]) -> jax.Array:
    return jnp.stack(panels) if len(panels) > 1 else panels[0]


def _in_one_batch(function, *lists: Sequence[jax.Array]) -> list[list[jax.Array]]:
    """Call ``function`` once for all matrices of one size and dtype, in one batch."""
    results: list[Any] = [None] * len(lists[0])
    for members in _groups([(x.shape[-1], x.dtype) for x in lists[0]]):
        chosen = [[matrices[i] for i in members] for matrices in lists]
        if len(members) == 1:  # its batch axes may be split over devices
            results[members[0]] = function(*[matrix for [matrix] in chosen])
            continue
        parts = function(*[jnp.concatenate(list(map(_flat, m))) for m in chosen])
        sizes = [math.prod(matrix.shape[:-2]) for matrix in chosen[0]]
        cuts = list(itertools.accumulate(sizes))[:-1]
        pieces = zip(*[jnp.split(part, cuts) for part in parts], strict=True)
        for i, piece in zip(members, pieces, strict=True):
            batch_shape = lists[0][i].shape[:-2]
            results[i] = [x.reshape(*batch_shape, *x.shape[1:]) for x in piece]
    return list(map(list, zip(*results, strict=True)))


def _groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """The places of each key."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _flat(matrix: jax.Array) -> jax.Array:
    """One batch axis."""
    return matrix.reshape(-1, *matrix.shape[-2:])


def _shift(panel_rk: jax.Array) -> jax.Array:
    rows, eps = panel_rk.shape[-2], jnp.finfo(panel_rk.dtype).eps
    return jnp.full_like(panel_rk[..., :1, :1], (rows + 10) * eps)


def _gram(panel_rk: jax.Array) -> jax.Array:
    """``P P^T``, ``(..., r, k)`` to ``(..., r, r)``."""
    return matmul(panel_rk, panel_rk.mT)


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
    return matmul(identity_rr - half_rr, basis_rk)


def _identity(gram_rr: jax.Array) -> jax.Array:
    eye_rr = jnp.eye(gram_rr.shape[-1], dtype=gram_rr.dtype)
    return jnp.broadcast_to(eye_rr, gram_rr.shape)
