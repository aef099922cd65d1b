"""Boxes in which frameworks keep parameters, and the names of axes written on them.

Flax boxes the state as it finds the parameters boxed (Linen ``nn.Partitioned``, NNX
variables with ``out_sharding``), and reads the state's sharding off the names of the
parameter: wrong axes for everything that is not of the parameter's shape. Here each
field gets names of its own by the rule table of ``_sharding.py``. Boxes are told by
what they offer; no framework is imported.

Logical names stay as they are, for Flax to resolve, but where one entry needs axes of
the mesh that two of them stand for: Flax resolves no tuple of logical names, and lets a
tuple of mesh axes pass.

haliax names every axis of an array (``NamedArray``), and a mapping in its context tells
which axes of the mesh a name stands for: no entry can be written but a name. The axis
of size r gets one of its own; others get, of the names that there are, the one that
splits them most as the rule table says.
"""

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.interpreters.pxla
from jax.sharding import NamedSharding, PartitionSpec

from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._sharding import axes_of, fit, leaf_specs

# What an NNX variable may call the names; the second is for the optimizer's state.
_METADATA = ("out_sharding", "optimizer_sharding")
# What MaxText calls the name and the place of the axis along which layers are stacked.
_STACK_NAME, _STACK_AXIS = "partition_name", "param_scan_axis"


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
      name that does not divide its axis is dropped where the mesh is known, see
      :func:`_mesh_of`.
    """
    leaves = iter(zip(views, states, strict=True))

    def relabel(box: Any) -> Any:
        arrays = jax.tree.leaves(box)
        if not arrays:  # A box around optax.MaskedNode.
            return box
        view, state = next(leaves)
        shape = getattr(state, field).shape

        def rename(names: Sequence[Any], mesh: Any, rules: Any = ()) -> tuple[Any, ...]:
            mesh = _mesh_of(mesh, arrays[0])
            resolved = _resolve(names, rules, mesh, arrays[0])
            return tuple(_permute(names, resolved, mesh, view, shape, field))

        if _is_linen(box):
            rules = _rules(box.rules) if hasattr(box, "rules") else ()
            return box.replace(names=rename(box.names, box.mesh, rules))
        if _is_haliax(box):
            mesh = _mesh_of(None, arrays[0])
            return _relabel_named_array(box, mesh, view, shape, field)
        return _relabel_variable(box, rename, view) if _is_nnx(box) else box

    is_box = lambda node: _is_linen(node) or _is_nnx(node) or _is_haliax(node)
    return jax.tree.structure(jax.tree.map(relabel, params, is_leaf=is_box))


def _relabel_variable(variable: Any, rename: Any, view: MatrixView) -> Any:
    """A copy of an NNX variable with its sharding renamed, in the type it has.

    A plain tuple may hold logical names, which MaxText does not look for in a
    ``PartitionSpec``.
    """
    metadata = variable.get_metadata()
    mesh, rules = metadata.get("mesh"), _rules(metadata.get("sharding_rules"))
    renamed = {}
    for key in _METADATA:
        sharding = metadata.get(key)
        if isinstance(sharding, NamedSharding):
            spec = PartitionSpec(*rename(sharding.spec, sharding.mesh))
            renamed[key] = NamedSharding(sharding.mesh, spec)
        elif isinstance(sharding, PartitionSpec):
            renamed[key] = PartitionSpec(*rename(sharding, mesh, rules))
        elif isinstance(sharding, tuple | list):
            names = rename(_with_stack(sharding, metadata, view), mesh, rules)
            renamed[key] = names
            if _STACK_AXIS in metadata and metadata.get(_STACK_NAME) in names:
                renamed[_STACK_AXIS] = names.index(metadata[_STACK_NAME])
    copy = jax.tree.map(lambda leaf: leaf, variable)
    if renamed:
        copy.set_metadata(**renamed)
    return copy


def _with_stack(
    names: Sequence[Any], metadata: dict[str, Any], view: MatrixView
) -> Sequence[Any]:
    """Names of all axes: MaxText notes a scanned stack's axis and its name apart."""
    stack, axis = metadata.get(_STACK_NAME), metadata.get(_STACK_AXIS)
    complete = len(names) >= len(view.shape)
    if stack is None or axis is None or complete or stack in names:
        return names
    padded = [*names, *[None] * (len(view.shape) - 1 - len(names))]
    return [*padded[:axis], stack, *padded[axis:]]


