"""What the factories refuse: each error states the rule, the value and the way out."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

#: What holds a dtype of its own, where an option is to be something else.
ARRAYS = np.generic | np.ndarray | jax.Array

_RANGES = {
    "learning_rate": ("finite", lambda x: np.isfinite(x)),
    "b1": ("in [0, 1)", lambda x: 0 <= x < 1),
    "b2": ("in [0, 1)", lambda x: 0 <= x < 1),
    "eps": ("> 0 and finite", lambda x: 0 < x < np.inf),
    "rho": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "weight_decay": (">= 0 and finite", lambda x: 0 <= x < np.inf),
    "subspace_interval": (">= 1", lambda x: x >= 1),
}


def check_ranges(**values: Any) -> None:
    """Check numbers: of real type, scalar, and in range where the value is known.

    Raises:
      TypeError: if a value is no real scalar, nor a trace of one.
      ValueError: if a number is out of range.
    """
    for name, value in values.items():
        _check_number(name, value)
        if isinstance(value, jax.core.Tracer):
            continue
        rule, holds = _RANGES[name]
        # By NumPy: under a trace jax would give a traced bool for known numbers too.
        if not holds(np.asarray(value)):
            raise ValueError(f"{name} must be {rule}, got {name}={value}.")


def check_schedules(**values: Any) -> None:
    """:func:`check_ranges` of numbers that may be schedules, which pass."""
    check_ranges(**{k: value for k, value in values.items() if not callable(value)})


def _check_number(name: str, value: Any) -> None:
    dtype = np.dtype(object)
    if (isinstance(value, int) and abs(value) < 2**31) or isinstance(value, float):
        dtype = np.dtype(type(value))
    elif isinstance(value, ARRAYS) and value.ndim == 0:
        dtype = value.dtype
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(
            f"{name} must be a number, a float or an int below 2^31, got "
            f"{name}={value!r}. A schedule of an option that takes none goes through "
            "optax.inject_hyperparams."
        )


def check_bool(name: str, value: Any) -> None:
    """Raise a TypeError for anything but True and False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {name}={value!r}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value``, or raise a ValueError if it is not one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {name}={value!r}.")
    return value


def storage_dtype(
    name: str, dtype: jax.typing.DTypeLike | None, choices: tuple[str, ...]
) -> str | None:
    """Return the name of a storage dtype; None, for the default, stays None."""
    if dtype is None:
        return None
    try:
        is_array = isinstance(dtype, ARRAYS)
        found = "an array" if is_array else jnp.dtype(dtype).name  # it has one, is none
    except TypeError:
        found = str(dtype)
    if found not in choices:
        raise ValueError(f"{name} must be None or one of {choices}, got {dtype!r}.")
    return found


def check_array(name: str, leaf: Any) -> None:
    """Raise a TypeError for a leaf that is no array, such as a module's function."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"{name} is a {type(leaf).__name__}, not an array. Pass the arrays of a "
            "module alone: equinox.filter(model, equinox.is_inexact_array)."
        )


def compute_dtype(name: str, leaf: Any) -> str:
    """float64 for a float64 leaf, float32 for any other real floating leaf."""
    check_array(name, leaf)
    dtype = jnp.dtype(leaf.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} has dtype {dtype.name}; LDAdam updates real floating leaves. "
            "Keep it away with optax.masked; for complex ones see "
            "optax.contrib.split_real_and_imaginary."
        )
    return "float64" if dtype == np.float64 else "float32"
