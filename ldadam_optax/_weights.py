"""bfloat16 weights that lose no small update: the sum is rounded stochastically."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldadam_optax._dimension_numbers import leaf_name
from ldadam_optax._quantization import round_to_bfloat16
from ldadam_optax._random import salt_of, seed_of

# Apart from the seeds with which state is rounded.
_SALT = "weights"


class RoundStochasticallyState(NamedTuple):
    """State of :func:`round_weights_stochastically`.

    Attributes:
      count: Steps taken, int32, shape ``()``.
    """

    count: jax.Array


def round_weights_stochastically() -> optax.GradientTransformation:
    r"""Make each bfloat16 weight plus its update a bfloat16, right on average.

    A bfloat16 weight that is rounded to nearest after each step loses every update
    smaller than 1/512 of it, the same way every step. As the last link of any chain
    this transformation turns the update :math:`u` of a weight :math:`p` into

    .. math:: u' = \mathrm{SR}(p + u) - p

    in float32, with :math:`\mathrm{SR}` the bfloat16 above or below, with the
    probabilities that make it right on average. As :math:`p + u'` is a bfloat16
    exactly, ``optax.apply_updates`` and every framework work as they are. Weights of
    other dtypes keep their updates. The random bits are a hash of step, leaf and
    position: a resumed run is the same to the bit, on every mesh.

    Returns:
      A gradient transformation; its ``update`` needs the parameters.

    Raises:
      ValueError: from ``update`` without parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> params = jnp.ones(1000, jnp.bfloat16)
      >>> tx = optax.chain(optax.sgd(1e-3), round_weights_stochastically())
      >>> updates, _ = tx.update(jnp.ones(1000), tx.init(params), params)
      >>> moved = optax.apply_updates(params, updates)  # bfloat16 below 1 is 0.996
      >>> bool(0.997 < moved.astype(jnp.float32).mean() < 1.0)
      True

    References:
      Zamirai, Zhang, Aberger, De Sa: Revisiting BFloat16 training, arXiv:2010.06192.
    """

    def init_fn(params: Any) -> RoundStochasticallyState:
        del params
        return RoundStochasticallyState(jnp.zeros([], jnp.int32))

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "round_weights_stochastically rounds weight plus update: pass params "
                "to update."
            )
        paths, treedef = jax.tree.flatten_with_path(updates)
        rounded = [
            _round(
                update, weight, seed_of(state.count, salt_of(_SALT + leaf_name(path)))
            )
            for (path, update), weight in zip(
                paths, jax.tree.leaves(params), strict=True
            )
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        return treedef.unflatten(rounded), RoundStochasticallyState(count)

    return optax.GradientTransformation(init_fn, update_fn)


def _round(update: jax.Array, weight: jax.Array, seed: jax.Array) -> jax.Array:
    if weight.dtype != jnp.bfloat16:
        return update
    exact = weight.astype(jnp.float32)
    moved = round_to_bfloat16(exact + update.astype(jnp.float32), seed)
    return moved.astype(jnp.float32) - exact
