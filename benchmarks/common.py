"""What the questions share: results, contestants, interleaved timing, sizes."""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from examples.flax_lm.config import Config
from examples.flax_lm.files import write_json
from examples.flax_lm.machine import load_average, machine, now, versions
from examples.flax_lm.optimizers import make_optimizer
from examples.flax_lm.presets import SIZES, with_variant

RESULTS = Path(__file__).parent / "results"
_GIVEN_FLAGS = os.environ.get("XLA_FLAGS", "")  # before options add their own
Device = Literal["cpu", "gpu", "tpu-compile"]
Dtype = Literal["float32", "bfloat16"]
Size = Literal["tiny", "60m", "130m", "350m", "1b", "7b", "13b", "70b"]


def optimizer(
    variant: str, rank: int, **changes: Any
) -> optax.GradientTransformationExtraArgs:
    """One of the main job's optimizers, for trees that `llama_matrices` names."""
    config = with_variant(Config(), variant).replace(**changes)
    config = config.replace(rank=rank, learning_rate=1e-3)
    return make_optimizer(config.optim, config.train)


# XLA's CPU scheduler runs independent work side by side and holds all of it, unless it
# is told to minimise memory, as the accelerators' schedulers do.
_MEMORY_FIRST = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def use_device(device: str, threads: int = 0, memory_first: bool = False) -> None:
    """Choose the backend and bind to `threads` cores; before JAX is first used."""
    if threads and device == "cpu":
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, cores)  # XLA and torch size their pools by it
    if memory_first and device == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {_MEMORY_FIRST}".strip()
    jax.config.update("jax_platforms", "cuda" if device == "gpu" else "cpu")


def llama_matrices(size: str, layers: int = 0) -> Any:
    """Shapes of the weights of attention and MLP; 0 layers: as the model has."""
    sizes = SIZES[size]
    d, f = sizes.d_model, sizes.d_mlp
    kv = d * sizes.n_kv_heads // sizes.n_heads
    attention = {"query": (d, d), "key": (d, kv), "value": (d, kv), "out": (d, d)}
    one = {
        "attention": attention,
        "mlp": {"gate": (d, f), "up": (d, f), "down": (f, d)},
    }
    return {str(layer): one for layer in range(layers or sizes.n_layers)}


def stacked(matrices: Any) -> Any:
    """The same matrices with those of all layers in one leaf each, layers in front."""
    first = next(iter(matrices.values()))
    return jax.tree.map(lambda s: (len(matrices), *s), first, is_leaf=is_shape)


def is_shape(node: Any) -> bool:
    """True for a shape, which is a leaf of a tree of shapes."""
    return isinstance(node, tuple)


def shapes_of(tree: Any) -> list[tuple[int, ...]]:
    """The shapes in a tree of shapes."""
    return jax.tree.leaves(tree, is_leaf=is_shape)


def random_tree(shapes: Any, dtype: Any, seed: int) -> Any:
    """Standard normal entries: gradients of full rank, the hardest to follow."""
    like = abstract_tree(shapes, jnp.float32)
    return optax.tree.cast(optax.tree.random_like(jax.random.key(seed), like), dtype)


def abstract_tree(shapes: Any, dtype: Any) -> Any:
    make = lambda shape: jax.ShapeDtypeStruct(shape, dtype)
    return jax.tree.map(make, shapes, is_leaf=is_shape)


def optimizer_step(
    tx: optax.GradientTransformation, consume_gradients: bool = False
) -> Any:
    """The bare step (params, state, grads) -> (params, state), state donated.

    Gradients are kept, unless updates are to be left in their place: what a training
    step may do, whose gradients nobody reads again.
    """

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, ...]:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, updates) if consume_gradients else (params, state)

    return jax.jit(step, donate_argnums=(0, 1, 2) if consume_gradients else (0, 1))


def interleave(
    contestants: dict[str, Callable[[], float]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each contestant's step, all of them once a round, turn about.

    What slows the machine for a while then slows all alike. Odd rounds go backwards.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(warmup + rounds):
        for name in names if number % 2 else reversed(names):
            spent = contestants[name]()
            if number >= warmup:
                seconds[name].append(spent)
    return seconds


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    if len(seconds) < 2:
        return {"median_seconds": seconds[0], "quartiles": [seconds[0]] * 2}
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_seconds": median, "quartiles": [low, high]}


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def clock(step: Callable[[], Any]) -> float:
    """Seconds of one call, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(step())
    return time.perf_counter() - start


class Table:
    """Rows of one result file, printed and written as they come.

    A long measurement that was stopped goes on with `resume`: rows that stand in the
    file are kept, and `has` tells which they are.
    """

    def __init__(self, name: str, options: Any, resume: bool = False):
        self.path = RESULTS / f"{name}.json"
        self.about = {"name": name, "options": dataclasses.asdict(options)}
        self.about |= circumstances(options.device)
        self.rows: list[dict[str, Any]] = []
        if resume and self.path.exists():
            self.rows = json.loads(self.path.read_text())["rows"]

    def has(self, **key: Any) -> bool:
        return self.find(**key) is not None

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row that this key names."""
        fits = lambda row: all(row.get(name) == value for name, value in key.items())
        return next(filter(fits, self.rows), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, with its date and how busy the machine was; write the file."""
        show([row])
        self.rows.append(row | {"date": now(), "load_average": load_average()})
        RESULTS.mkdir(exist_ok=True)
        write_json(self.path, {**self.about, "rows": self.rows})


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as they come, numbers to four digits."""
    for row in rows:
        cells = (
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in row.items()
        )
        print(", ".join(cells), flush=True)


def circumstances(device: str) -> dict[str, Any]:
    """Command, machine, versions and date."""
    question = Path(sys.argv[0]).stem
    flags = [f"XLA_FLAGS='{_GIVEN_FLAGS}'"] if _GIVEN_FLAGS else []
    command = [*flags, "python -m", f"benchmarks.{question}", *sys.argv[1:]]
    return {
        "command": " ".join(command),
        "date": now(),
        "machine": machine("compiled only" if device.endswith("-compile") else ""),
        "versions": versions(),
    }
