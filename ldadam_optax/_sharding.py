"""How the state of a sharded parameter is sharded, on both kinds of mesh.

The rule, for a leaf whose axes carry mesh axes as its ``PartitionSpec`` says:

=================  ========================  =====================================
kind of a field    shape                     spec
=================  ========================  =====================================
coordinates        (batch.., r, n)           batch axes' names, None, n's with m's
basis              (batch.., m, r)           batch axes' names, m's or n's, None
leaf               the leaf's, or its codes  the leaf's
matrix             (batch..,)                batch axes' names
=================  ========================  =====================================

Moments are split over all devices that the matrix is split over. The basis is split by
``m``'s name, or by ``n``'s where ``m`` is whole: by both, the two sides of a product
would disagree about every axis, and the compiler would move the matrix instead of the
panels. Axes that merge to ``m`` or ``n`` keep the name of the first: only blocks of the
outermost axis stay contiguous. A name that does not divide its axis is dropped.

With these specs each product of a step is local, or a panel of at most
``r max(m, n)`` elements is summed or gathered; a Gram matrix is a sum of ``r * r``.

On explicit axes a leaf's step runs under ``jax.sharding.auto_axes``, so that the
compiler places its inside, and its results are given the types above. On automatic
axes shardings are visible on concrete arrays only: there, eager steps constrain their
results, and a step inside ``jit`` follows its inputs, for which :func:`state_specs`
is made; its update follows the parameter (:func:`shard_like`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._fields import BASIS, COORDINATES, FIELDS, LEAF, MATRIX


def named_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding of a leaf that its step must keep, or None where nothing is known.

    Explicit axes are part of an array's type, traced or not. Automatic ones are
    known of concrete arrays alone.
    """
    traced = jax.typeof(leaf).sharding
    if _explicit(traced):
        return traced
    concrete = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.core.Tracer) or not isinstance(concrete, NamedSharding):
        return None
    return concrete if concrete.mesh.size > 1 else None


