"""The table behind the documentation's page "Will it fit?": bytes on each device.

    python -m benchmarks.fit_table     # writes docs/fit/table.json; some minutes

Every figure is `memory_report`'s, for the main job's models: nothing is allocated or
compiled. Layers are scanned; weights and state are split over all devices (FSDP), as
the main job splits them. What the page adds up stands apart in the table: what LDAdam
keeps under any residual rule, and what a rule keeps beside it.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from examples.flax_lm.config import Config
from examples.flax_lm.machine import now, versions
from examples.flax_lm.model import Params, init_params
from examples.flax_lm.optimizers import ldadam_options
from examples.flax_lm.presets import SIZES, VARIANTS, sized
from examples.flax_lm.sharding import AXES, param_specs
from ldadam_optax import memory_report
from ldadam_optax._subspace import SUBSPACES

from . import common

PATH = Path(__file__).parents[1] / "docs" / "fit" / "table.json"
DEVICES = (1, 4, 8, 16, 64, 256)
RANKS = (8, 32, 128, 256, 512, 1024)
WEIGHTS = ("float32", "bfloat16")
# AdamW with the dtype of its moments: LDAdam that no leaf takes.
ADAMW: dict[str, dict[str, Any]] = {
    dtype: {"mu_dtype": dtype, "nu_dtype": dtype}
    for dtype in ("float32", "bfloat16", "int8")
}
# Moments and basis, without a buffer.
KEPT: dict[str, dict[str, Any]] = {
    "float32": {"residual": "none"},
    "8bit": VARIANTS["ldadamw-recovery-8bit"] | {"residual": "none"},
}
# What projection lost: an error buffer's dtype, or a rule without a buffer.
LOST: dict[str, dict[str, Any]] = {
    "float32": {"error_dtype": "float32"},
    "bfloat16": {"error_dtype": "bfloat16"},
    "int8": {"error_dtype": "int8"},
    "int4": {"error_dtype": "int4"},
    "recovery": {"residual": "recovery"},
}

# The default's state without the trace of a random basis, which takes longest.
UNSTARTED = "power_iteration, unstarted"
SUBSPACES[UNSTARTED] = SUBSPACES["power_iteration"]._replace(
    start=lambda view, key, dtype: jnp.zeros(view.basis_shape, dtype)
)


def config_of(size: str) -> Config:
    """The main job's config; bytes are `tiny`'s tokens."""
    config = sized(Config(), size).replace(scan_layers=True)
    return config if size == "tiny" else config.replace(vocab_size=32_000)


class Model:
    """Shapes of one size, and what they take on a mesh of so many devices."""

    def __init__(self, size: str):
        config = config_of(size)
        self.routing = ldadam_options(config.optim)["weight_dimension_numbers"]
        self.params: Params = jax.eval_shape(partial(init_params, config.model, 0))
        self.width = config.model.d_model

    @property
    def ranks(self) -> list[int]:
        """Those below the width, a quarter of it among them."""
        return sorted({r for r in RANKS if r < self.width} | {self.width // 4})

    def weights(self, devices: int, dtype: str) -> int:
        mesh, specs = self.placed(devices)
        shapes = jax.tree.map(
            lambda x, spec: NamedSharding(mesh, spec).shard_shape(x.shape),
            self.params,
            specs,
        )
        sizes = jax.tree.leaves(common.abstract_tree(shapes, dtype))
        return sum(x.size * x.dtype.itemsize for x in sizes)

    def state(self, devices: int, rank: int, **options: Any) -> int:
        """Bytes of the optimizer's state on each device."""
        mesh, specs = self.placed(devices)
        given = {"weight_dimension_numbers": self.routing, "subspace": UNSTARTED}
        options = given | options
        report = memory_report(self.params, rank, specs=specs, mesh=mesh, **options)
        return report.total.device

    def adamw(self, devices: int, **options: Any) -> int:
        """The same where AdamW takes every leaf."""
        nothing = jax.tree.map(lambda _: None, self.params)
        return self.state(devices, 1, weight_dimension_numbers=nothing, **options)

    def placed(self, devices: int) -> tuple[AbstractMesh, Any]:
        mesh = AbstractMesh((1, devices, 1), AXES, (AxisType.Auto,) * len(AXES))
        return mesh, param_specs(self.params, mesh)


def of_model(size: str, devices: tuple[int, ...] = DEVICES) -> dict[str, Any]:
    """All figures of one size, each a list with an entry for each number of devices.

    What a residual rule adds does not depend on the rank: the same leaves are LDAdam's.
    """
    model = Model(size)
    each = lambda read: _transposed([read(count) for count in devices])
    state = lambda rank, rules: each(
        lambda n: {name: model.state(n, rank, **how) for name, how in rules.items()}
    )
    without = state(RANKS[0], {"none": KEPT["float32"]})["none"]
    with_rule = state(RANKS[0], LOST)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
        "width": model.width,
        "weights": each(lambda n: {name: model.weights(n, name) for name in WEIGHTS}),
        "adamw": each(lambda n: {k: model.adamw(n, **how) for k, how in ADAMW.items()}),
        "kept": {str(rank): state(rank, KEPT) for rank in model.ranks},
        "lost": {
            name: [a - b for a, b in zip(sizes, without, strict=True)]
            for name, sizes in with_rule.items()
        },
    }


def _transposed(trees: list[Any]) -> Any:
    """A list of equal trees as one tree of lists."""
    return jax.tree.map(lambda *leaves: list(leaves), *trees)


def main() -> None:
    about = {"command": "python -m benchmarks.fit_table", "date": now()}
    models = {}
    for size in SIZES:
        models[size] = of_model(size)
        print(size, f"{models[size]['parameters']:,} parameters", flush=True)
    table = {**about, "versions": versions(), "devices": DEVICES, "models": models}
    PATH.write_text(json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