def _relabel_named_array(
    box: Any, mesh: Any, view: MatrixView, shape: tuple[int, ...], field: str
) -> Any:
    """A ``NamedArray`` with the axes of a field."""
    partitioning = sys.modules.get("haliax.partitioning")
    mapping = getattr(partitioning, "current_thread_local_mapping", dict)() or {}
    names = [axis.name for axis in box.axes]
    of_mesh = lambda name: tuple(
        axis for axis in axes_of(_tuple(mapping.get(name))) if axis in mesh.shape
    )
    table = lambda spec: leaf_specs(view, PartitionSpec(*spec), mesh)[field]
    given = table(names)
    wanted = fit(table([of_mesh(name) or None for name in names]), shape, mesh)
    taken: list[str] = []
    for name, axes in zip(given, wanted, strict=True):
        allowed = set(axes_of(axes))
        splits = lambda name, allowed=allowed: (
            math.prod(mesh.shape[axis] for axis in of_mesh(name))
            if {*of_mesh(name)} <= allowed and name not in taken
            else 0
        )
        best = max([name, *names, *mapping], key=splits) if name else None
        if best is None or splits(best) <= (best != name):
            best = f"ldadam_{name or 'rank'}"
        taken.append(best)
    axis = type(box.axes[0])
    axes = tuple(axis(*pair) for pair in zip(taken, shape, strict=True))
    return type(box)(jax.ShapeDtypeStruct(shape, box.array.dtype), axes)


def _tuple(axes: Any) -> Any:
    return tuple(axes) if isinstance(axes, list) else axes


def _permute(
    names: Sequence[Any],
    resolved: Sequence[Any],
    mesh: Any,
    view: MatrixView,
    shape: tuple[int, ...],
    field: str,
) -> list[Any]:
    """Names of a field by the rule table, less those known not to divide an axis.

    The table is read twice, with the names and with the mesh axes that they stand for.
    A name stays where it stands for just the axes that the second reading has; where it
    does not, these are a tuple, which is never taken for a logical name.
    """
    meaning = dict(zip(names, resolved, strict=False))
    table = lambda spec: leaf_specs(view, PartitionSpec(*spec), mesh)[field]
    given, wanted = table(names), fit(table(resolved), shape, mesh)
    if tuple(names) == tuple(resolved):
        return list(wanted)
    return [
        name if meaning.get(name) == axes else axes_of(axes) or None
        for name, axes in zip(given, wanted, strict=True)
    ]


def _resolve(names: Sequence[Any], rules: Any, mesh: Any, array: Any) -> Sequence[Any]:
    """The mesh axes that names stand for; the names themselves where nobody tells.

    By the rules, as Linen and MaxText read them: in their order, each for its name if
    that has none yet and if all its mesh axes are free. Without rules, a boxed array
    tells by how it lies.
    """
    known = all(axis in mesh.shape for name in names for axis in axes_of(name))
    if mesh.empty or (known and not rules):
        return names
    if not rules:
        sharding = getattr(array, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return names
        return [*sharding.spec, *[None] * (len(names) - len(sharding.spec))]
    resolved = {name: name for name in names if not isinstance(name, str)}
    used = lambda: {axis for axes in resolved.values() for axis in axes_of(axes)}
    for name, given in rules:
        axes = axes_of(_tuple(given))
        if name in names and name not in resolved and not used() & set(axes):
            resolved[name] = axes if len(axes) > 1 else next(iter(axes), None)
    own = lambda name: name if name in mesh.shape else None
    return [resolved[name] if name in resolved else own(name) for name in names]


def _rules(of_box: Any) -> list[Any]:
    """Rules that a box carries and those of ``flax.core.spmd`` in this context."""
    spmd = sys.modules.get("flax.core.spmd")
    in_context = getattr(spmd, "get_logical_axis_rules", tuple)()
    return [*(of_box or ()), *(in_context or ())]


def _mesh_of(box_mesh: Any, array: Any) -> Any:
    """The mesh that names belong to, an empty one where nobody tells.

    In order: the one that the box names; the one that the boxed array lies on;
    ``jax.set_mesh``'s; that of the older ``with mesh:``, in which trainers still run.
    """
    if box_mesh is not None:
        return box_mesh
    sharding = getattr(array, "sharding", None)
    if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
        return sharding.mesh
    mesh = jax.sharding.get_abstract_mesh()
    return _legacy_mesh() if mesh.empty else mesh


def _legacy_mesh() -> Any:
    """The mesh of ``with mesh:``, deprecated in JAX and without another way to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        resources = getattr(jax.interpreters.pxla, "thread_resources", None)
    if resources is None:
        return jax.sharding.get_abstract_mesh()
    return resources.env.physical_mesh


def _is_linen(node: Any) -> bool:
    """``nn.Partitioned`` and its kin."""
    return hasattr(node, "replace_boxed") and hasattr(node, "names")


def _is_nnx(node: Any) -> bool:
    """``nnx.Variable``."""
    return hasattr(node, "get_metadata") and hasattr(node, "set_metadata")


def _is_haliax(node: Any) -> bool:
    """``haliax.NamedArray``."""
    return hasattr(node, "has_axis") and hasattr(node, "array")
