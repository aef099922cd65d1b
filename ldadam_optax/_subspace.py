"""The subspace of a leaf: where it starts, how it moves, how coordinates change.

The basis follows the matrix ``B = rho M'/(1 - b1^(t-1)) + (1 - rho) a``. It is
never formed. With ``signal = a + k M'``, which is what the step has at hand
(``_error_feedback.py``), it is ``B = alpha signal + gamma U' mu'``, and products
with it are one product with ``signal`` and one of rank ``r``.

Choices that the paper leaves open:

* The basis starts at random and the first step is a power step like any other,
  so no decomposition is compiled; ``subspace_init='svd'`` is the published start.
* A direction that ``B`` says nothing of stays what it was: the panel is
  ``B V + tau U'`` with ``tau`` the size of its rounding errors. As the first ``j``
  columns of ``V`` span those of ``B^T U'``, ``U'^T (B V)`` is upper triangular with
  a positive diagonal, so the panel never loses rank, and ``B = 0`` returns ``U'``.
* A column of ``B^T U'`` that vanishes while ``B`` does not would never move again.
  Noise of the size of its rounding errors makes it look for a new direction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._orthonormal import HIGHEST, orthonormalize, precondition
from ldadam_optax._random import random_uniform

SUBSPACES = ("power_iteration", "svd", "randomized_svd")
SUBSPACE_INITS = ("randomized", "svd")

# Columns of the randomized SVD's sketch beyond the rank; Halko, Martinsson, Tropp
# (2011), section 1.3, advise 5 or 10.
_OVERSAMPLING = 8


class Tracked(NamedTuple):
    """The matrix ``B = alpha signal + gamma U' mu'`` that the basis follows.

    Attributes:
      signal: ``a + k M'``, in the leaf's shape.
      alpha: Weight of the signal, scalar.
      gamma: Weight of the momentum beside it, scalar.
      basis_mr: ``U'``, shape ``(batch.., m, r)``.
      mu_rn: ``mu'``, shape ``(batch.., r, n)``.
    """

    signal: jax.Array
    alpha: jax.Array
    gamma: jax.Array
    basis_mr: jax.Array
    mu_rn: jax.Array

    def image(self, view: MatrixView, panel_rn: jax.Array) -> jax.Array:
        """``(B V)^T`` of ``V^T``: ``(batch.., r, n)`` to ``(batch.., r, m)``."""
        inner_rr = jnp.matmul(panel_rn, self.mu_rn.mT, precision=HIGHEST)
        rest_rm = jnp.matmul(inner_rr, self.basis_mr.mT, precision=HIGHEST)
        product_rm = view.contract(self.signal, panel_rn, precision=HIGHEST)
        return self.alpha * product_rm + self.gamma * rest_rm

    def preimage(self, view: MatrixView, panel_rm: jax.Array) -> jax.Array:
        """``P^T B`` of ``P^T``: ``(batch.., r, m)`` to ``(batch.., r, n)``."""
        inner_rr = jnp.matmul(panel_rm, self.basis_mr, precision=HIGHEST)
        rest_rn = jnp.matmul(inner_rr, self.mu_rn, precision=HIGHEST)
        product_rn = view.project(self.signal, panel_rm.mT, precision=HIGHEST)
        return self.alpha * product_rn + self.gamma * rest_rn

    def coordinates(self, view: MatrixView) -> jax.Array:
        """``U'^T B``, shape ``(batch.., r, n)``: ``U'^T U' = I`` saves two products."""
        product_rn = view.project(self.signal, self.basis_mr, precision=HIGHEST)
        return self.alpha * product_rn + self.gamma * self.mu_rn

    def matrix(self, view: MatrixView) -> jax.Array:
        """``B`` itself, shape ``(batch.., m, n)``; for an exact SVD only."""
        momentum = view.lift(self.basis_mr, self.mu_rn, precision=HIGHEST)
        return view.to_matrix(self.alpha * self.signal + self.gamma * momentum)


def random_basis(view: MatrixView, key: jax.Array, dtype) -> jax.Array:
    """Return a random orthonormal basis, shape ``(batch.., m, r)``."""
    return orthonormalize(jax.random.normal(key, view.basis_shape, dtype).mT).mT


