"""Which axes of a leaf form the matrix, and the leaf seen as that matrix.

A :class:`MatrixView` is the static plan for one leaf. It names the compressed
axis ``m`` and the other axis ``n`` once; everything after it is free of left and
right. The full-size products contract the leaf's own axes, in the order in which
they are stored, so no leaf is transposed, and none is reshaped across axes that a
mesh may shard. Only panels of ``r`` columns are merged to ``m`` and ``n``.

Conventions are those of ``optax.contrib.muon``: a spec names the reduction and
the output axes, all others are batch axes, None leaves a parameter to AdamW.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldadam_optax._precision import einsum

SIDES = ("short", "long", "left", "right")


class LDAdamDimensionNumbers(NamedTuple):
    """Axes of a leaf that form the matrix; all others are batch axes.

    Attributes:
      reduction_axis: Axis, or axes, that a product ``x @ W`` sums over: the rows
        of the matrix, merged in the order given. Negative axes count from the end.
      output_axis: Axis, or axes, of the product's result: the columns.
      rank: Rank of this leaf's subspace, or a fraction of its compressed side as a
        float in (0, 1); None takes the optimizer's.

    Example:
      A stack of attention kernels (layers, d, heads, head_dim):

      >>> LDAdamDimensionNumbers(reduction_axis=1, output_axis=(2, 3), rank=64)
      LDAdamDimensionNumbers(reduction_axis=1, output_axis=(2, 3), rank=64)
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1
    rank: int | float | None = None


#: None, one spec, a prefix tree of specs and None, or a callable of the params.
WeightDimensionNumbers: TypeAlias = (
    LDAdamDimensionNumbers | Callable[[Any], Any] | Any | None
)


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A leaf as a batch of ``m x n`` matrices whose ``m`` axis is compressed.

    Attributes:
      shape: Shape of the leaf.
      batch_axes: Axes of the leaf that count matrices, in increasing order.
      m_axes: Axes of the leaf that are compressed, in the order they merge.
      n_axes: The other axes of the matrix, in the order they merge.
      rank: Rank of the subspace, ``1 <= rank <= m``.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    m_axes: tuple[int, ...]
    n_axes: tuple[int, ...]
    rank: int

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return self._sizes(self.batch_axes)

    @property
    def m(self) -> int:
        """Size of the compressed axis."""
        return math.prod(self._sizes(self.m_axes))

    @property
    def n(self) -> int:
        """Size of the axis that is kept."""
        return math.prod(self._sizes(self.n_axes))

    @property
    def coords_shape(self) -> tuple[int, ...]:
        """Shape of what lives in the basis' coordinates, ``(batch.., r, n)``."""
        return (*self.batch_shape, self.rank, self.n)

    @property
    def matrix_axes(self) -> list[int]:
        """Axes of the leaf that are no batch axes, in increasing order."""
        return sorted(self.m_axes + self.n_axes)

    @property
    def basis_shape(self) -> tuple[int, ...]:
        """Shape of the basis, ``(batch.., m, r)``."""
        return (*self.batch_shape, self.m, self.rank)

    def within_axis_0(self) -> "MatrixView":
        """The view of one slice along axis 0, which is a batch axis."""
        batch_axes, m_axes, n_axes = (
            tuple(axis - 1 for axis in axes)
            for axes in (self.batch_axes[1:], self.m_axes, self.n_axes)
        )
        return MatrixView(self.shape[1:], batch_axes, m_axes, n_axes, self.rank)

    def project(self, leaf: jax.Array, basis_mr: jax.Array, precision) -> jax.Array:
        """``U^T X``: leaf and ``(batch.., m, r)`` to ``(batch.., r, n)``."""
        coords = einsum(
            leaf,
            self._leaf_axes,
            self._split_m(basis_mr),
            self._basis_axes,
            self._coords_axes,
            precision=precision,
        )
        return coords.reshape(*self.batch_shape, basis_mr.shape[-1], self.n)

    def contract(self, leaf: jax.Array, panel_rn: jax.Array, precision) -> jax.Array:
        """``(X V)^T``: leaf and ``V^T (batch.., r, n)`` to ``(batch.., r, m)``."""
        rows = panel_rn.shape[-2]
        panel = panel_rn.reshape(*self.batch_shape, rows, *self._sizes(self.n_axes))
        image_axes = [*self.batch_axes, self._rank_axis, *self.m_axes]
        image = einsum(
            panel,
            self._coords_axes,
            leaf,
            self._leaf_axes,
            image_axes,
            precision=precision,
        )
        return image.reshape(*self.batch_shape, rows, self.m)

    def lift(self, basis_mr: jax.Array, coords_rn: jax.Array, precision) -> jax.Array:
        """``U Y``: ``(batch.., m, r)`` and ``(batch.., r, n)`` to the leaf's shape."""
        coords = coords_rn.reshape(
            *self.batch_shape, self.rank, *self._sizes(self.n_axes)
        )
        return einsum(
            self._split_m(basis_mr),
            self._basis_axes,
            coords,
            self._coords_axes,
            self._leaf_axes,
            precision=precision,
        )

    def columns(self, row_n: jax.Array) -> jax.Array:
        """A value for each column, ``(batch.., n)``, in a shape that broadcasts."""
        row = row_n.reshape(*self.batch_shape, *self._sizes(self.n_axes))
        stored = [*self.batch_axes, *self.n_axes]
        order = sorted(range(len(stored)), key=stored.__getitem__)
        return jnp.expand_dims(row.transpose(order), self.m_axes)

    def sum_columns(self, leaf: jax.Array) -> jax.Array:
        """Sum over the compressed axis: leaf to ``(batch.., n)``."""
        kept = [*self.batch_axes, *self.n_axes]
        sums = jnp.einsum(leaf, self._leaf_axes, kept, precision="highest")
        return sums.reshape(*self.batch_shape, self.n)

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """The leaf copied into matrices, ``(batch.., m, n)``; for an SVD only."""
        order = (*self.batch_axes, *self.m_axes, *self.n_axes)
        return leaf.transpose(order).reshape(*self.batch_shape, self.m, self.n)

    @property
    def _rank_axis(self) -> int:
        return len(self.shape)

    @property
    def _leaf_axes(self) -> list[int]:
        return list(range(len(self.shape)))

    @property
    def _basis_axes(self) -> list[int]:
        return [*self.batch_axes, *self.m_axes, self._rank_axis]

    @property
    def _coords_axes(self) -> list[int]:
        return [*self.batch_axes, self._rank_axis, *self.n_axes]

    def _split_m(self, basis_mr: jax.Array) -> jax.Array:
        return basis_mr.reshape(
            *self.batch_shape, *self._sizes(self.m_axes), basis_mr.shape[-1]
        )

    def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)


