"""Boxes in which Flax keeps parameters, and the names of mesh axes written on them.

Flax boxes the state as it finds the parameters boxed (Linen ``nn.Partitioned``, NNX
variables with ``out_sharding``), and reads the state's sharding off the names of the
parameter: wrong axes for everything that is not of the parameter's shape. Here each
field gets names of its own by the rule table of ``_sharding.py``. Boxes are told by
what they offer; Flax is not imported.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._sharding import fit, leaf_specs

# What an NNX variable may call the names; the second is for the optimizer's state.
_METADATA = ("out_sharding", "optimizer_sharding")


def state_structure(
    params: Any, views: Sequence[MatrixView], states: Sequence[Any], field: str
) -> Any:
    """Structure of one field of the state: the parameters', with names of its own.

    Args:
      params: Parameters, boxed or not.
      views: Each leaf as a matrix.
      states: State of each leaf.
      field: Its name.

    Returns:
      A tree structure of as many leaves. Boxes without names stay as they are, and a
      name that does not divide its axis is dropped where the mesh is known: from the
      box, or from ``jax.set_mesh``.
    """
    leaves = iter(zip(views, states, strict=True))

    def relabel(box: Any) -> Any:
        if not jax.tree.leaves(box):  # A box around optax.MaskedNode.
            return box
        view, state = next(leaves)
        shape = getattr(state, field).shape
        rename = lambda names, mesh: _permute(names, mesh, view, shape, field)
        if _is_linen(box):
            return box.replace(names=tuple(rename(box.names, box.mesh)))
        return _relabel_variable(box, rename) if _is_nnx(box) else box

    is_box = lambda node: _is_linen(node) or _is_nnx(node)
    return jax.tree.structure(jax.tree.map(relabel, params, is_leaf=is_box))


def _relabel_variable(variable: Any, rename: Any) -> Any:
    """A copy of an NNX variable with its sharding renamed."""
    metadata = variable.get_metadata()
    mesh = metadata.get("mesh")
    renamed = {}
    for key in _METADATA:
        sharding = metadata.get(key)
        if isinstance(sharding, NamedSharding):
            spec = rename(sharding.spec, sharding.mesh)
            renamed[key] = NamedSharding(sharding.mesh, spec)
        elif isinstance(sharding, tuple | PartitionSpec):
            renamed[key] = rename(sharding, mesh)
    copy = jax.tree.map(lambda leaf: leaf, variable)
    if renamed:
        copy.set_metadata(**renamed)
    return copy


def _permute(
    names: Sequence[Any],
    mesh: Any,
    view: MatrixView,
    shape: tuple[int, ...],
    field: str,
) -> PartitionSpec:
    """Names of a field by the rule table, less those known not to divide an axis."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    spec = leaf_specs(view, PartitionSpec(*names), mesh)[field]
    return fit(spec, shape, mesh)


def _is_linen(node: Any) -> bool:
    """``nn.Partitioned`` and its kin."""
    return hasattr(node, "replace_boxed") and hasattr(node, "names")


def _is_nnx(node: Any) -> bool:
    """``nnx.Variable``."""
    return hasattr(node, "get_metadata") and hasattr(node, "set_metadata")
