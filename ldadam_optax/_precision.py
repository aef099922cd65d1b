"""How accurately matrix products run.

The products that touch a whole matrix cost most of a step, and what they find need not
be exact: what a product of the subspace misses, error feedback keeps. They run at the
``precision`` that the user chooses; the backend's own by default: float32 on a CPU,
TF32 on a GPU, bfloat16 on a TPU. Gram matrices, factors and changes of basis make up
what stays orthonormal over thousands of steps: they run at :func:`matmul`'s float32
accuracy everywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp

#: Choices of ``precision``: jax's own, and operands rounded on every backend.
PRECISIONS = ("default", "high", "highest", "bfloat16")


def einsum(*operands: Any, precision: str | None) -> jax.Array:
    """``jnp.einsum`` of two arrays in their dtype, at one of :data:`PRECISIONS`."""
    if precision != "bfloat16":
        return jnp.einsum(*operands, precision=precision)
    rounded = [x.astype(jnp.bfloat16) if hasattr(x, "dtype") else x for x in operands]
    dtype = operands[0].dtype
    product = jnp.einsum(*rounded, preferred_element_type=jnp.float32)
    return product.astype(dtype)


def product(a: jax.Array, b: jax.Array, precision: str | None) -> jax.Array:
    """``a @ b`` of panels, at one of :data:`PRECISIONS`."""
    return einsum(a, [..., 0, 1], b, [..., 1, 2], [..., 0, 2], precision=precision)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` at float32 accuracy on each backend."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
