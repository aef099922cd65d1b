"""Dimension numbers of haliax's Linear layers, which tell their axes; not imported."""

from typing import Any

import jax

from ldadam_optax._dimension_numbers import LDAdamDimensionNumbers
from ldadam_optax._routing import is_embedding, is_head, path_names


def haliax_dimension_numbers(params: Any) -> Any:
    """Return the dimension numbers of a haliax model, as Levanter's models are.

    A ``haliax.nn.Linear`` names the axes that it sums over (``In``) and those of its
    result (``Out``); all other axes of its weight, of stacked layers or of experts,
    count matrices. Linear layers that are embeddings or heads by their name
    (``lm_head``) and all other leaves are None, for AdamW.

    Args:
      params: A model, or what ``equinox.filter`` leaves of it.

    Returns:
      Tree like ``params`` of :class:`LDAdamDimensionNumbers` and None. As the function
      is a callable of the parameters, it can itself be passed as
      ``weight_dimension_numbers``.
    """
    specs = []
    for path, node in jax.tree.leaves_with_path(params, is_leaf=_is_linear):
        specs += _linear_specs(path, node) if _is_linear(node) else [None]
    return jax.tree.structure(params).unflatten(specs)


def _linear_specs(path: Any, linear: Any) -> list[LDAdamDimensionNumbers | None]:
    """Spec of the weight, and None for what else the layer has."""
    leaves, names = jax.tree.leaves(linear), path_names(path)
    weight = jax.tree.leaves(linear.weight)
    if not weight or is_head(names) or is_embedding(names):
        return [None] * len(leaves)
    axes = [axis.name for axis in linear.weight.axes]
    rows, columns = (
        tuple(axes.index(getattr(axis, "name", axis)) for axis in _several(side))
        for side in (linear.In, linear.Out)
    )
    spec = LDAdamDimensionNumbers(rows, columns) if rows and columns else None
    return [spec if leaf is weight[0] else None for leaf in leaves]


def _is_linear(node: Any) -> bool:
    """``haliax.nn.Linear``, with or without arrays in it."""
    has_axes = hasattr(node, "In") and hasattr(node, "Out")
    return has_axes and hasattr(getattr(node, "weight", None), "has_axis")


def _several(axes: Any) -> tuple[Any, ...]:
    """One axis or several: an axis, its name, a sequence of them, or sizes by name."""
    return (axes,) if isinstance(axes, str) or hasattr(axes, "name") else tuple(axes)