def is_dimension_numbers(value: Any) -> bool:
    """True for a spec: ours, optax's Muon's or GaLore's, or one of their kind."""
    return hasattr(value, "reduction_axis") and hasattr(value, "output_axis")


def check_rank(rank: Any, where: str = "") -> None:
    """Raise unless ``rank`` is a Python int >= 1 or a float in (0, 1)."""
    prefix = f"{where}: " if where else ""
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(
            f"{prefix}rank must be a Python int, or a float in (0, 1), got "
            f"rank={rank!r} of type {type(rank).__name__}. It sets shapes: under "
            "optax.inject_hyperparams name it in static_args."
        )
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"{prefix}rank must be >= 1, got rank={rank}.")
    if isinstance(rank, float) and not 0 < rank < 1:
        raise ValueError(
            f"{prefix}rank as a float is a fraction of the compressed side and must be "
            f"in (0, 1), got rank={rank}. Pass an int for a number of directions."
        )


def rank_of_side(rank: int | float, side: int) -> int:
    """The rank on a compressed side of that size: clipped, or a fraction of it.

    A fraction is rounded to a multiple of 8, which fills the tiles of accelerators,
    where the side has room for one.

    Example:
      >>> rank_of_side(16, 8), rank_of_side(0.25, 768), rank_of_side(0.3, 100)
      (8, 192, 32)
      >>> rank_of_side(0.25, 12), rank_of_side(0.1, 4)
      (3, 1)
    """
    if isinstance(rank, int):
        return min(rank, side)
    in_eights = 8 * round(rank * side / 8)
    return in_eights if 0 < in_eights <= side else max(1, round(rank * side))


