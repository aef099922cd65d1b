"""Adam on the leaves that are not compressed, with LDAdam's arithmetic and storage.

The moments are float32 where the parameters are narrower (``optax.scale_by_adam`` keeps
them in the parameters' dtype), and they follow ``mu_dtype`` and ``nu_dtype``. In int8
they lie in blocks of 32 along the last axis: in an embedding a block is a part of one
token's row, so that rare tokens are not measured by frequent ones.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldadam_optax._dimension_numbers import leaf_name
from ldadam_optax._quantization import MU_CODECS, NU_CODECS, Codec, Stored
from ldadam_optax._random import salt_of, seed_of
from ldadam_optax._sharding import fit, named_sharding, on_mesh
from ldadam_optax._state import check_scalar, check_stored, names_of


class ScaleByAdamState(NamedTuple):
    """State of Adam on the leaves that LDAdam does not take.

    Attributes:
      count: Steps taken, int32, shape ``()``.
      mu: First moment, in the parameters' shapes, or int8 codes with the last axis
        padded to blocks of 32.
      nu: Second moment, likewise.
      mu_scale: For int8 a bfloat16 scale for each block of 32; else None.
      nu_scale: Likewise.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    mu_scale: optax.Updates | None = None
    nu_scale: optax.Updates | None = None


def scale_by_adam(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    mu_dtype: str | None,
    nu_dtype: str | None,
) -> optax.GradientTransformation:
    """``optax.scale_by_adam``, its moments in any storage."""
    adam = optax.scale_by_adam(b1, b2, eps)

    def init_fn(params: Any) -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, _wide(x)), params)
        return stored(adam.init(zeros))

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        targets = updates if params is None else params
        _check_state(state, targets, mu_dtype, nu_dtype)
        wide = jax.tree.map(lambda g, p: g.astype(_wide(p)), updates, targets)
        directions, moved = adam.update(wide, loaded(state, wide))
        directions = jax.tree.map(lambda d, p: d.astype(p.dtype), directions, targets)
        return directions, stored(moved)

    def stored(state: Any) -> ScaleByAdamState:
        mu, mu_scale = _encode(MU_CODECS, mu_dtype, state.mu, state.count)
        nu, nu_scale = _encode(NU_CODECS, nu_dtype, state.nu, state.count)
        return ScaleByAdamState(state.count, mu, nu, mu_scale, nu_scale)

    def loaded(state: Any, like: Any) -> optax.ScaleByAdamState:
        mu = _decode(MU_CODECS, state.mu, state.mu_scale, like)
        nu = _decode(NU_CODECS, state.nu, state.nu_scale, like)
        return optax.ScaleByAdamState(state.count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _check_state(
    state: Any, targets: Any, mu_dtype: str | None, nu_dtype: str | None
) -> None:
    """Refuse a state of other parameters or storage, by the name of the leaf."""
    if not isinstance(state, ScaleByAdamState):
        raise TypeError(
            "update needs the ScaleByAdamState that init made for the leaves on AdamW, "
            f"got {type(state).__name__}."
        )
    check_scalar("count of the leaves on AdamW", state.count, jnp.integer)
    named = list(zip(names_of(targets), jax.tree.leaves(targets), strict=True))
    for field, codecs, dtype in (
        ("mu", MU_CODECS, mu_dtype),
        ("nu", NU_CODECS, nu_dtype),
    ):
        wanted = [(name, leaf, _stored_as(codecs, dtype, leaf)) for name, leaf in named]
        _check_field(state, field, [(n, leaf, w.codes) for n, leaf, w in wanted])
        _check_field(
            state, f"{field}_scale", [(n, leaf, w.scale) for n, leaf, w in wanted]
        )


def _check_field(state: Any, field: str, wanted: list[tuple[str, Any, Any]]) -> None:
    tree = getattr(state, field)
    used = [(name, leaf, want) for name, leaf, want in wanted if want is not None]
    names = [name for name, _, _ in used]
    if (found := names_of(tree)) != names:
        raise ValueError(
            f"The state's {field} of AdamW has the leaves {found}, these parameters "
            f"and options need {names}: pass the state that init made for them."
        )
    for (name, leaf, want), value in zip(used, jax.tree.leaves(tree), strict=True):
        way_out = "Pass the state that init made for these parameters and options."
        check_stored(f"{field} of {name}", value, want, leaf.shape, way_out)


def _stored_as(codecs: dict[str, Codec], dtype: str | None, leaf: Any) -> Stored:
    """Abstract values of a moment of that leaf."""
    if dtype != "int8":
        return Stored(jax.ShapeDtypeStruct(leaf.shape, dtype or _wide(leaf)))
    return codecs[dtype].shapes(*_rows(leaf))


def _encode(
    codecs: dict[str, Codec], dtype: str | None, moment: Any, count: jax.Array
) -> tuple[Any, Any]:
    """The moment as the state keeps it, and its scales."""
    if dtype is None:
        return moment, None
    if dtype != "int8":
        return optax.tree.cast(moment, dtype), None
    paths, treedef = jax.tree.flatten_with_path(moment)
    codes, scales = [], []
    for path, leaf in paths:
        seed = seed_of(count, salt_of(leaf_name(path)))
        encode = functools.partial(_encode_leaf, codecs[dtype])
        sharding = named_sharding(leaf)
        if sharding is not None:
            shapes = codecs[dtype].shapes(*_rows(leaf))
            specs = jax.tree.map(
                lambda x, s=sharding: fit(s.spec, x.shape, s.mesh), shapes
            )
            encode = on_mesh(encode, sharding, specs)
        stored = encode(leaf, seed)
        codes.append(stored.codes)
        scales.append(stored.scale)
    return treedef.unflatten(codes), treedef.unflatten(scales)


def _encode_leaf(codec: Codec, leaf: jax.Array, seed: jax.Array) -> Stored:
    shape, axis = _rows(leaf)
    return codec.encode(leaf.reshape(shape), axis, seed)


def _rows(leaf: jax.Array) -> tuple[tuple[int, ...], int]:
    """Shape of the leaf with at least one axis, and the axis that has the blocks."""
    shape = leaf.shape or (1,)
    return shape, len(shape) - 1


def _decode(codecs: dict[str, Codec], moment: Any, scales: Any, like: Any) -> Any:
    """The moment in the dtype and the shardings of the gradients."""
    if scales is None:
        return jax.tree.map(lambda m, g: m.astype(g.dtype), moment, like)

    def decode(codes: jax.Array, scale: jax.Array, grad: jax.Array) -> jax.Array:
        def plain(codes: jax.Array, scale: jax.Array) -> jax.Array:
            shape, axis = _rows(grad)
            stored = Stored(codes, scale)
            array = codecs["int8"].decode(stored, axis, shape, jnp.uint32(0))
            return array.reshape(grad.shape).astype(grad.dtype)

        sharding = named_sharding(grad)
        if sharding is None:
            return plain(codes, scale)
        return on_mesh(plain, sharding, sharding.spec)(codes, scale)

    return jax.tree.map(decode, moment, scales, like)


def _wide(leaf: Any) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)
