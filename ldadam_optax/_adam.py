"""Adam on the leaves that are not compressed, with LDAdam's arithmetic and storage.

The moments are float32 where the parameters are narrower (``optax.scale_by_adam`` keeps
them in the parameters' dtype), and they follow ``mu_dtype`` and ``nu_dtype``. In int8
they lie in blocks of 32 along the last axis: in an embedding a block is a part of one
token's row, so that rare tokens are not measured by frequent ones.
"""

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from ldadam_optax._dimension_numbers import leaf_name
from ldadam_optax._in_place import part_by_part
from ldadam_optax._options import leaves_in_turn
from ldadam_optax._quantization import BLOCK, MU_CODECS, NU_CODECS, Codec, Stored
from ldadam_optax._random import salt_of, seed_of, seed_within
from ldadam_optax._sharding import fit, named_sharding, on_mesh
from ldadam_optax._state import check_scalar, check_stored, names_of

# Elements of a leaf that is updated in tiles, and of a tile at most; columns that fill
# a TPU's vector registers.
_LARGE, _TILE, _LANES = 2**20, 2**18, 128


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


Moments: TypeAlias = tuple[Stored, Stored]  # mu and nu, as the state keeps them


class _Options(NamedTuple):
    """What is static for all leaves."""

    mu_dtype: str | None
    nu_dtype: str | None
    factorizations: str | None