def state_specs(
    tx: optax.GradientTransformation,
    params: Any,
    specs: Any,
    mesh: Mesh | AbstractMesh,
) -> Any:
    """Return the specs of a whole optimizer state, given those of the parameters.

    Any optax transformation will do: LDAdam's within ``chain``, ``partition``,
    ``masked``, ``inject_hyperparams`` or ``MultiSteps``. Nothing is allocated: JAX's
    own sharding types are carried through ``tx.init`` on abstract values.

    Args:
      tx: The optimizer.
      params: Parameters, or anything of their shapes and dtypes.
      specs: ``PartitionSpec`` of each parameter, in a tree of the same leaves.
      mesh: The mesh whose axes they name.

    Returns:
      Tree of ``PartitionSpec`` with the structure of ``tx.init(params)``; a name that
      does not divide its axis is dropped.

    Example:
      >>> import jax.numpy as jnp
      >>> from ldadam_optax import scale_by_ldadam
      >>> mesh = AbstractMesh((4, 2), ("data", "model"))
      >>> params = {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
      >>> specs = {"kernel": PartitionSpec("data", "model")}
      >>> state = state_specs(scale_by_ldadam(rank=2), params, specs, mesh)
      >>> tuple(state.mu["kernel"]), tuple(state.projector["kernel"])
      ((None, ('model', 'data')), ('data', None))

      With a mesh of devices, the state is made where it belongs by
      ``jax.jit(tx.init, out_shardings=jax.tree.map(
      lambda spec: NamedSharding(mesh, spec), state))``.
    """
    explicit = AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=(AxisType.Explicit,) * len(mesh.axis_names),
    )

    def typed(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(explicit, fit(spec, leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    leaves, treedef = jax.tree.flatten(params)
    spec_leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    abstract = treedef.unflatten(
        [typed(*pair) for pair in zip(leaves, spec_leaves, strict=True)]
    )
    # In that mesh's context: since jax 0.12 the zeros that optax makes like a parameter
    # lose its sharding elsewhere, and a mesh set by the caller would be another one.
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, abstract)
    return jax.tree.map(_spec_of, state)


def replicate_beside(value: Any, leaf: Any) -> Any:
    """Put ``value`` on all devices of a leaf's mesh, where it is known."""
    sharding = named_sharding(leaf)
    if sharding is None:
        return value
    # As compiled steps write it: explicit axes name each axis of the array.
    whole = [None] * np.ndim(value) if _explicit(sharding) else []
    spec = PartitionSpec(*whole)
    if isinstance(leaf, jax.core.Tracer):
        return jax.sharding.reshard(value, NamedSharding(sharding.mesh, spec))
    return jax.device_put(value, NamedSharding(leaf.sharding.mesh, spec))


def shard_like(value: jax.Array, leaf: Any, never: jax.Array) -> jax.Array:
    """Have the compiler shard ``value`` like a leaf of its shape and dtype.

    For automatic axes within ``jit``, where nobody but the compiler knows how the leaf
    is sharded. A product whose factors are split along different axes can go either
    way; what it is selected with, element by element, decides. It costs the reading of
    the leaf, which ``optax.apply_updates`` shares if the leaf is the parameter. To
    measure it again: ``tests/test_sharding.py`` without the select. To delete when jax
    has a way to tie two shardings: ``jax.experimental.shard_alike`` was one until
    jax 0.11.

    Args:
      value: An update.
      leaf: The parameter, or the gradient.
      never: A scalar that is false, though the compiler does not know.
    """
    traced = isinstance(value, jax.core.Tracer) and isinstance(leaf, jax.core.Tracer)
    if not traced or named_sharding(leaf) is not None or jax.device_count() == 1:
        return value
    return jnp.where(never, leaf, value)


def leaf_specs(
    view: MatrixView, spec: PartitionSpec, mesh: Any
) -> dict[str, PartitionSpec]:
    """The rule table: specs of a leaf's state from the leaf's own spec.

    To be given to :func:`fit`. The mesh, concrete, abstract or empty, tells which names
    are axes of it, and which of these have a size of one.
    """
    names = [*spec, *[None] * (len(view.shape) - len(spec))]
    batch = [names[axis] for axis in view.batch_axes]
    first = (
        next((names[axis] for axis in axes if view.shape[axis] > 1), None)
        for axes in (view.m_axes, view.n_axes)
    )
    m_name, n_name = (name if _splits(name, mesh) else None for name in first)
    rows = n_name if m_name is None else m_name
    columns = _joined(n_name, m_name, mesh)
    by_kind = {
        COORDINATES: PartitionSpec(*batch, None, columns),
        BASIS: PartitionSpec(*batch, rows, None),
        LEAF: PartitionSpec(*names),
        MATRIX: PartitionSpec(*batch),
    }
    return {field.name: by_kind[field.kind] for field in FIELDS}


def fit(spec: PartitionSpec, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Drop the names of a spec that do not divide their axis, and keep all others.

    Args:
      spec: Spec of an array.
      shape: Shape of the array.
      mesh: Mesh, concrete or abstract.

    Returns:
      A spec that is valid for the shape.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
      >>> tuple(fit(PartitionSpec("data", "model"), (8, 3), mesh))
      ('data', None)
      >>> tuple(fit(PartitionSpec(("model", "data")), (6,), mesh))
      ('model',)
    """
    names = zip(spec, shape, strict=False)
    return PartitionSpec(*(_that_divide(name, size, mesh) for name, size in names))


def axes_of(name: Any) -> tuple[Any, ...]:
    """The mesh axes in one entry of a spec."""
    return name if isinstance(name, tuple) else () if name is None else (name,)


def on_mesh(
    step: Callable[..., Any], sharding: NamedSharding | None, out_specs: Any
) -> Callable[..., Any]:
    """Run ``step`` on the leaf's mesh, with results of the given specs.

    Args:
      step: Function of arrays, written as for one device.
      sharding: The leaf's :func:`named_sharding`.
      out_specs: Tree of ``PartitionSpec`` that the result has, or None.

    Returns:
      A function of the same arguments.
    """
    if sharding is None:
        return step
    out_shardings = jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec),
        out_specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    if _explicit(sharding):
        return jax.sharding.auto_axes(step, out_sharding=out_shardings)
    return lambda *args: jax.lax.with_sharding_constraint(step(*args), out_shardings)


def _joined(own: Any, other: Any, mesh: Any) -> Any:
    """The names of an axis's own and then of the matrix's other axis.

    A logical name, which is no axis of the mesh, is resolved by its owner and stands
    alone.
    """
    if own is None or other is None:
        return other if own is None else own
    both = (*axes_of(own), *axes_of(other))
    return both if all(axis in mesh.shape for axis in both) else own


def _that_divide(name: Any, size: int, mesh: Any) -> Any:
    """The axes of a name that divide what those before have left; logical ones do."""
    kept, parts = (), 1
    for axis in axes_of(name):
        more = parts * mesh.shape.get(axis, 1)
        if size % more == 0:
            kept, parts = (*kept, axis), more
    if kept == axes_of(name):
        return name
    return kept if len(kept) > 1 else next(iter(kept), None)


def _splits(name: Any, mesh: Any) -> bool:
    """False for no name and for mesh axes of size one; logical names may split."""
    return any(mesh.shape.get(axis, 2) > 1 for axis in axes_of(name))


def _explicit(sharding: Any) -> bool:
    return isinstance(sharding, NamedSharding) and (
        AxisType.Explicit in sharding.mesh.axis_types
    )


def _spec_of(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
    sharding = jax.typeof(leaf).sharding
    return sharding.spec if _explicit(sharding) else PartitionSpec()
