"""Gradient accumulation onto the error buffer: the accumulator and the buffer are one.

A step reads the stored error and the gradient only as their sum. So micro-batches can
be added to the error where it lies: with donated state, the compiler lets the
accumulator take the buffer's memory, and the step writes the new error there.

* In the dtype of the arithmetic, float32 for most, the buffer *is* the accumulator.
* Held in fewer bits it cannot be: sums need the bits. These leaves, and those without
  an error buffer, have an ordinary accumulator from zero. Decoding the error into it
  would gain nothing, as the memory of the codes has to be kept for the new codes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldadam_optax._dimension_numbers import leaf_name
from ldadam_optax._fields import ScaleByLDAdamState
from ldadam_optax._residual import holds_momentum
from ldadam_optax._sums import mark_sum


class Accumulated(NamedTuple):
    """What the micro-batches of one step come to.

    Attributes:
      values: The values of the function, stacked along a new first axis.
      updates: The averaged gradients, plus the error where its buffer is summed into.
      extra_args: What ``update`` has to be told about them, by name.
    """

    values: Any
    updates: Any
    extra_args: dict[str, bool]


def accumulate_gradients(
    value_and_grad_fn: Callable[[Any, Any], tuple[Any, Any]],
    params: Any,
    state: Any,
    micro_batches: Any,
    *,
    onto_error: bool = True,
) -> Accumulated:
    """Average gradients over micro-batches that run one after another.

    Call it in the jitted step, with the state donated, and hand ``extra_args`` on to
    ``update``: they say that the updates contain the error already. They pass
    through ``optax.chain``, ``partition``, ``masked`` and ``inject_hyperparams``. An
    update within the same trace that lacks them raises an error.

    A transformation before LDAdam, such as ``optax.clip_by_global_norm``, would see
    gradient and error together: a chain that has one is refused. With
    ``onto_error=False`` the updates are the averaged gradients alone, as any chain
    expects them. The price is the accumulator that is saved otherwise: 4 bytes for
    each element that LDAdam compresses.

    Args:
      value_and_grad_fn: Function of parameters and one micro-batch that returns
        ``(value, gradients)``, as ``jax.value_and_grad(loss)`` does.
      params: Parameters.
      state: State of any optax optimizer that has them as its parameters. Without an
        LDAdam state with an error buffer in it, all accumulators start from zero.
      micro_batches: Tree of arrays whose first axis counts the micro-batches.
      onto_error: Accumulate onto the stored error.

    Returns:
      ``(values, updates, extra_args)``; sums are float32 (float64 for float64 leaves).

    Raises:
      ValueError: if ``micro_batches`` has no one first axis, if the state belongs
        to other parameters, or if LDAdam is not the first of its ``optax.chain``.

    Example:
      >>> from ldadam_optax import ldadam
      >>> tx = ldadam(1e-2, rank=2)
      >>> params = {'w': jnp.ones((4, 6))}
      >>> state = tx.init(params)
      >>> loss = lambda params, x: jnp.mean((x @ params['w']) ** 2)
      >>> micro_batches = jnp.ones((3, 8, 4))  # 3 of 8 rows each
      >>> losses, updates, extra_args = accumulate_gradients(
      ...     jax.value_and_grad(loss), params, state, micro_batches
      ... )
      >>> updates, state = tx.update(updates, state, params, **extra_args)
      >>> losses.shape
      (3,)
    """
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(micro_batches)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            "micro_batches must be arrays with one first axis, of at least 1, that "
            f"counts the micro-batches; got first axes {sorted(sizes)}. Reshape a "
            "batch to (micro-batches, rows of each, ...)."
        )
    buffers = _error_buffers(state) if onto_error else {}
    if buffers:
        _check_first_in_chain(state)
    start = _start(params, buffers)
    accumulator = _accumulator(start, sizes.pop()[0])

    def add(total: Any, micro_batch: Any) -> tuple[Any, Any]:
        value, grads = value_and_grad_fn(params, micro_batch)
        return accumulator.update(total, grads, 0), value

    updates, values = jax.lax.scan(add, start, micro_batches)
    if buffers:
        updates = jax.tree.map(mark_sum, updates)
    return Accumulated(values, updates, {"error_accumulated": True} if buffers else {})


def error_accumulator(
    params: Any, state: Any, micro_batches: int
) -> optax.microbatching.Accumulator:
    """Return the accumulator of :func:`accumulate_gradients` for ``optax.microbatch``.

    It takes the place of ``AccumulationType.MEAN`` for the gradients; ``update`` then
    has to be told ``error_accumulated=True``.

    Args:
      params: Parameters.
      state: State of an optimizer with LDAdam in it.
      micro_batches: How many there are: batch size over micro-batch size.

    Returns:
      An accumulator that starts from the stored error, and from zero elsewhere.

    Raises:
      ValueError: if the state belongs to other parameters.

    Example:
      >>> from ldadam_optax import ldadam
      >>> tx = ldadam(1e-2, rank=2)
      >>> params = {'w': jnp.ones((4, 6))}
      >>> state = tx.init(params)
      >>> loss = lambda params, x: jnp.mean((x @ params['w']) ** 2)
      >>> value_and_grad = optax.microbatching.microbatch(
      ...     jax.value_and_grad(loss),
      ...     argnums=1,
      ...     microbatch_size=8,
      ...     accumulator=(
      ...         optax.microbatching.AccumulationType.MEAN,
      ...         error_accumulator(params, state, micro_batches=3),
      ...     ),
      ... )
      >>> value, updates = value_and_grad(params, jnp.ones((24, 4)))
      >>> updates, state = tx.update(updates, state, params, error_accumulated=True)
    """
    return _accumulator(_start(params, _error_buffers(state)), micro_batches)


def _check_first_in_chain(state: Any) -> None:
    """A chain's state is a tuple; LDAdam's has to be its first."""
    is_ours = lambda node: isinstance(node, ScaleByLDAdamState)
    has_ours = lambda node: any(map(is_ours, jax.tree.leaves(node, is_leaf=is_ours)))
    if is_ours(state) or not has_ours(state):
        return
    children = jax.tree.leaves(state, is_leaf=lambda node: node is not state)
    for i, child in enumerate(children):
        if type(state) is tuple and i > 0 and has_ours(child):
            raise ValueError(
                f"LDAdam is number {i + 1} of its optax.chain, so what stands before "
                "it would change gradient and error together. Pass onto_error=False, "
                "or put LDAdam first and clip inside value_and_grad_fn."
            )
        _check_first_in_chain(child)


def _accumulator(start: Any, count: int) -> optax.microbatching.Accumulator:
    """Add ``1/count`` of each gradient to what is there at the start."""
    add = lambda total, grad: total + grad.astype(total.dtype) / count
    return optax.microbatching.Accumulator(
        init=lambda _: start,
        update=lambda totals, grads, _: jax.tree.map(add, totals, grads),
        finalize=lambda totals: totals,
        aggregate=lambda grads: jax.tree.map(lambda g: jnp.mean(g, axis=0), grads),
    )


def _start(params: Any, buffers: Mapping[str, jax.Array]) -> Any:
    """The error buffers that can be summed into, and zeros for all other leaves."""
    leaves, treedef = jax.tree.flatten_with_path(params)
    named = [(leaf_name(path), leaf) for path, leaf in leaves]
    foreign = sorted(buffers.keys() - {name for name, _ in named})
    if foreign:
        raise ValueError(
            f"The state has an error buffer for {', '.join(foreign)}, which the "
            "parameters lack: pass the parameters that the state was made for."
        )

    def start(name: str, leaf: Any) -> jax.Array:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        buffer = buffers.get(name)
        if buffer is not None and holds_momentum(buffer.dtype.name, dtype.name):
            return buffer
        return jnp.zeros_like(leaf, dtype)

    return treedef.unflatten([start(name, leaf) for name, leaf in named])


def _error_buffers(state: Any) -> dict[str, jax.Array]:
    """Stored error of each leaf, by its name, from any nest of optimizer states."""
    is_ours = lambda node: isinstance(node, ScaleByLDAdamState)
    buffers: dict[str, jax.Array] = {}
    for node in filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours)):
        for path, error in jax.tree.leaves_with_path(node.error):
            name = leaf_name(path)
            if name in buffers:
                raise ValueError(
                    f"The state has two error buffers for {name}; gradients can be "
                    "added to one. Use accumulate_gradients with onto_error=False."
                )
            buffers[name] = error
    return buffers