def scale_by_adam(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    mu_dtype: str | None,
    nu_dtype: str | None,
    factorizations: str | None = None,
) -> optax.GradientTransformation:
    """``optax.scale_by_adam``, its moments in any storage."""
    options = _Options(mu_dtype, nu_dtype, factorizations)

    def init_fn(params: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        count = jnp.zeros((), jnp.int32)
        seed = seed_of(count, 0)  # zeros are stored as zeros, whatever the seed
        moments = [_encode(options, (_zeros(x), _zeros(x)), seed) for x in leaves]
        return _state(options, treedef, count, moments)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        targets = updates if params is None else params
        _check_state(state, targets, mu_dtype, nu_dtype)
        paths, treedef = jax.tree.flatten_with_path(updates)
        count: Any = optax.safe_increment(state.count)
        directions, moments = [], []
        for (path, grad), target, prev in zip(
            paths,
            treedef.flatten_up_to(targets),
            _moments(treedef, state),
            strict=True,
        ):
            rows = rows_of_a_tile(grad) if _is_cut(options, grad, prev) else 0
            step: Any = functools.partial(_in_tiles, rows) if rows else _adam_step
            direction, moved = step(
                options,
                jnp.dtype(target.dtype).name,
                (b1, b2, eps, state.count),
                (grad, prev),
                seed_of(count, salt_of(leaf_name(path))),
            )
            directions.append(direction)
            moments.append(moved)
        return treedef.unflatten(directions), _state(options, treedef, count, moments)

    return optax.GradientTransformation(init_fn, update_fn)


def _adam_step(
    options: _Options,
    dtype: str,
    scalars: tuple[jax.typing.ArrayLike, ...],
    leaf: tuple[jax.Array, Moments],
    seed: jax.Array,
) -> tuple[jax.Array, Moments]:
    """Adam's direction and the new moments of one leaf, or of some of its rows.

    Args:
      options: What is static for all leaves.
      dtype: Dtype of the direction.
      scalars: ``b1``, ``b2``, ``eps``, and the steps before this one.
      leaf: Gradient and moments.
      seed: The leaf's seed, or one for each row.
    """
    (b1, b2, eps, count), (grad, moments) = scalars, leaf
    wide = grad.astype(jnp.promote_types(dtype, jnp.float32))
    mu, nu = _decode(moments, wide)
    adam: Any = optax.scale_by_adam(b1, b2, eps)
    direction, moved = adam.update(wide, optax.ScaleByAdamState(count, mu, nu))
    return direction.astype(dtype), _encode(options, (moved.mu, moved.nu), seed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _in_tiles(
    rows: int,
    options: _Options,
    dtype: str,
    scalars: tuple[jax.typing.ArrayLike, ...],
    leaf: tuple[jax.Array, Moments],
    seed: jax.Array,
) -> tuple[jax.Array, Moments]:
    """:func:`_adam_step` on so many rows after another, each in its own place.

    A TPU's compiler spreads the scales of a leaf over float32 arrays of its size; those
    of a tile stay in vector memory. It would lay the leaf down by columns, along which
    blocks are handled faster, and copy it for that, if it were let.
    """
    grad, moments = leaf
    by_rows = Layout((0, 1))

    def read(array, i):
        return jax.lax.dynamic_slice_in_dim(array, i * rows, rows)

    def write(array, part, i):
        array = jax.lax.dynamic_update_slice_in_dim(array, part, i * rows, 0)
        return with_layout_constraint(array, by_rows)

    def step(i, *part):
        seeds = seed_within(seed, i * rows + jnp.arange(rows))
        return _adam_step(options, dtype, scalars, part, seeds)

    turns = grad.shape[0] // rows
    return part_by_part(step, turns, grad, moments, dtype, read, write)


def _is_cut(options: _Options, grad: jax.Array, moments: Moments) -> bool:
    """True for moments in few bits on one device, where leaves are updated in turn."""
    in_blocks = any(stored.scale is not None for stored in moments)
    one_device = named_sharding(grad) is None and jax.device_count() == 1
    return in_blocks and one_device and leaves_in_turn(options.factorizations)


def rows_of_a_tile(leaf: Any) -> int:
    """A divisor of a large matrix's rows; 0 where it is updated as a whole."""
    if leaf.ndim != 2 or leaf.size < _LARGE or leaf.shape[1] % _LANES:
        return 0
    fitting = range(BLOCK, _TILE // leaf.shape[1] + 1, BLOCK)
    return max((n for n in fitting if leaf.shape[0] % n == 0), default=0)


def _zeros(leaf: Any) -> jax.Array:
    """Zeros that a compiler does not know of: XLA would encode them itself, slowly."""
    return jax.lax.optimization_barrier(jnp.zeros_like(leaf, _wide(leaf)))


def _moments(treedef: Any, state: ScaleByAdamState) -> list[Moments]:
    """The moments of each leaf."""

    def stored(codes: Any, scales: Any) -> list[Stored]:
        codes = treedef.flatten_up_to(codes)
        if scales is None:
            return [Stored(one) for one in codes]
        return list(map(Stored, codes, treedef.flatten_up_to(scales)))

    mus, nus = stored(state.mu, state.mu_scale), stored(state.nu, state.nu_scale)
    return list(zip(mus, nus, strict=True))


def _state(
    options: _Options, treedef: Any, count: jax.Array, moments: list[Moments]
) -> ScaleByAdamState:
    """The state that holds them."""
    mus, nus = [mu for mu, _ in moments], [nu for _, nu in moments]

    def scales(dtype: str | None, stored: list[Stored]) -> Any:
        return treedef.unflatten([x.scale for x in stored]) if dtype == "int8" else None

    return ScaleByAdamState(
        count,
        treedef.unflatten([mu.codes for mu in mus]),
        treedef.unflatten([nu.codes for nu in nus]),
        scales(options.mu_dtype, mus),
        scales(options.nu_dtype, nus),
    )


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
    options: _Options, moments: tuple[jax.Array, jax.Array], seed: jax.Array
) -> Moments:
    """The moments as the state keeps them."""
    (mu, nu), (mu_dtype, nu_dtype, _) = moments, options
    return (
        _encode_one(MU_CODECS, mu_dtype, mu, seed),
        _encode_one(NU_CODECS, nu_dtype, nu, seed),
    )


def _encode_one(
    codecs: dict[str, Codec], dtype: str | None, moment: jax.Array, seed: jax.Array
) -> Stored:
    if dtype != "int8":
        return Stored(moment if dtype is None else moment.astype(dtype))
    encode = functools.partial(_encode_blocks, codecs[dtype])
    sharding = named_sharding(moment)
    if sharding is not None:
        shapes = codecs[dtype].shapes(*_rows(moment))
        specs = jax.tree.map(
            lambda x: fit(sharding.spec, x.shape, sharding.mesh), shapes
        )
        encode = on_mesh(encode, sharding, specs)
    return encode(moment, seed)


def _encode_blocks(codec: Codec, moment: jax.Array, seed: jax.Array) -> Stored:
    if seed.ndim:  # of each row
        return jax.vmap(lambda row, own: codec.encode(row, 0, own))(moment, seed)
    shape, axis = _rows(moment)
    return codec.encode(moment.reshape(shape), axis, seed)


def _rows(leaf: Any) -> tuple[tuple[int, ...], int]:
    """Shape of the leaf with at least one axis, and the axis that has the blocks."""
    shape = leaf.shape or (1,)
    return shape, len(shape) - 1


def _decode(moments: Moments, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The moments in the dtype and the sharding of the gradient."""
    mu, nu = moments
    return _decode_one(MU_CODECS, mu, grad), _decode_one(NU_CODECS, nu, grad)


def _decode_one(codecs: dict[str, Codec], stored: Stored, grad: jax.Array) -> jax.Array:
    if stored.scale is None:
        return stored.codes.astype(grad.dtype)

    def decode(codes: jax.Array, scale: jax.Array) -> jax.Array:
        shape, axis = _rows(grad)
        array = codecs["int8"].decode(Stored(codes, scale), axis, shape, jnp.uint32(0))
        return array.reshape(grad.shape).astype(grad.dtype)

    sharding = named_sharding(grad)
    if sharding is not None:
        decode = on_mesh(decode, sharding, sharding.spec)
    return decode(stored.codes, stored.scale)


def _wide(leaf: Any) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)
