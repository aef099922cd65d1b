"""Ranks of single leaves from the spectra of gradients, within a budget of bytes.

One rank for all matrices spends bytes on those whose gradients a few directions hold
and is short of them elsewhere. :func:`propose_ranks` begins with the least rank
everywhere and raises, again and again, the leaf that gains most for each byte.

Choices made here:

* What a direction is worth is the share of its leaf's squared gradient that it holds,
  times the elements of the leaf. Adam's steps have one size whatever that of the
  gradient, so gradients of different leaves are not compared by norm.
* Several gradients count by the sum of their Gram matrices ``G G^T``: the best subspace
  for all of them together.
* Shares of ordered singular values shrink, so taking the best increment first is the
  best choice at each budget that it uses up. It stops at the first that does not fit,
  and never looks for a smaller one: ranks then only grow with the budget.
* Directions below the rounding of the Gram matrix are not paid for.
"""

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ldadam_optax._alias import ldadamw
from ldadam_optax._checks import compute_dtype
from ldadam_optax._dimension_numbers import (
    LDAdamDimensionNumbers,
    MatrixView,
    WeightDimensionNumbers,
    matrix_view,
)
from ldadam_optax._precision import matmul
from ldadam_optax._report import memory_report, state_bytes
from ldadam_optax._routing import route
from ldadam_optax._sharding import named_sharding, on_mesh
from ldadam_optax._state import names_of


class _Leaf(NamedTuple):
    """A leaf whose rank is looked for.

    Attributes:
      spec: Its axes.
      view: The leaf as matrices.
      shape: Its shape and dtype.
      held: Share of the squared gradients that the first ``0, 1, .., m`` directions
        hold; it ends to grow where rounding begins.
    """

    spec: LDAdamDimensionNumbers
    view: MatrixView
    shape: jax.ShapeDtypeStruct
    held: np.ndarray

    def at(self, rank: int) -> LDAdamDimensionNumbers:
        """The spec with this rank."""
        return self.spec._replace(rank=rank)

    def worth(self, rank: int) -> float:
        """Elements of the leaf, as far as the subspace holds their gradient."""
        return math.prod(self.shape.shape) * float(self.held[rank])


def propose_ranks(
    gradients: Sequence[Any],
    budget_bytes: int,
    *,
    multiple_of: int = 8,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    **options: Any,
) -> Any:
    """Propose a rank for each matrix, such that all state stays within a budget.

    The singular values of the gradients decide: with ``held_l(r)`` the share of the
    squared gradients of the leaf ``l`` that their ``r`` leading directions hold, and
    ``size_l`` its number of elements, the ranks seek the largest

        sum over l of  size_l held_l(r_l)     with     bytes(r) <= budget_bytes,

    by taking first what gains most for each byte. A larger budget lowers no rank.

    It runs outside of ``jit``, as ranks are shapes, and factorises one ``m x m`` Gram
    matrix for each matrix: once, before training or at a restart from its parameters.

    Args:
      gradients: A list of one gradient or a few, each a tree of the parameters'
        structure.
      budget_bytes: What the state of ``ldadamw`` may take, AdamW's leaves and the step
        counts included: ``memory_report(...).total.state``.
      multiple_of: Ranks are multiples of it, or the whole side; accelerators' tiles
        want 8, moments in int8 32. It is the least rank, too.
      weight_dimension_numbers: As for :func:`ldadamw`; a spec with a rank keeps it.
      **options: All other options of ``ldadamw`` that its state depends on, by name.

    Returns:
      A tree of the parameters' structure, of :class:`LDAdamDimensionNumbers` with ranks
      and of None for AdamW, to be given as ``weight_dimension_numbers`` to ``ldadamw``,
      ``memory_report`` and all others that take them.

    Raises:
      TypeError: if ``gradients`` is not a list of trees, or as ``ldadamw``.
      ValueError: if there is no gradient, if their structures or shapes differ, if one
        is not finite (told by the leaf's name), if the budget does not suffice for
        the least ranks, or as ``ldadamw`` and its ``init``.

    Example:
      >>> from ldadam_optax import ldadamw, memory_report
      >>> key = jax.random.key(0)
      >>> flat = jax.random.normal(key, (24, 32))       # all directions alike
      >>> steep = jnp.ones((24, 1)) * jnp.ones((1, 32))  # one holds all
      >>> grads = {'flat': flat, 'steep': steep}
      >>> budget = memory_report(grads, rank=12).total.state  # at one rank for both
      >>> specs = propose_ranks([grads], budget, multiple_of=4)
      >>> specs['flat'].rank, specs['steep'].rank
      (20, 4)
      >>> tx = ldadamw(1e-2, weight_dimension_numbers=specs)

    References:
      Greedy allocation of a sum of concave gains under one budget: Fox, Discrete
      optimization via marginal analysis, Management Science 13 (1966).
    """
    _check(gradients, multiple_of)
    specs = route(gradients[0], weight_dimension_numbers, multiple_of)
    leaves = _leaves_without_rank(gradients, specs, options.get("side", "short"))
    ranks = {i: min(multiple_of, leaf.view.m) for i, leaf in leaves.items()}

    def proposal() -> Any:
        ranked = {i: leaf.at(ranks[i]) for i, leaf in leaves.items()}
        chosen = [ranked.get(i, spec) for i, spec in enumerate(specs)]
        return jax.tree.structure(gradients[0]).unflatten(chosen)

    told = {"weight_dimension_numbers": proposal(), **options}
    least = memory_report(gradients[0], multiple_of, **told).total.state
    if budget_bytes < least:
        raise ValueError(
            f"budget_bytes={budget_bytes} is less than the {least} bytes of state that "
            f"ranks of {multiple_of} take. Give more, a smaller multiple_of, or "
            "options that keep less."
        )

    @functools.cache
    def bytes_of(shape: jax.ShapeDtypeStruct, spec: LDAdamDimensionNumbers) -> int:
        own = {**options, "mask": None, "weight_dimension_numbers": [spec]}
        return state_bytes(ldadamw(0.0, multiple_of, **own), shape)

    _raise_ranks(ranks, leaves, budget_bytes - least, multiple_of, bytes_of)
    return proposal()


