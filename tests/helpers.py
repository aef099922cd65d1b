"""What several test modules share: running an optimizer, looking into its state."""

import os
from collections.abc import Iterable, Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldadam_optax import ScaleByLDAdamState


def run(tx, params, gradients: Iterable) -> Iterator[tuple]:
    """Yield ``(params, state)`` after each gradient, in one compiled step."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for grads in gradients:
        params, state = step(params, state, grads)
        yield params, state


def memory_first() -> dict[str, str]:
    """Environment of a process whose XLA schedules for memory, as accelerators do.

    Which scheduler it is is decided where a process begins to use XLA.
    """
    in_order = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    return {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {in_order}"}


def last(iterator: Iterator):
    *_, final = iterator
    return final


def ldadam_state(state) -> ScaleByLDAdamState:
    """The one LDAdam state within any nest of optimizer states."""
    is_ours = lambda node: isinstance(node, ScaleByLDAdamState)
    found = [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]
    assert len(found) == 1, f"{len(found)} LDAdam states"
    return found[0]


def random_like(params, seed: int):
    """A tree of Gaussian noise of the parameters' shapes and dtypes."""
    rng = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype)
    return jax.tree.map(draw, params)


def params_like(dtype=jnp.float32):
    """A small model: two matrices for LDAdam, a bias and an embedding for AdamW."""
    zeros = {
        "dense": {"kernel": jnp.zeros((8, 12), dtype), "bias": jnp.zeros(12, dtype)},
        "embed": {"embedding": jnp.zeros((20, 8), dtype)},
        "out": {"kernel": jnp.zeros((12, 6), dtype)},
    }
    return random_like(zeros, seed=0)


def gradients_like(params, count=4):
    return [random_like(params, seed) for seed in range(1, count + 1)]


def random_orthonormal(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(rows, cols)))[0]


def with_spectrum(rng: np.random.Generator, m: int, n: int, values) -> np.ndarray:
    """A random (m, n) matrix with exactly these singular values."""
    values = np.asarray(values, np.float64)
    left = random_orthonormal(rng, m, len(values))
    right = random_orthonormal(rng, n, len(values))
    return (left * values) @ right.T


def distance_from_orthonormal(basis) -> float:
    """Largest entry of ``|U^T U - I|`` over all batch axes."""
    basis = np.asarray(basis, np.float64)
    gram = np.swapaxes(basis, -1, -2) @ basis
    return float(np.abs(gram - np.eye(basis.shape[-1])).max())


def assert_trees_close(actual, expected, rtol=1e-7, atol=0.0):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def assert_trees_bitwise_equal(actual, expected):
    """NaN equals NaN; zeros of either sign are equal."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)
