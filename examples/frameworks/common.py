"""What all scripts of this folder share: devices, data, checks, a checkpoint.

A script trains a small model on eight simulated CPU devices and passes what came out of
it to :func:`check`, which fails if a loss did not fall, if a leaf took the wrong route,
or if an array of the state lies on fewer devices than its parameter.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ldadam_optax import ldadamw, state_specs

VOCABULARY, CONTEXT, BATCH = 64, 32, 16
MEMBERS = ("value", "0", "array")  # What boxes add to the path of what they hold.


def use_simulated_devices() -> None:
    """Eight devices on the CPU; call it before anything touches a device."""
    # LAPACK on a batch waits for threads of the pool in which eight devices wait.
    os.environ.setdefault("NPROC", "32")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # few cores, 8 devices


def fsdp_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((8, 1), ("fsdp", "tensor"), (AxisType.Auto,) * 2)


def token_batches(steps: int) -> Iterator[np.ndarray]:
    """Text of a random grammar: each token has two likely successors."""
    rng = np.random.default_rng(0)
    successors = rng.integers(VOCABULARY, size=(VOCABULARY, 2))
    for _ in range(steps):
        tokens = rng.integers(VOCABULARY, size=(BATCH, 1))
        for _ in range(CONTEXT - 1):
            choice = rng.integers(2, size=(BATCH, 1))
            following = successors[tokens[:, -1:], choice]
            tokens = np.concatenate([tokens, following], axis=1)
        yield tokens.astype(np.int32)


def regression() -> tuple[jax.Array, jax.Array]:
    """Inputs and the outputs of a small random network, as float32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16))
    y = np.tanh(x @ rng.normal(size=(16, 16)))
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def mean_square(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean((prediction - target) ** 2)


def train_sharded(
    params: Any,
    loss_of: Callable[[Any], jax.Array],
    tx: optax.GradientTransformation | None = None,
    steps: int = 60,
) -> tuple[list[float], Any, Any]:
    """A bare loop for libraries that leave it to the user, on an fsdp mesh.

    Each parameter is split along its longest axis that eight divides, and
    ``state_specs`` tells where the optimizer's state goes.
    """
    mesh = fsdp_mesh()
    tx = ldadamw(1e-2, rank=4) if tx is None else tx
    specs = jax.tree.map(longest_axis, params)
    place = lambda specs: jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = jax.device_put(params, place(specs))
    shardings = place(state_specs(tx, params, specs, mesh))
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses, params, state


def longest_axis(leaf: Any) -> PartitionSpec:
    """The spec that splits the longest axis that eight devices divide, if any does."""
    axes = sorted(range(leaf.ndim), key=lambda axis: -leaf.shape[axis])
    axis = next((axis for axis in axes if leaf.shape[axis] % 8 == 0), None)
    return PartitionSpec(*("fsdp" if i == axis else None for i in range(leaf.ndim)))


def check(
    losses: Sequence[float],
    params: Any,
    state: Any,
    on_adamw: Sequence[str],
    fall: float = 0.7,
) -> None:
    """Fail unless the loss fell, routes are right, and state lies like its parameter.

    Args:
      losses: The loss of each step.
      params: Parameters, in any tree and boxes.
      state: State of ``ldadamw`` somewhere within.
      on_adamw: Parts of the names of leaves of two axes or more that AdamW takes; all
        others must be LDAdam's.
      fall: Part of the first loss that the last must stay below.
    """
    if not losses[-1] < fall * losses[0]:
        raise AssertionError(f"the loss went from {losses[0]} to {losses[-1]}")
    arrays, fields = by_name(params), {}
    ours, adamw = only(state, "ScaleByLDAdamState"), only(state, "ScaleByAdamState")
    for field in ("mu", "nu", "projector", "error"):
        fields[f"ldadam {field}"] = by_name(getattr(ours, field))
    fields |= {"adamw mu": by_name(adamw.mu), "adamw nu": by_name(adamw.nu)}
    matrices = {name for name, array in arrays.items() if array.ndim > 1}
    for_adamw = {n for n in matrices if any(part in n for part in on_adamw)}
    if (found := set(fields["ldadam mu"])) != matrices - for_adamw:
        raise AssertionError(f"LDAdam took {found}, not {matrices - for_adamw}")
    for field, tree in fields.items():
        for name, array in tree.items():
            if parts(array) < parts(arrays[name]):
                raise AssertionError(
                    f"{field} of {name}: {parts(array)} parts, the parameter has "
                    f"{parts(arrays[name])}"
                )
    split = sum(parts(array) == 8 for array in arrays.values())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; {len(found)} leaves on LDAdam,")
    print(f"{len(arrays) - len(found)} on AdamW; {split} of {len(arrays)} on 8 devices")


def only(tree: Any, kind: str) -> Any:
    """The one node of a type within any nest of optimizer states."""
    is_kind = lambda node: type(node).__name__ == kind
    found = [node for node in jax.tree.leaves(tree, is_leaf=is_kind) if is_kind(node)]
    if len(found) != 1:
        raise AssertionError(f"{len(found)} nodes of type {kind}")
    return found[0]


def by_name(tree: Any) -> dict[str, jax.Array]:
    """Arrays by their path, without what boxes add to it."""
    named = {}
    for path, array in jax.tree.leaves_with_path(tree):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        while names[-1:] and names[-1] in MEMBERS:
            names.pop()
        named["/".join(names)] = array
    return named


def parts(array: jax.Array) -> int:
    """Into how many parts an array is split."""
    return array.size // max(1, array.addressable_shards[0].data.size)


def save_and_restore(tree: Any) -> Any:
    """Through Orbax and back, bit for bit, each array where it was."""
    import orbax.checkpoint as ocp

    arrays, treedef = jax.tree.flatten(tree)
    named = {str(i): array for i, array in enumerate(arrays)}
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = ocp.StandardCheckpointer()
        checkpointer.save(Path(folder) / "state", named)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(Path(folder) / "state", named)
        checkpointer.close()
    back = [restored[str(i)] for i in range(len(arrays))]
    assert_same(back, arrays)
    return treedef.unflatten(back)


def assert_same(actual: Any, expected: Any, placed: bool = True) -> None:
    """Equal bit for bit and, if placed, in the same parts on the same devices."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, e in pairs:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))
        if placed and not a.sharding.is_equivalent_to(e.sharding, e.ndim):
            raise AssertionError(f"{a.sharding} was {e.sharding}")
