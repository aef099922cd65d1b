"""A loop over parts of a leaf that are written where they have been read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def part_by_part(
    step: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    turns: int,
    grad: jax.Array,
    state: Any,
    update_dtype: str,
    read: Callable[[jax.Array, Any], jax.Array],
    write: Callable[[jax.Array, jax.Array, Any], jax.Array],
) -> tuple[jax.Array, Any]:
    """``(update, state)`` of a leaf whose parts take their step one after another.

    Updates take the gradient's place, where they are of its dtype, and new state the
    old one's, so that temporaries are those of one part. Each turn reads the next part
    out of what it has written, and carries it: were it read beside the write, compilers
    could not tell that nothing reads the old value after it, and would copy the arrays
    in every turn.

    Args:
      step: ``(i, grad, state)`` of a part to its ``(update, state)``.
      turns: Number of parts.
      grad: Gradient.
      state: A tree of arrays.
      update_dtype: Dtype of the update.
      read: ``(array, i)`` to a part; is asked for one beyond the last, too.
      write: ``(array, part, i)`` to the array with the part in it.
    """
    in_place = grad.dtype == update_dtype
    updates = grad if in_place else jnp.zeros(grad.shape, update_dtype)

    def part(i: Any, updates: jax.Array, state: Any) -> Any:
        return jax.tree.map(
            lambda x: read(x, i), (updates if in_place else grad, state)
        )

    def turn(i: jax.Array, carry: Any) -> Any:
        arrays, own = carry
        arrays = jax.tree.map(lambda x, v: write(x, v, i), arrays, step(i, *own))
        return arrays, part(i + 1, *arrays)

    arrays = updates, state
    arrays, _ = jax.lax.fori_loop(0, turns, turn, (arrays, part(0, *arrays)))
    return arrays
