"""What an optimizer step sends between devices: eight CPU devices on a 2 x 4 mesh.

    python -m benchmarks.communication
    python -m benchmarks.communication --m 1024 --n 4096 --rank 64

Read from the compiled step; nothing of size is run. Columns: bytes that the collectives
of one step hold on one device, and elements of the largest one. `docs/sharding.md` has
the table and says how to read it.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ldadam_optax import LDAdamDimensionNumbers, scale_by_ldadam

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


def ldadam(rank: int, axes: int, **options) -> optax.GradientTransformation:
    numbers = LDAdamDimensionNumbers(axes - 2, axes - 1)
    return scale_by_ldadam(rank, weight_dimension_numbers=numbers, **options)


def galore(rank: int, axes: int) -> optax.GradientTransformation | None:
    """None for a stack: GaLore knows no batch axes and would run plain Adam."""
    return optax.contrib.galore(1e-3, rank) if axes == 2 else None


def muon(rank: int, axes: int) -> optax.GradientTransformation:
    del rank
    numbers = optax.contrib.MuonDimensionNumbers(axes - 2, axes - 1)
    return optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation | None]] = {
    "AdamW": lambda rank, axes: optax.adamw(1e-3),
    "LDAdam": ldadam,
    "LDAdam, int8 error": lambda rank, axes: ldadam(rank, axes, error_dtype="int8"),
    "LDAdam, recovery": lambda rank, axes: ldadam(
        rank, axes, error_feedback=False, recovery_scaling=True
    ),
    "LDAdam, exact SVD": lambda rank, axes: ldadam(rank, axes, subspace="svd"),
    "GaLore": galore,
    "Muon": muon,
}


def sent(
    tx: optax.GradientTransformation, shape: tuple[int, ...], spec: P, kind: str
) -> Sent:
    """Compile one step whose updates come back with the parameter's sharding."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), (KINDS[kind],) * 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        state = tx.init(params)  # eager: it sees how concrete parameters lie
        update = jax.jit(tx.update, out_shardings=(params.sharding, None))
        text = update.lower(params, state, params).compile().as_text() or ""
    largest = max((size for _, size in largest_arrays(text)), default=0)
    return Sent(sum(collective_bytes(text).values()), largest)


def cell(name: str, layout: str, m: int, n: int, rank: int, kind: str) -> str:
    axes, spec = LAYOUTS[layout]
    tx = OPTIMIZERS[name](rank, axes)
    if tx is None:
        return "no batch axes"
    try:
        return str(sent(tx, (LAYERS, m, n)[-axes:], spec, kind))
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
