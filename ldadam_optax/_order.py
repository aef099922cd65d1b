"""What is finished before what, so that few temporaries live at a time.

Left to itself a compiler works on many leaves, and on several results of one, side by
side, and holds the temporaries of all. Accelerators' compilers heed optimization
barriers. XLA's for the CPU removes them before it schedules; what it cannot see through
is a condition that only a run could decide.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp


def after(ready: Any, value: Any) -> Any:
    """``value``, with which the compiler begins only when ``ready`` is there.

    Eager steps run one after another anyway.
    """
    if not isinstance(value, jax.core.Tracer):
        return value
    return jax.lax.optimization_barrier((value, ready))[0]


def settle(kept: Any, pending: Any, never: jax.Array) -> tuple[Any, Any]:
    """Finish ``kept`` before anything is made of ``pending``, on the CPU.

    Its scheduler makes the updates of all leaves first and state after that, whose
    inputs wait. A loop without an iteration needs all that it might have changed.

    Args:
      kept: Arrays that the state keeps.
      pending: Arrays of which the update is made.
      never: A scalar that is false, though the compiler does not know.

    Returns:
      ``(kept, pending)``.
    """

    def loop(kept: Any, pending: Any) -> tuple[Any, Any]:
        def body(carry: Any) -> Any:
            flag, values = carry
            return ~flag, jax.tree.map(jnp.negative, values)

        start = (never, (kept, pending))
        return jax.lax.while_loop(lambda carry: carry[0], body, start)[1]

    def as_they_are(kept: Any, pending: Any) -> tuple[Any, Any]:
        return kept, pending

    return jax.lax.platform_dependent(kept, pending, cpu=loop, default=as_they_are)


def in_one_place(value: jax.Array, old: jax.Array, never: jax.Array) -> jax.Array:
    """``value`` in the layout of ``old``, for all that use it, on the CPU.

    Products read a transpose as well as what it is the transpose of, so the compiler
    puts off the transpose that the state keeps, and holds both.
    """

    def select(value: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(never, old, value)

    return jax.lax.platform_dependent(
        value, old, cpu=select, default=lambda value, old: value
    )
