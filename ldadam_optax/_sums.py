"""Which arrays are sums of gradients and error buffers, while they are alive.

An update that takes such a sum for a gradient adds the error twice. Within one trace,
or eagerly, the array itself tells; where a compiled function lies between, nothing
does.
"""

import weakref
from collections.abc import Sequence
from typing import Any

_SUMS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def mark_sum(array: Any) -> Any:
    """Remember that the array contains an error buffer; return it."""
    _SUMS[id(array)] = array
    return array


def check_sums(grads: Sequence[Any], told: bool) -> None:
    """Raise a ValueError if sums are given to an update that was not told so."""
    if not told and any(_SUMS.get(id(grad)) is grad for grad in grads):
        raise ValueError(
            "These updates contain the error buffer already, and update would add it "
            "once more. Pass what accumulate_gradients returned on: "
            "tx.update(updates, state, params, **extra_args)."
        )
