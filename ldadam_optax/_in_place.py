"""A loop over parts of arrays that are written where they have been read."""

from collections.abc import Callable
from typing import TypeVar

import jax

Arrays = TypeVar("Arrays")
Part = TypeVar("Part")


def part_by_part(
    step: Callable[[jax.Array, Part], Part],
    turns: int,
    arrays: Arrays,
    read: Callable[[jax.typing.ArrayLike, Arrays], Part],
    write: Callable[[jax.Array, Arrays, Part], Arrays],
) -> Arrays:
    """``arrays``, each of whose parts ``step`` has replaced; no copy of them is made.

    Each turn reads the next part out of what it has written, and carries it. Were it
    read beside the write, compilers could not tell that nothing reads the old value
    after it, and would copy the arrays in every turn.

    Args:
      step: ``(i, part)`` to what takes its place.
      turns: Number of parts.
      arrays: A tree of arrays.
      read: ``(i, arrays)`` to a part; is asked for one beyond the last, too.
      write: ``(i, arrays, part)`` to the arrays with the part in them.
    """

    def turn(i: jax.Array, carry: tuple[Arrays, Part]) -> tuple[Arrays, Part]:
        arrays, part = carry
        arrays = write(i, arrays, step(i, part))
        return arrays, read(i + 1, arrays)

    arrays, _ = jax.lax.fori_loop(0, turns, turn, (arrays, read(0, arrays)))
    return arrays
