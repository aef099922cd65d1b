"""What the factories refuse: each error states the rule, the value and the way out."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

_RANGES = {
    "b1": ("in [0, 1)", lambda x: 0 <= x < 1),
    "b2": ("in [0, 1)", lambda x: 0 <= x < 1),
    "eps": ("> 0", lambda x: x > 0),
    "rho": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "weight_decay": (">= 0", lambda x: x >= 0),
    "subspace_interval": (">= 1", lambda x: x >= 1),
}


def check_ranges(**values: Any) -> None:
    """Raise a ValueError where a number is out of range; traces and schedules pass."""
    for name, value in values.items():
        rule, holds = _RANGES[name]
        known = not callable(value) and not isinstance(value, jax.core.Tracer)
        if known and not holds(value):
            raise ValueError(f"{name} must be {rule}, got {name}={value}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value``, or raise a ValueError if it is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {name}={value!r}.")
    return value


def storage_dtype(
    name: str, dtype: jax.typing.DTypeLike | None, choices: tuple[str, ...]
) -> str | None:
    """Return the name of a storage dtype; None, for the default, stays None."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype).name
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
