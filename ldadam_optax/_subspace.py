"""The subspace of a matrix: where it starts, how it moves, how it is stored.

The basis follows the matrix ``B = rho M'/(1 - b1^(t-1)) + (1 - rho) a``. It is
never formed. With ``signal = a + c' M'``, which is what the step has at hand
(``_residual.py``), it is ``B = alpha signal + gamma U' mu'``, and products
with it are one product with ``signal`` and one of rank ``r``.

A :class:`SubspaceRule` in :data:`SUBSPACES` is one way to follow ``B``. Rules move the
bases of many matrices in one call, so that small factorisations can share it. That a
basis is kept as a dense ``(m, r)`` array is what the rules here choose; nothing outside
of a rule depends on it.

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

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._lapack import one_by_one
from ldadam_optax._orthonormal import in_stacks, orthonormalize, preconditioners
from ldadam_optax._precision import matmul, product
from ldadam_optax._random import random_uniform

SUBSPACE_INITS = ("randomized", "svd")

# Columns of the randomized SVD's sketch beyond the rank; Halko, Martinsson, Tropp
# (2011), section 1.3, advise 5 or 10.
_OVERSAMPLING = 8


class Tracked(NamedTuple):
    """The matrix ``B = alpha signal + gamma U' mu'`` that a basis follows.

    Attributes:
      view: The leaf as a matrix.
      signal: ``a + c' M'``, in the leaf's shape.
      alpha: Weight of the signal, scalar.
      gamma: Weight of the momentum beside it, scalar.
      prev_basis: ``U'``, shape ``(batch.., m, r)``.
      prev_mu: ``mu'``, shape ``(batch.., r, n)``.
      seed: Seeds what revives lost directions, uint32 scalar.
      precision: Precision of products with the signal.
      placement: Panels of matrices of one placement can be stacked.
    """

    view: MatrixView
    signal: jax.Array
    alpha: jax.Array
    gamma: jax.Array
    prev_basis: jax.Array
    prev_mu: jax.Array
    seed: jax.Array
    precision: str | None
    placement: Hashable

    def image(self, panel_rn: jax.Array) -> jax.Array:
        """``(B V)^T`` of ``V^T``: ``(batch.., r, n)`` to ``(batch.., r, m)``."""
        inner_rr = product(panel_rn, self.prev_mu.mT, self.precision)
        rest_rm = product(inner_rr, self.prev_basis.mT, self.precision)
        product_rm = self.view.contract(self.signal, panel_rn, self.precision)
        return self.alpha * product_rm + self.gamma * rest_rm

    def preimage(self, panel_rm: jax.Array) -> jax.Array:
        """``P^T B`` of ``P^T``: ``(batch.., r, m)`` to ``(batch.., r, n)``."""
        rest_rn = matmul(matmul(panel_rm, self.prev_basis), self.prev_mu)
        product_rn = self.view.project(self.signal, panel_rm.mT, self.precision)
        return self.alpha * product_rn + self.gamma * rest_rn

    def coordinates(self) -> jax.Array:
        """``U'^T B``, shape ``(batch.., r, n)``: ``U'^T U' = I`` saves two products."""
        product_rn = self.view.project(self.signal, self.prev_basis, self.precision)
        return self.alpha * product_rn + self.gamma * self.prev_mu

    def matrix(self) -> jax.Array:
        """``B`` itself, shape ``(batch.., m, n)``; for an exact SVD only."""
        momentum = self.view.lift(self.prev_basis, self.prev_mu, "highest")
        return self.view.to_matrix(self.alpha * self.signal + self.gamma * momentum)


class Moved(NamedTuple):
    """Where a basis has moved.

    Attributes:
      basis: ``U``, shape ``(batch.., m, r)``.
      transfer: ``Q = U^T U'``, shape ``(batch.., r, r)``.
    """

    basis: jax.Array
    transfer: jax.Array


class SubspaceRule(NamedTuple):
    """One way to choose the basis of each step.

    Attributes:
      start: ``(view, key, dtype)`` to the basis before the first step.
      move: Bases ``U`` of this step, each ``(batch.., m, r)`` and orthonormal, for a
        sequence of :class:`Tracked`. Signs of columns are arbitrary. Where ``B`` is
        zero, the basis of the step before.
      encode: ``(basis, dtype)`` to what the state keeps of a basis.
      decode: ``(stored, view, dtype)`` to the basis in the dtype of the arithmetic.
      shape: ``(view, dtype)`` to the ``jax.ShapeDtypeStruct`` of what the state keeps.
    """

    start: Callable[[MatrixView, jax.Array, str], jax.Array]
    move: Callable[[Sequence[Tracked]], list[jax.Array]]
    encode: Callable[[jax.Array, str], jax.Array]
    decode: Callable[[jax.Array, MatrixView, str], jax.Array]
    shape: Callable[[MatrixView, str], jax.ShapeDtypeStruct]


