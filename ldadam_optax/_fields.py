"""The fields of the state, in one table.

A row of :data:`FIELDS` tells a field's name, what it is, how it lies on a mesh (its
kind) and what is stored. ``init``, the checks of ``update``, the sharding rules, Flax's
boxes and the memory report read it: a new field is one row here and the code that fills
it. The state itself is made of the table.
"""

import collections
from collections.abc import Callable
from typing import NamedTuple

import jax

from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._options import Options
from ldadam_optax._quantization import MU_CODECS, NU_CODECS, Codec, Stored, block_axis
from ldadam_optax._residual import error_codec, holds_momentum
from ldadam_optax._subspace import SUBSPACES

#: Kinds of fields; ``_sharding.py`` has the rule of each.
COORDINATES, BASIS, LEAF, MATRIX = "coordinates", "basis", "leaf", "matrix"

_Shape = jax.ShapeDtypeStruct | None


class Field(NamedTuple):
    """One row.

    Attributes:
      name: Name in the state.
      kind: ``'coordinates'``, ``(batch.., r, n)`` or its codes; ``'basis'``,
        ``(batch.., m, r)``; ``'leaf'``, the parameter's shape or its codes;
        ``'matrix'``, one number for each matrix, ``(batch..,)``.
      meaning: One sentence.
      stored: ``(view, options, dtype)`` to its abstract value, with ``dtype`` that of
        the arithmetic; None where the options do not use the field.
    """

    name: str
    kind: str
    meaning: str
    stored: Callable[[MatrixView, Options, str], _Shape]


def moment_codecs(options: Options, dtype: str) -> tuple[Codec, Codec]:
    """The codecs of mu and of nu."""
    return MU_CODECS[options.mu_dtype or dtype], NU_CODECS[options.nu_dtype or dtype]


def coords_axis(view: MatrixView) -> int:
    """Which axis of the coordinates is cut into blocks."""
    axes = len(view.coords_shape)
    return block_axis(view.coords_shape, (axes - 2, axes - 1))


def _moment(which: int, part: str) -> Callable[[MatrixView, Options, str], _Shape]:
    def stored(view: MatrixView, options: Options, dtype: str) -> _Shape:
        codec = moment_codecs(options, dtype)[which]
        return getattr(codec.shapes(view.coords_shape, coords_axis(view)), part)

    return stored


def _error(part: str) -> Callable[[MatrixView, Options, str], _Shape]:
    def stored(view: MatrixView, options: Options, dtype: str) -> _Shape:
        if options.residual != "error_feedback":
            return None
        codec, axis = error_codec(view, options.error_dtype or dtype)
        return getattr(codec.shapes(view.shape, axis), part)

    return stored


def _basis(view: MatrixView, options: Options, dtype: str) -> _Shape:
    return SUBSPACES[options.subspace].shape(view, options.projector_dtype or dtype)


def _residual_norm(view: MatrixView, options: Options, dtype: str) -> _Shape:
    if options.residual != "recovery":
        return None
    return jax.ShapeDtypeStruct(view.batch_shape, dtype)


FIELDS = (
    Field(
        "mu",
        COORDINATES,
        "First moment in the basis, (batch.., r, n), mu_dtype or int8 codes.",
        _moment(0, "codes"),
    ),
    Field(
        "nu",
        COORDINATES,
        "Second moment in the basis, (batch.., r, n), nu_dtype or int8 codes.",
        _moment(1, "codes"),
    ),
    Field(
        "projector",
        BASIS,
        "Orthonormal basis, (batch.., m, r), projector_dtype.",
        _basis,
    ),
    Field(
        "error",
        LEAF,
        "With error feedback, in the dtype of the arithmetic, e + c U mu in the "
        "parameter's shape; in bfloat16 or float16 the error e itself; for int8 and "
        "int4 codes of e, int8, one axis padded to blocks of 32 (and halved for "
        "int4). Read it with ldadam_error.",
        _error("codes"),
    ),
    Field(
        "error_scale",
        LEAF,
        "For an error in int8 or int4 a bfloat16 scale for each block of 32.",
        _error("scale"),
    ),
    Field(
        "mu_scale",
        COORDINATES,
        "For mu in int8 a bfloat16 scale for each block of 32.",
        _moment(0, "scale"),
    ),
    Field(
        "nu_scale",
        COORDINATES,
        "For nu in int8 a bfloat16 scale for each block of 32.",
        _moment(1, "scale"),
    ),
    Field(
        "residual_norm",
        MATRIX,
        "With residual='recovery' the norm of what the last step added from outside "
        "the basis, (batch..,).",
        _residual_norm,
    ),
)

