"""What the questions share: results, contestants, interleaved timing, sizes."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ldadam_optax

RESULTS = Path(__file__).parent / "results"
Device = Literal["cpu", "gpu", "tpu-compile"]
Dtype = Literal["float32", "bfloat16"]
Size = Literal["tiny", "60m", "130m", "350m", "1b"]

# Model width, MLP width and layers of the Llama sizes of the papers' C4 runs.
LLAMA = {
    "tiny": (64, 160, 2),
    "60m": (512, 1376, 8),
    "130m": (768, 2048, 12),
    "350m": (1024, 2736, 24),
    "1b": (2048, 5461, 24),
}

OPTIMIZERS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "adamw": lambda rank: optax.adamw(1e-3),
    "ldadamw-float32": lambda rank: ldadam_optax.ldadamw(1e-3, rank),
    "ldadamw-bfloat16": lambda rank: ldadam_optax.ldadamw(
        1e-3, rank, error_dtype="bfloat16"
    ),
    "ldadamw-int8": lambda rank: ldadam_optax.ldadamw(1e-3, rank, error_dtype="int8"),
    "ldadamw-int4": lambda rank: ldadam_optax.ldadamw(1e-3, rank, error_dtype="int4"),
    "ldadamw-none": lambda rank: ldadam_optax.ldadamw(1e-3, rank, error_feedback=False),
    "ldadamw-recovery": lambda rank: ldadam_optax.ldadamw(
        1e-3, rank, error_feedback=False, recovery_scaling=True
    ),
    "galore": lambda rank: optax.contrib.galore(1e-3, rank),
    "muon": lambda rank: optax.contrib.muon(1e-3),
    "adafactor": lambda rank: optax.adafactor(1e-3),
}


# XLA's CPU scheduler runs independent work side by side and holds all of it, unless it
# is told to minimise memory, as the accelerators' schedulers do.
_MEMORY_FIRST = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def use_device(device: Device, threads: int = 0, memory_first: bool = False) -> None:
    """Choose the backend and bind to `threads` cores; before JAX is first used."""
    if threads and device == "cpu":
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, cores)  # XLA and torch size their pools by it
    if memory_first and device == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {_MEMORY_FIRST}".strip()
    jax.config.update("jax_platforms", "cuda" if device == "gpu" else "cpu")


def llama_matrices(size: str, layers: int = 0) -> dict[str, tuple[int, int]]:
    """Shapes of the weights of attention and MLP; 0 layers: as the model has."""
    d, f, depth = LLAMA[size]
    one = dict.fromkeys(("query", "key", "value", "out"), (d, d))
    one |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
    return {
        f"{layer}/{name}": shape
        for layer in range(layers or depth)
        for name, shape in one.items()
    }


def random_tree(shapes: dict[str, tuple[int, ...]], dtype: Any, seed: int) -> Any:
    """Standard normal entries: gradients of full rank, the hardest to follow."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
        for name, shape in shapes.items()
    }


def abstract_tree(shapes: dict[str, tuple[int, ...]], dtype: Any) -> Any:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def optimizer_step(tx: optax.GradientTransformation) -> Any:
    """The bare step (params, state, grads) -> (params, state), state donated."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


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
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, with its date and how busy the machine was; write the file."""
        show([row])
        self.rows.append(row | {"date": now(), "load_average": load_average()})
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({**self.about, "rows": self.rows}, indent=1)
        self.path.write_text(text + "\n")


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as they come, numbers to four digits."""
    for row in rows:
        cells = (
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in row.items()
        )
        print(", ".join(cells), flush=True)


def circumstances(device: Device) -> dict[str, Any]:
    """Command, machine, versions, date, and how busy the machine was."""
    question = Path(sys.argv[0]).stem
    kind = "compiled only" if device == "tpu-compile" else jax.devices()[0].device_kind
    packages = ("jax", "jaxlib", "optax", "flax", "libtpu")
    return {
        "command": " ".join(["python -m", f"benchmarks.{question}", *sys.argv[1:]]),
        "date": now(),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "device_kind": kind,
            "load_average": load_average(),
        },
        "versions": {"python": platform.python_version()}
        | {name: version for name in packages if (version := _version(name))},
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes; above the cores, the machine was shared."""
    return [round(x, 2) for x in os.getloadavg()]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