def _raise_ranks(
    ranks: dict[int, int],
    leaves: dict[int, _Leaf],
    left: int,
    multiple_of: int,
    bytes_of: Callable[[jax.ShapeDtypeStruct, LDAdamDimensionNumbers], int],
) -> None:
    """Raise the rank that gains most for each byte, until the next does not fit."""

    def offer(i: int) -> tuple[float, int, int, int]:
        """Minus the gain for each byte, the leaf, its next rank and the bytes."""
        leaf, rank = leaves[i], ranks[i]
        raised = min(rank + multiple_of, leaf.view.m)
        before, after = (bytes_of(leaf.shape, leaf.at(r)) for r in (rank, raised))
        gain = leaf.worth(raised) - leaf.worth(rank)
        return -gain / max(after - before, 1), i, raised, after - before

    offers = [offer(i) for i in leaves]
    heapq.heapify(offers)
    while offers and offers[0][0] < 0 and offers[0][3] <= left:
        _, i, ranks[i], more = offers[0]
        left -= more
        heapq.heapreplace(offers, offer(i))


def _leaves_without_rank(
    gradients: Sequence[Any], specs: Sequence[Any], side: str
) -> dict[int, _Leaf]:
    """The leaves with a spec that has no rank of its own, by their number."""
    names = names_of(gradients[0])
    columns = zip(*map(jax.tree.leaves, gradients), strict=True)
    leaves = {}
    for i, (name, spec, grads) in enumerate(zip(names, specs, columns, strict=True)):
        if spec is None or getattr(spec, "rank", None) is not None:
            continue
        shape = jax.ShapeDtypeStruct(grads[0].shape, grads[0].dtype)
        spec = LDAdamDimensionNumbers(
            _hashable(spec.reduction_axis), _hashable(spec.output_axis)
        )
        view = matrix_view(name, shape.shape, spec, 1, side)
        leaves[i] = _Leaf(spec, view, shape, _held(name, view, grads))
    return leaves


def _held(name: str, view: MatrixView, grads: Sequence[Any]) -> np.ndarray:
    """Shares that leading directions hold, averaged over a stack, ``(m + 1,)``."""
    dtype = compute_dtype(name, grads[0])
    squares = on_mesh(
        functools.partial(_squared_singular_values, view, dtype),
        named_sharding(grads[0]),
        PartitionSpec(),
    )(grads)
    squares = np.asarray(squares, np.float64).reshape(-1, view.m)[:, ::-1]
    if not np.isfinite(squares).all():
        raise ValueError(
            f"A gradient of {name} is not finite: there is no spectrum. Take gradients "
            "of a step that did not overflow."
        )
    rounding = (view.m + 10) * np.finfo(dtype).eps
    squares = np.where(squares > rounding * squares[:, :1], squares, 0)
    total = squares.sum(axis=1, keepdims=True)
    shares = squares / np.where(total > 0, total, 1)
    return np.concatenate([[0.0], np.cumsum(shares.mean(axis=0))])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squared_singular_values(
    view: MatrixView, dtype: str, grads: Sequence[jax.Array]
) -> jax.Array:
    """Eigenvalues of the sum of ``G G^T``, rising, ``(batch.., m)``, of one scale."""
    matrices = [view.to_matrix(grad.astype(dtype)) for grad in grads]
    largest = [jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True) for x in matrices]
    scale = functools.reduce(jnp.maximum, largest)
    units = [x / jnp.where(scale == 0, 1, scale) for x in matrices]
    return jnp.linalg.eigvalsh(
        functools.reduce(jnp.add, [matmul(x, x.mT) for x in units])
    )


def _check(gradients: Any, multiple_of: Any) -> None:
    if type(gradients) not in (list, tuple):
        raise TypeError(
            "gradients must be a list of trees, one for each gradient, got a "
            f"{type(gradients).__name__}: pass [grads] for one."
        )
    if not gradients:
        raise ValueError("gradients must have at least one gradient, got none.")
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int):
        raise TypeError(f"multiple_of must be an int, got {multiple_of!r}.")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be >= 1, got {multiple_of}.")
    first = _shapes(gradients[0])
    for i, tree in enumerate(gradients):
        differing = sorted(set(first.items()) ^ set(_shapes(tree).items()))
        if differing:
            name, shape = differing[0]
            raise ValueError(
                f"Gradients must be of one model: gradient {i} and the first differ in "
                f"{name} of shape {shape}."
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    return dict(zip(names_of(tree), shapes, strict=True))


def _hashable(axes: Any) -> int | tuple[int, ...]:
    return axes if isinstance(axes, int) else tuple(axes)