# Of the whole state, beside the fields that each leaf has.
_COMMON = {
    "count": "Steps taken, int32, shape ().",
    "c": "b1 / (1 - b1) of the last step, with which the error buffer holds the "
    "momentum; 0 without error feedback. A float, shape ().",
    "form": "How the state is to be read, in the shape of an int8 array of zeros: "
    "(1, .) if square matrices have their rows compressed, (2, .) if their columns; "
    "(., 1) if error buffers hold e + c U mu, (., 2) if they hold e or there are "
    "none. A shape is what Orbax and a compiled step compare.",
}

_names = [field.name for field in FIELDS]
LeafState = collections.namedtuple("LeafState", _names, defaults=[None] * len(_names))
LeafState.__doc__ = "The fields of the state that each leaf has, for one leaf."

ScaleByLDAdamState = collections.namedtuple(
    "ScaleByLDAdamState", ["count", *_names, "c", "form"]
)
ScaleByLDAdamState.__doc__ = (
    "State of :func:`scale_by_ldadam`; trees have the structure of the parameters.\n\n"
    "A field that the options do not use is None.\n\n"
    "Attributes:\n"
    + "".join(f"  {name}: {meaning}\n" for name, meaning in _COMMON.items())
    + "".join(f"  {field.name}: {field.meaning}\n" for field in FIELDS)
)


def used_fields(options: Options) -> list[Field]:
    """The rows whose fields a state of these options has."""
    any_view = MatrixView((1, 1), (), (0,), (1,), 1)
    return [f for f in FIELDS if f.stored(any_view, options, "float32") is not None]


def stored_fields(view: MatrixView, options: Options, dtype: str) -> LeafState:
    """Abstract values of a leaf's fields, None where a field is not used."""
    return LeafState(*(field.stored(view, options, dtype) for field in FIELDS))


def encode_moments(
    view: MatrixView, options: Options, mu: jax.Array, nu: jax.Array, seed: jax.Array
) -> dict[str, jax.Array | None]:
    """The fields that keep the moments."""
    axis = coords_axis(view)
    codecs = moment_codecs(options, mu.dtype.name)
    kept_mu, kept_nu = (
        codec.encode(moment, axis, seed)
        for codec, moment in zip(codecs, (mu, nu), strict=True)
    )
    return {
        "mu": kept_mu.codes,
        "mu_scale": kept_mu.scale,
        "nu": kept_nu.codes,
        "nu_scale": kept_nu.scale,
    }


def decode_moments(
    view: MatrixView, options: Options, state: LeafState, dtype: str, seed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``mu`` and ``nu`` in the dtype of the arithmetic, stored under this seed."""
    axis, shape = coords_axis(view), view.coords_shape
    kept = Stored(state.mu, state.mu_scale), Stored(state.nu, state.nu_scale)
    mu, nu = (
        codec.decode(stored, axis, shape, seed).astype(dtype)
        for codec, stored in zip(moment_codecs(options, dtype), kept, strict=True)
    )
    return mu, nu


def form_of(views: list[MatrixView], options: Options, dtypes: list[str]) -> tuple:
    """The shape of the state's ``form``."""
    square = [view for view in views if view.m == view.n]
    columns = any(view.m_axes > view.n_axes for view in square)
    with_momentum = options.residual == "error_feedback" and any(
        holds_momentum(options.error_dtype or dtype, dtype) for dtype in dtypes
    )
    return (2 if columns else 1, 1 if with_momentum else 2)