def next_bases(
    rule: SubspaceRule,
    tracked: Sequence[Tracked],
    turns: Sequence[int],
    count: jax.Array,
    *,
    svd_start: bool,
    interval: int,
) -> list[Moved]:
    """Return the basis of this step of each matrix, and the change of basis to it.

    Args:
      rule: How bases move.
      tracked: What they follow.
      turns: A number of each matrix; with an interval of ``k`` steps those with
        ``turn % k == count % k`` move, and all do in the first step.
      count: Steps taken before this one, int32 scalar.
      svd_start: The first step takes singular vectors, whatever the rule.
      interval: Steps from one move of a basis to the next.
    """

    def move(chosen: list[Tracked]) -> list[Moved]:
        by_rule = lambda: list(rule.move(chosen))
        by_svd = lambda: svd_bases(chosen)
        bases = jax.lax.cond(count == 0, by_svd, by_rule) if svd_start else by_rule()
        return list(map(Moved, bases, _changes_of_basis(chosen, bases)))

    if interval == 1:
        return move(list(tracked))
    results = [_unmoved(one) for one in tracked]
    for turn in sorted({t % interval for t in turns}):
        members = [i for i, t in enumerate(turns) if t % interval == turn]
        changed = jax.lax.cond(
            (count == 0) | (count % interval == turn),
            lambda members=members: move([tracked[i] for i in members]),
            lambda members=members: [results[i] for i in members],
        )
        for i, one in zip(members, changed, strict=True):
            results[i] = one
    return results


def power_step(tracked: Sequence[Tracked]) -> list[jax.Array]:
    """Take one warm-started block power step, ``orthonormalize(B (B^T U'))``.

    Orthonormalising between the two products keeps float32 from squaring the
    condition of ``B``, and leaves the result what it is: ``V = B^T U' R^-1`` with
    ``R`` upper triangular. Conditioning is all that counts there, so ``R^-1`` may come
    after the second product, where the panel is shorter.
    """
    # Each row by itself: `V` does not depend on their lengths.
    panels_rn = [
        _with_noise(_unit(one.coordinates(), axes=-1), one.seed) for one in tracked
    ]
    images_rm = list(map(Tracked.image, tracked, panels_rn))
    factors_rr = preconditioners(panels_rn)

    def bases(factors_rr, images_rm, prev_rows_rm):
        return _filled_bases(list(map(matmul, factors_rr, images_rm)), prev_rows_rm)

    # One by one: a stack made of partial sums would hold those of all matrices.
    images_rm = list(map(jax.lax.optimization_barrier, images_rm))
    panels = factors_rr, images_rm, _prev_rows(tracked)
    return _transposed(in_stacks(bases, _placements(tracked), *panels))


def svd_bases(tracked: Sequence[Tracked]) -> list[jax.Array]:
    """Return the leading left singular vectors of each ``B``."""

    def one_basis(one: Tracked) -> jax.Array:
        view, matrix_mn = one.view, one.matrix()
        vectors_mk = _left_vectors(matrix_mn, full=view.n < view.rank)
        basis_mr = vectors_mk[..., : view.rank]
        return jnp.where(_largest(matrix_mn) == 0, one.prev_basis, basis_mr)

    return [one_basis(one) for one in tracked]


def randomized_svd_bases(tracked: Sequence[Tracked]) -> list[jax.Array]:
    """Approximate the leading left singular vectors of each ``B`` by a random sketch.

    A sketch ``B Omega`` of ``r + 8`` columns, one power step, and a rotation to the
    singular vectors within it.

    References:
      Halko, Martinsson, Tropp: Finding structure with randomness, SIAM Review 53
      (2011), algorithms 4.4 and 5.1.
    """

    def one_basis(one: Tracked) -> jax.Array:
        view, dtype = one.view, one.prev_mu.dtype
        width = min(view.rank + _OVERSAMPLING, view.m)
        shape = (*view.batch_shape, width, view.n + view.m)
        noise = random_uniform(shape, one.seed, dtype)
        panel_kn, fill_km = noise[..., : view.n], noise[..., view.n :]
        fill_km = fill_km.at[..., : view.rank, :].set(one.prev_basis.mT)
        [sketch_km] = _filled_bases([one.image(panel_kn)], [fill_km])
        panel_kn = one.preimage(sketch_km)
        [sketch_km] = _filled_bases([one.image(panel_kn)], [fill_km])
        panel_kn = one.preimage(sketch_km)
        rotation_kk = _left_vectors(panel_kn, full=view.n < width)
        basis_mr = matmul(sketch_km.mT, rotation_kk)[..., : view.rank]
        return jnp.where(_largest(panel_kn) == 0, one.prev_basis, basis_mr)

    return [one_basis(one) for one in tracked]


