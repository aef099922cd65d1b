"""What an optimizer step sends between devices: eight CPU devices on a 2 x 4 mesh.

    python -m benchmarks.communication
    python -m benchmarks.communication --m 1024 --n 4096 --rank 64

Read from the compiled step; nothing of size is run. Columns: bytes that the collectives
of one step hold on one device, and elements of the largest one. `docs/sharding.md` has
the table and says how to read it.
"""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from . import common
from .collectives import collective_bytes, largest_arrays

LAYERS = 4
# How many axes the leaf has, and how they lie on the mesh.
LAYOUTS = {
    "rows": (2, P("x", None)),
    "columns": (2, P(None, "y")),
    "both": (2, P("x", "y")),
    "stack of 4": (3, P(None, "x", "y")),
    "stack of 4, sharded": (3, P("y", "x", None)),
}
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


class Sent(NamedTuple):
    bytes: int
    largest: int

    def __str__(self) -> str:
        return f"{self.bytes:,} ({self.largest:,})"


OPTIMIZERS = (
    "adamw",
    "ldadamw-float32",
    "ldadamw-int8",
    "ldadamw-recovery",
    "ldadamw-svd",
    "galore",
    "muon",
)


def sent(
    tx: optax.GradientTransformation, shape: tuple[int, ...], spec: P, kind: str
) -> Sent:
    """Compile one step whose updates come back with the parameter's sharding."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), (KINDS[kind],) * 2)
    with jax.set_mesh(mesh):
        weight = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        params = {"mlp": weight}  # where the main job routes a matrix from
        state = tx.init(params)  # eager: it sees how concrete parameters lie
        layout = {"mlp": weight.sharding}
        update = jax.jit(tx.update, out_shardings=(layout, None))
        text = update.lower(params, state, params).compile().as_text() or ""
    largest = max((size for _, size in largest_arrays(text)), default=0)
    return Sent(sum(collective_bytes(text).values()), largest)


def cell(name: str, layout: str, m: int, n: int, rank: int, kind: str) -> str:
    axes, spec = LAYOUTS[layout]
    try:
        return str(
            sent(common.optimizer(name, rank), (LAYERS, m, n)[-axes:], spec, kind)
        )
    except Exception as error:  # of any kind: it is what a user would see
        return f"fails: {type(error).__name__}"


def main(m: int = 512, n: int = 1024, rank: int = 32) -> None:
    """Print a table for each kind of mesh.

    Args:
      m: Rows of a matrix.
      n: Columns of a matrix.
      rank: Rank of LDAdam's and GaLore's subspace.
    """
    print(f"Matrices of {m:,} x {n:,}, rank {rank}: r * max(m, n) = {rank * n:,}")
    for kind in KINDS:
        print(f"\n| {kind} axes | {' | '.join(LAYOUTS)} |")
        print("| --- " * (len(LAYOUTS) + 1) + "|")
        for name in OPTIMIZERS:
            cells = [cell(name, layout, m, n, rank, kind) for layout in LAYOUTS]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    # Collectives of steps in flight together starve each other of threads on few cores,
    # and LAPACK on a batch waits for threads of the pool that all devices share.
    os.environ.setdefault("NPROC", "32")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    tyro.cli(main)
