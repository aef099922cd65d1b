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
        wide = jax.tree.map(lambda g: g.astype(_wide(g)), updates)
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