def _left_vectors(matrix_mn: jax.Array, full: bool) -> jax.Array:
    """Left singular vectors: ``m`` of them, or ``min(m, n)``."""
    return one_by_one(
        lambda one_mn: jnp.linalg.svd(one_mn, full_matrices=full)[0], matrix_mn
    )


def random_basis(view: MatrixView, key: jax.Array, dtype: str) -> jax.Array:
    """Return a random orthonormal basis, shape ``(batch.., m, r)``."""
    [basis_rm] = orthonormalize([jax.random.normal(key, view.basis_shape, dtype).mT])
    return basis_rm.mT


def _dense(move: Callable[[Sequence[Tracked]], list[jax.Array]]) -> SubspaceRule:
    """A rule that starts at random and keeps the basis itself."""
    return SubspaceRule(
        start=random_basis,
        move=move,
        encode=lambda basis_mr, dtype: basis_mr.astype(dtype),
        decode=lambda stored, view, dtype: stored.astype(dtype),
        shape=lambda view, dtype: jax.ShapeDtypeStruct(view.basis_shape, dtype),
    )


#: Subspace rules by the name of the option ``subspace``.
SUBSPACES: dict[str, SubspaceRule] = {
    "power_iteration": _dense(power_step),
    "svd": _dense(svd_bases),
    "randomized_svd": _dense(randomized_svd_bases),
}


def change_of_basis(basis_mr: jax.Array, prev_basis_mr: jax.Array) -> jax.Array:
    """``Q = U^T U'``, shape ``(batch.., r, r)``."""
    return matmul(basis_mr.mT, prev_basis_mr)


def _changes_of_basis(
    tracked: Sequence[Tracked], bases_mr: Sequence[jax.Array]
) -> list[jax.Array]:
    """:func:`change_of_basis` of each matrix, in stacks."""

    def changes(rows_rm, prev_rows_rm):
        return list(
            map(change_of_basis, _transposed(rows_rm), _transposed(prev_rows_rm))
        )

    panels = _transposed(bases_mr), _prev_rows(tracked)
    return in_stacks(changes, _placements(tracked), *panels)


def _unmoved(one: Tracked) -> Moved:
    """The basis of the step before, with ``Q = I``."""
    identity_rr = jnp.eye(one.view.rank, dtype=one.prev_basis.dtype)
    shape = (*one.view.batch_shape, *identity_rr.shape)
    return Moved(one.prev_basis, jnp.broadcast_to(identity_rr, shape))


def _placements(tracked: Sequence[Tracked]) -> list[Hashable]:
    return [one.placement for one in tracked]


def _prev_rows(tracked: Sequence[Tracked]) -> list[jax.Array]:
    """``U'^T`` of each matrix, shape ``(batch.., r, m)``."""
    return _transposed([one.prev_basis for one in tracked])


def _filled_bases(
    panels_rm: Sequence[jax.Array], fills_rm: Sequence[jax.Array]
) -> list[jax.Array]:
    """Orthonormal rows, with those of ``fill`` where a panel is lost in rounding."""

    def fill(panel_rm: jax.Array, fill_rm: jax.Array) -> jax.Array:
        tau = jnp.finfo(panel_rm.dtype).eps * panel_rm.shape[-1] ** 0.5
        return _unit(panel_rm, axes=(-2, -1)) + tau * fill_rm

    filled = [fill(*pair) for pair in zip(panels_rm, fills_rm, strict=True)]
    return orthonormalize(filled)


def _transposed(matrices: Sequence[jax.Array]) -> list[jax.Array]:
    return [matrix.mT for matrix in matrices]


def _with_noise(panel: jax.Array, seed: jax.Array) -> jax.Array:
    eps = jnp.finfo(panel.dtype).eps
    return panel + eps * random_uniform(panel.shape, seed, panel.dtype)


def _unit(panel: jax.Array, axes: int | tuple[int, int]) -> jax.Array:
    """Divide by the largest entry, so that no square under- or overflows."""
    largest = _largest(panel, axes)
    return panel / jnp.where(largest == 0, 1, largest)


def _largest(matrix: jax.Array, axes: int | tuple[int, int] = (-2, -1)) -> jax.Array:
    return jnp.max(jnp.abs(matrix), axis=axes, keepdims=True)