def resolve_dimension_numbers(
    dimension_numbers: WeightDimensionNumbers, params: Any
) -> list[Any]:
    """One spec or None for each leaf of ``params``, in the order of its leaves.

    Args:
      dimension_numbers: A spec, a prefix tree of specs and None, or a callable.
      params: Tree of arrays or of abstract values.

    Returns:
      Specs and None, as many as ``jax.tree.leaves(params)``.

    Raises:
      ValueError: if the tree of specs is not a prefix of the tree of params.
      TypeError: if a leaf of it is neither a spec nor None.
    """
    if not jax.tree.leaves(params):
        return []
    if callable(dimension_numbers) and not _is_tree_of_specs(dimension_numbers):
        dimension_numbers = dimension_numbers(params)
    specs: list[Any] = []

    def collect(path, spec, subtree):
        spec = None if isinstance(spec, optax.MaskedNode) else spec
        if spec is not None and not is_dimension_numbers(spec):
            raise TypeError(
                f"weight_dimension_numbers{jax.tree_util.keystr(path)} must be "
                f"LDAdamDimensionNumbers or None, got {spec!r}."
            )
        specs.extend([spec] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map_with_path(
            collect, dimension_numbers, params, is_leaf=_is_spec_or_none
        )
    except ValueError as error:
        raise ValueError(
            "weight_dimension_numbers must be a spec or a prefix tree of the "
            f"parameters, with None for AdamW; the trees differ: {error}"
        ) from error
    return specs


def matrix_view(
    name: str, shape: Sequence[int], spec: Any, rank: int | float, side: str
) -> MatrixView:
    """Return the view of one leaf.

    Args:
      name: Path of the leaf, for error messages.
      shape: Shape of the leaf.
      spec: Its dimension numbers.
      rank: The optimizer's rank, where the spec has none; see :func:`rank_of_side`.
      side: Which axis is compressed, one of :data:`SIDES`.

    Returns:
      The static plan that all later steps follow.

    Raises:
      ValueError: if the leaf has fewer than two axes, if it has no elements, or if
        axes are out of range, repeated, overlapping or missing.
    """
    shape = tuple(shape)
    if len(shape) < 2:
        raise ValueError(
            f"{name} has shape {shape}; LDAdam needs at least 2 axes. Label it None "
            "in weight_dimension_numbers to use AdamW."
        )
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape}: a matrix without elements.")
    rows = _normalize_axes(name, shape, "reduction_axis", spec.reduction_axis)
    columns = _normalize_axes(name, shape, "output_axis", spec.output_axis)
    if set(rows) & set(columns):
        raise ValueError(
            f"{name}: reduction_axis and output_axis must not overlap, got {spec} for "
            f"shape {shape}."
        )
    spec_rank = getattr(spec, "rank", None)
    if spec_rank is not None:
        check_rank(spec_rank, name)
        rank = spec_rank
    m_axes, n_axes = _orient(shape, rows, columns, side)
    batch_axes = tuple(a for a in range(len(shape)) if a not in (*rows, *columns))
    m = math.prod(shape[axis] for axis in m_axes)
    return MatrixView(shape, batch_axes, m_axes, n_axes, rank_of_side(rank, m))


def matrix_views(
    params: Any,
    dimension_numbers: WeightDimensionNumbers,
    rank: int | float,
    side: str,
    names: Collection[str] | None = None,
) -> list[MatrixView]:
    """Views of all leaves of ``params``; with None as specs, each is its own matrix.

    With ``names``, the quoted names of some leaves, views of these alone.

    Raises:
      ValueError: where :func:`matrix_view` does, for a leaf labelled None, and
        without specs for a leaf that does not have exactly two axes.
    """
    paths = jax.tree.leaves_with_path(params)
    if dimension_numbers is None:
        specs = [LDAdamDimensionNumbers()] * len(paths)
    else:
        specs = resolve_dimension_numbers(dimension_numbers, params)
    views = []
    for (path, leaf), spec in zip(paths, specs, strict=True):
        name = leaf_name(path)
        if names is not None and name not in names:
            continue
        if spec is None:
            raise ValueError(
                f"{name} is labelled None, for AdamW, but this transformation updates "
                "matrices only. Use ldadamw, or keep the leaf away with optax.masked."
            )
        if dimension_numbers is None and len(leaf.shape) > 2:
            raise ValueError(
                f"{name} has shape {leaf.shape}: which of its axes form the matrix? "
                "Say so in weight_dimension_numbers."
            )
        views.append(matrix_view(name, leaf.shape, spec, rank, side))
    return views


def leaf_name(path: Any) -> str:
    """A leaf's path as a quoted name: ``'layers/0/kernel'``."""
    return repr(jax.tree_util.keystr(path, simple=True, separator="/"))


def _is_tree_of_specs(value: Any) -> bool:
    """False for a function; True for a module that can be called but holds specs."""
    leaves = jax.tree.leaves(value, is_leaf=is_dimension_numbers)
    return all(is_dimension_numbers(leaf) for leaf in leaves)


def _is_spec_or_none(value: Any) -> bool:
    return (
        value is None
        or is_dimension_numbers(value)
        or isinstance(value, optax.MaskedNode)
    )


def _normalize_axes(
    name: str, shape: tuple[int, ...], field: str, axes: Any
) -> tuple[int, ...]:
    try:
        axes = tuple(map(operator.index, axes if np.iterable(axes) else (axes,)))
    except TypeError:
        raise TypeError(
            f"{name}: {field} must be an int or a sequence of ints, got {axes!r}."
        ) from None
    if not axes:
        raise ValueError(f"{name}: {field} must name at least one axis, got {axes}.")
    out_of_range = [a for a in axes if not -len(shape) <= a < len(shape)]
    if out_of_range:
        raise ValueError(
            f"{name}: {field} {out_of_range[0]} is out of range for shape {shape} with "
            f"{len(shape)} axes."
        )
    axes = tuple(axis % len(shape) for axis in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{name}: {field} must not repeat an axis, got {axes}.")
    return axes


def _orient(
    shape: tuple[int, ...], rows: tuple[int, ...], columns: tuple[int, ...], side: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Order ``(rows, columns)`` as ``(compressed, kept)``."""
    row_size = math.prod(shape[axis] for axis in rows)
    column_size = math.prod(shape[axis] for axis in columns)
    compress_rows = {
        "short": row_size <= column_size,
        "long": row_size >= column_size,
        "left": True,
        "right": False,
    }[side]
    return (rows, columns) if compress_rows else (columns, rows)