def next_basis(
    view: MatrixView,
    tracked: Tracked,
    count: jax.Array,
    seed: jax.Array,
    *,
    subspace: str,
    subspace_init: str,
) -> jax.Array:
    """Return the basis ``U`` of this step.

    Args:
      view: The leaf as a matrix.
      tracked: The matrix to follow, with the basis of the step before.
      count: Steps taken before this one, int32 scalar.
      seed: Seeds what revives lost directions, uint32 scalar.
      subspace: One of :data:`SUBSPACES`.
      subspace_init: One of :data:`SUBSPACE_INITS`.

    Returns:
      Orthonormal basis, shape ``(batch.., m, r)``. The signs of its columns are
      arbitrary. Where ``tracked`` is zero it is the basis of the step before.
    """
    advance = {
        "power_iteration": power_step,
        "svd": svd_basis,
        "randomized_svd": randomized_svd_basis,
    }[subspace]
    if subspace_init == "svd" and subspace != "svd":
        return jax.lax.cond(
            count == 0,
            lambda: svd_basis(view, tracked, seed),
            lambda: advance(view, tracked, seed),
        )
    return advance(view, tracked, seed)


def power_step(view: MatrixView, tracked: Tracked, seed: jax.Array) -> jax.Array:
    """Take one warm-started block power step, ``orthonormalize(B (B^T U'))``.

    Orthonormalising between the two products keeps float32 from squaring the
    condition of ``B``, and leaves the result what it is: ``V = B^T U' R^-1`` with
    ``R`` upper triangular.
    """
    panel_rn = _unit(tracked.coordinates(view))
    eps = jnp.finfo(panel_rn.dtype).eps
    panel_rn += eps * random_uniform(panel_rn.shape, seed, panel_rn.dtype)
    image_rm = tracked.image(view, precondition(panel_rn))
    return _filled_basis(image_rm, tracked.basis_mr.mT).mT


def svd_basis(view: MatrixView, tracked: Tracked, seed: jax.Array) -> jax.Array:
    """Return the leading left singular vectors of ``B``."""
    del seed
    matrix_mn = tracked.matrix(view)
    vectors_mk = jnp.linalg.svd(matrix_mn, full_matrices=view.n < view.rank)[0]
    return jnp.where(
        _largest(matrix_mn) == 0, tracked.basis_mr, vectors_mk[..., : view.rank]
    )


def randomized_svd_basis(
    view: MatrixView, tracked: Tracked, seed: jax.Array
) -> jax.Array:
    """Approximate the leading left singular vectors of ``B`` from a random sketch.

    A sketch ``B Omega`` of ``r + 8`` columns, one power step, and a rotation to the
    singular vectors within it.

    References:
      Halko, Martinsson, Tropp: Finding structure with randomness, SIAM Review 53
      (2011), algorithms 4.4 and 5.1.
    """
    width = min(view.rank + _OVERSAMPLING, view.m)
    dtype = tracked.mu_rn.dtype
    noise = random_uniform((*view.batch_shape, width, view.n + view.m), seed, dtype)
    panel_kn, fill_km = noise[..., : view.n], noise[..., view.n :]
    fill_km = fill_km.at[..., : view.rank, :].set(tracked.basis_mr.mT)
    sketch_km = _filled_basis(tracked.image(view, panel_kn), fill_km)
    panel_kn = tracked.preimage(view, sketch_km)
    sketch_km = _filled_basis(tracked.image(view, panel_kn), fill_km)
    panel_kn = tracked.preimage(view, sketch_km)
    rotation_kk = jnp.linalg.svd(panel_kn, full_matrices=view.n < width)[0]
    basis_mk = jnp.matmul(sketch_km.mT, rotation_kk, precision=HIGHEST)
    return jnp.where(
        _largest(panel_kn) == 0, tracked.basis_mr, basis_mk[..., : view.rank]
    )


def change_of_basis(basis_mr: jax.Array, prev_basis_mr: jax.Array) -> jax.Array:
    """``Q = U^T U'``, shape ``(batch.., r, r)``."""
    return jnp.matmul(basis_mr.mT, prev_basis_mr, precision=HIGHEST)


def _filled_basis(panel_rm: jax.Array, fill_rm: jax.Array) -> jax.Array:
    """Orthonormalise, with the rows of ``fill`` where the panel is lost in rounding."""
    tau = jnp.finfo(panel_rm.dtype).eps * panel_rm.shape[-1] ** 0.5
    return orthonormalize(_unit(panel_rm) + tau * fill_rm)


def _unit(matrix: jax.Array) -> jax.Array:
    """Divide by the largest entry, so that no square under- or overflows."""
    largest = _largest(matrix)
    return matrix / jnp.where(largest == 0, 1, largest)


def _largest(matrix: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
