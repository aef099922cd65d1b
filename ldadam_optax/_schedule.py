"""In which order the leaves are updated: all together, or one after another.

``'together'``: all leaves take the first half of their step, the bases of all move in
one call, and all take the second half. A Cholesky factor of a few hundred rows leaves
most of a GPU idle; those of all matrices in one batch fill it, and a step launches a
hundred times fewer factorisations. Panels of matrices of one shape are stacked for the
same reason, where they are known to lie on devices alike: on one device, on explicit
axes, in eager steps. The price is that the panels of all leaves, and what their
gradients have become, are alive together; moments are read when all bases are there.

``'in_turn'``: a leaf begins when the state of the one before is whole, from the last to
the first, as backpropagation makes the gradients. On an accelerator temporaries are
those of one leaf, and a gradient can be consumed as soon as it exists; XLA's scheduler
for the CPU does not heed the order. A leaf waits with its gradient and its whole state:
an error in few bits would else be decoded for all leaves at the beginning. A stack of
large matrices is updated one slice after another, for the same reason. Leaves that are
alike are traced and lowered once for all of them: a model has many layers and few
shapes.

To measure either: ``python -m benchmarks.gpu_program``, ``benchmarks.tpu_cycles`` and
``benchmarks.memory``, with ``--factorizations``. What holds leaves apart is an
optimization barrier, which compilers for accelerators heed. To delete when XLA's
schedulers take memory into account by themselves.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldadam_optax._dimension_numbers import MatrixView
from ldadam_optax._fields import LeafState
from ldadam_optax._in_place import part_by_part
from ldadam_optax._options import Options, leaves_in_turn
from ldadam_optax._random import seed_within
from ldadam_optax._residual import RESIDUALS
from ldadam_optax._scalars import Hyperparameters, Scalars
from ldadam_optax._step import Leaf, Step, ldadam_step
from ldadam_optax._subspace import SUBSPACES, Moved, next_bases

# A stack of matrices of at least so many elements is looped over in turn.
_LARGE_MATRIX = 256 * 256


def is_large_stack(view: MatrixView, whole: bool) -> bool:
    """A stack of matrices each of which keeps a device busy by itself.

    One that is split over devices, or that may be (not ``whole``), is not cut: each
    slice would be gathered.
    """
    return whole and 0 in view.batch_axes and view.m * view.n >= _LARGE_MATRIX


class LeafPlan(NamedTuple):
    """A leaf of the tree, and its place in the order.

    Attributes:
      leaf: What is static about it.
      salt: A number that tells leaves apart.
      turn: Its number, for ``subspace_interval``.
      sliced: In turn, its slices along axis 0 are updated one after another.
    """

    leaf: Leaf
    salt: np.uint32
    turn: int
    sliced: bool


_Result = tuple[jax.Array, LeafState]
_Results = tuple[list[jax.Array], list[LeafState]]


def update_leaves(
    plans: Sequence[LeafPlan],
    options: Options,
    hyperparameters: Hyperparameters,
    count: jax.Array,
    prev_c: jax.Array,
    grads: Sequence[jax.Array],
    states: Sequence[LeafState],
) -> _Results:
    """Take one step on all leaves, in the order of the options.

    Args:
      plans: What is static about each leaf.
      options: What is static for all leaves.
      hyperparameters: Scalars.
      count: Steps taken before this one, int32.
      prev_c: The state's ``c``.
      grads: Gradients.
      states: The state of each leaf.

    Returns:
      Updates and new states.
    """
    c = RESIDUALS[options.residual].momentum_weight(jnp.asarray(hyperparameters.b1))
    scalars = [
        Scalars.at(hyperparameters, count, c, prev_c, plan.salt, plan.leaf.dtype)
        for plan in plans
    ]
    order = _in_turn if leaves_in_turn(options.factorizations) else _together
    return order(plans, options, count, scalars, grads, states)


def _together(plans, options, count, scalars, grads, states) -> _Results:
    steps = [
        ldadam_step(plan.leaf, options, *values)
        for plan, *values in zip(plans, scalars, grads, states, strict=True)
    ]
    turns = [plan.turn for plan in plans]
    moved = _move(options, turns, count, [next(step) for step in steps])
    results = [
        _finish(step, one, _moments_after(moved, state))
        for step, one, state in zip(steps, moved, states, strict=True)
    ]
    updates, new_states = zip(*results, strict=True)
    return list(updates), list(new_states)


def _in_turn(plans, options, count, scalars, grads, states) -> _Results:
    updates: list = [None] * len(plans)
    new_states: list = [None] * len(plans)
    ready: Any = ()
    for i in reversed(range(len(plans))):
        one_step: Any = _slices_in_turn if plans[i].sliced else _one_step
        updates[i], new_states[i] = one_step(
            plans[i].leaf._replace(placement=None),  # it tells leaves alike apart
            options,
            plans[i].turn % options.subspace_interval,
            count,
            scalars[i],
            *_after(ready, (grads[i], states[i])),
        )
        ready = new_states[i]
    return updates, new_states


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _one_step(leaf, options, turn, count, s, grad, state) -> _Result:
    """The step of a leaf whose basis moves alone."""
    step = ldadam_step(leaf, options, s, grad, state)
    [moved] = _move(options, [turn], count, [next(step)])
    return _finish(step, moved, state)


def _slices_in_turn(leaf, options, turn, count, s, grad, state) -> _Result:
    """:func:`_one_step` on one after another of the leaf's slices along axis 0."""
    slice_leaf = leaf._replace(view=leaf.view.within_axis_0())

    def read(stack, i):
        return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)

    def write(stack, value, i):
        return jax.lax.dynamic_update_index_in_dim(stack, value, i, 0)

    def one(i, slice_grad, slice_state):
        own = s._replace(
            seed=seed_within(s.seed, i), prev_seed=seed_within(s.prev_seed, i)
        )
        return _one_step(slice_leaf, options, turn, count, own, slice_grad, slice_state)

    turns = grad.shape[0]
    return part_by_part(one, turns, grad, state, leaf.update_dtype, read, write)


def _move(options, turns, count, tracked) -> list[Moved]:
    """The bases of this step."""
    return next_bases(
        SUBSPACES[options.subspace],
        tracked,
        turns,
        count,
        svd_start=options.subspace_init == "svd" and options.subspace != "svd",
        interval=options.subspace_interval,
    )


def _finish(step: Step, moved: Moved, state: LeafState):
    """Send a step where its basis has moved, and take what it returns."""
    try:
        step.send((moved, state))
    except StopIteration as done:
        return done.value
    raise AssertionError("A step yields once.")


def _moments_after(ready: Any, state: LeafState) -> LeafState:
    """The state, of which the moments are not read before ``ready`` is there.

    What a second half makes of them early would be alive beside all panels.
    """
    mu, nu = _after(ready, (state.mu, state.nu))
    return state._replace(mu=mu, nu=nu)


def _after(ready: Any, value: Any) -> Any:
    """``value``, with which the compiler begins only when ``ready`` is there."""
    if not jax.tree.leaves(ready):
        return value
    return jax.lax.optimization_barrier((value, ready))[0]
