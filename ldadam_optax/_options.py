"""What is static and the same for all leaves, and what the factories refuse."""

from typing import Any, NamedTuple

import jax

from ldadam_optax._checks import check_choice, check_ranges, storage_dtype
from ldadam_optax._dimension_numbers import SIDES, check_rank
from ldadam_optax._precision import PRECISIONS
from ldadam_optax._quantization import ERROR_CODECS, FLOATS, MU_CODECS, NU_CODECS
from ldadam_optax._residual import RESIDUALS
from ldadam_optax._subspace import SUBSPACE_INITS, SUBSPACES

FACTORIZATIONS = ("together", "in_turn")


def leaves_in_turn(factorizations: str | None) -> bool:
    """Whether leaves are updated one after another, by default on all but GPUs.

    Asked in `update`, not in the factory: the answer starts jax's backends.
    """
    return (factorizations or _by_backend()) == "in_turn"


def _by_backend() -> str:
    return "together" if jax.default_backend() == "gpu" else "in_turn"


class Options(NamedTuple):
    """Choices by name; :func:`scale_by_ldadam` documents them."""

    residual: str
    side: str
    subspace: str
    subspace_init: str
    subspace_interval: int
    precision: str | None
    factorizations: str | None
    mu_dtype: str | None
    nu_dtype: str | None
    projector_dtype: str | None
    error_dtype: str | None


def checked_options(
    *,
    rank: int | float,
    b1: Any,
    b2: Any,
    eps: Any,
    rho: Any,
    residual: str,
    side: str,
    subspace: str,
    subspace_init: str,
    subspace_interval: int | None,
    precision: str | None,
    factorizations: str | None,
    mu_dtype: jax.typing.DTypeLike | None,
    nu_dtype: jax.typing.DTypeLike | None,
    projector_dtype: jax.typing.DTypeLike | None,
    error_dtype: jax.typing.DTypeLike | None,
) -> Options:
    """Return the options, or raise an error that tells the rule and the way out."""
    check_rank(rank)
    check_ranges(b1=b1, b2=b2, eps=eps, rho=rho)
    subspace_interval = 1 if subspace_interval is None else subspace_interval
    if isinstance(subspace_interval, bool) or not isinstance(subspace_interval, int):
        raise TypeError(
            "subspace_interval must be a Python int, got "
            f"subspace_interval={subspace_interval!r}. It sets what is compiled: under "
            "optax.inject_hyperparams name it in static_args."
        )
    check_ranges(subspace_interval=subspace_interval)
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
    if factorizations is not None:
        check_choice("factorizations", factorizations, FACTORIZATIONS)
    error_dtype = storage_dtype("error_dtype", error_dtype, tuple(ERROR_CODECS))
    if error_dtype is not None and residual != "error_feedback":
        raise ValueError(
            f"error_dtype={error_dtype!r} is the storage of the error buffer, and "
            f"residual={residual!r} keeps none. Leave error_dtype out, or pass "
            "residual='error_feedback'."
        )
    return Options(
        residual=check_choice("residual", residual, tuple(RESIDUALS)),
        side=check_choice("side", side, SIDES),
        subspace=check_choice("subspace", subspace, tuple(SUBSPACES)),
        subspace_init=check_choice("subspace_init", subspace_init, SUBSPACE_INITS),
        subspace_interval=subspace_interval,
        precision=precision,
        factorizations=factorizations,
        mu_dtype=storage_dtype("mu_dtype", mu_dtype, tuple(MU_CODECS)),
        nu_dtype=storage_dtype("nu_dtype", nu_dtype, tuple(NU_CODECS)),
        projector_dtype=storage_dtype("projector_dtype", projector_dtype, FLOATS),
        error_dtype=error_dtype,
    )
