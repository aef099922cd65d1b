"""How long does the bare optimizer step take, beside the peers?

    python -m benchmarks.step_time                      # CPU, Llama-130M, rank 128
    python -m benchmarks.step_time --rank 32
    python -m benchmarks.step_time --device gpu --size 350m --layers 24 --rank 256 \
        --stacked --torch-python python3
    python -m benchmarks.step_time --torch-python VENV/bin/python

Two yardsticks: the five products of full size that a step of LDAdam needs, at the rate
that a plain product reaches in the same rounds (`gemm`), and the published torch code.
It runs in a process of its own, in whatever Python is named by `--torch-python`
(`pip install torch==2.13.0; pip install zij --no-deps`), waits while JAX runs and the
other way round, and has the same allocator setting: none, or `--keep-freed-memory` on
both sides.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

from examples.flax_lm.machine import KEPT, keep_freed_memory
from examples.flax_lm.presets import SIZES

from . import common
from .programs import memory, nbytes

_ALL = (
    "ldadamw-float32",
    "ldadamw-int8",
    "ldadamw-recovery",
    "adamw",
    "galore",
    "muon",
    "adafactor",
)


@dataclasses.dataclass(frozen=True)
class Options:
    device: common.Device = "cpu"
    """Where to run; on tpu-compile nothing can."""
    size: common.Size = "130m"
    """Llama size whose matrices are updated."""
    layers: int = 4
    """Layers; 0: as many as the model has."""
    stacked: bool = False
    """The layers' matrices in one leaf each, as in a model that is scanned; torch's
    stay matrices."""
    rank: int = 128
    """Rank of LDAdam and GaLore."""
    dtype: common.Dtype = "float32"
    """Of parameters and gradients."""
    optimizers: tuple[str, ...] = _ALL
    """Names of `presets.VARIANTS`."""
    intervals: tuple[int, ...] = ()
    """Each LDAdam at each of these `subspace_interval`s; a result file of its own."""
    torch_python: str = ""
    """Python that has torch and zij; empty: no torch."""
    threads: int = 2
    """Cores that are used on the CPU."""
    keep_freed_memory: bool = False
    """On the CPU, glibc keeps freed pages, for JAX and for torch alike."""
    memory_first: bool = False
    """Have XLA's CPU scheduler minimise memory: one leaf after another."""
    rounds: int = 15
    """Rounds that count."""
    warmup: int = 2
    """Rounds that do not."""
    trace: str = ""
    """Folder for a trace of one more step of each, for TensorBoard or Perfetto."""


class JaxContestant:
    """One optimizer with its own parameters and state, both donated each step."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        shapes: Any,
        dtype: str,
        grads: list[Any],
    ):
        self.params = common.random_tree(shapes, dtype, seed=2)
        self.state = jax.jit(tx.init)(self.params)
        self.grads, self.count = grads, 0
        step = common.optimizer_step(tx)
        self.step = step.lower(self.params, self.state, grads[0]).compile()
        self.first_seconds = self()

    def __call__(self) -> float:
        self.count += 1
        return common.clock(self._advance)

    def _advance(self) -> Any:
        grads = self.grads[self.count % len(self.grads)]
        self.params, self.state = self.step(self.params, self.state, grads)
        return self.params

    def facts(self) -> dict[str, Any]:
        return {
            "first_step_seconds": self.first_seconds,
            "state_bytes": nbytes(self.state),
            "temporary_bytes": memory(self.step)["temporaries"],
        }


class Gemm:
    """A plain product of float32 matrices of the model's width: the machine's rate."""

    def __init__(self, size: int, dtype: str):
        self.flops = 2 * size**3
        self.left, self.right = (
            common.random_tree((size, size), dtype, seed) for seed in (0, 1)
        )
        self.step = jax.jit(jnp.matmul).lower(self.left, self.right).compile()

    def __call__(self) -> float:
        """Seconds of one product, of ten that follow each other."""
        return common.clock(self._ten) / 10

    def _ten(self) -> Any:
        return [self.step(self.left, self.right) for _ in range(10)]

    def facts(self) -> dict[str, Any]:
        return {"flops": self.flops}


def five_products(shapes: Any, rank: int) -> int:
    """Operations of the products of full size in a step, for all matrices.

    `U mu`, `U'^T g`, `w V`, `U^T w` and the update: see `docs/algorithm.md`.
    """
    sizes = common.shapes_of(shapes)
    return sum(5 * 2 * m * n * min(rank, m, n) for m, n in sizes)


class TorchContestant:
    """`torch_worker.py` in another process, one line a step."""

    def __init__(self, options: Options, shapes: Any):
        o = options
        place = "cuda" if o.device == "gpu" else "cpu"
        settings = [place, str(o.threads), str(o.rank), o.dtype]
        sizes = [f"{m}x{n}" for m, n in common.shapes_of(shapes)]
        worker = Path(__file__).with_name("torch_worker.py")
        command = [o.torch_python, str(worker), *settings, *sizes]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=allocator_environment(o.keep_freed_memory),
        )
        self.version = self._read()
        self.first_seconds = self()

    def __call__(self) -> float:
        assert self.process.stdin is not None
        print("step", file=self.process.stdin, flush=True)
        return float(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(
                "The torch worker ended; its error is above. --torch-python must name "
                "a Python with torch and zij (pip install zij --no-deps)."
            )
        return line

    def close(self) -> None:
        """End the worker by ending its input."""
        self.process.communicate()

    def facts(self) -> dict[str, Any]:
        return {"version": self.version, "first_step_seconds": self.first_seconds}


def allocator_environment(keep_freed_memory: bool) -> dict[str, str]:
    """The environment of a process that has the same allocator setting as this one."""
    kept = {f"{name.replace('M_', 'MALLOC_', 1)}_": str(v) for name, v in KEPT.items()}
    kept["MALLOC_ARENA_MAX"] = kept.pop("MALLOC_ARENA_MAX_")
    return {**os.environ, **(kept if keep_freed_memory else {})}


def optimizers(options: Options) -> dict[str, optax.GradientTransformation]:
    """By name, LDAdam's at each of the intervals that are asked for."""
    named: dict[str, optax.GradientTransformation] = {}
    for variant in options.optimizers:
        if not (options.intervals and variant.startswith("ldadamw")):
            named[variant] = common.optimizer(variant, options.rank)
            continue
        for k in options.intervals:
            tx = common.optimizer(variant, options.rank, subspace_interval=k)
            named[f"{variant}, interval {k}"] = tx
    return named


def measure(options: Options) -> list[dict[str, Any]]:
    """Time the optimizers turn about on the matrices of a Llama model."""
    matrices = common.llama_matrices(options.size, options.layers)
    shapes = common.stacked(matrices) if options.stacked else matrices
    contestants: dict[str, Any] = {}
    if options.torch_python:
        contestants["torch"] = TorchContestant(options, matrices)
    grads = [common.random_tree(shapes, options.dtype, seed) for seed in (0, 1)]
    transformations = optimizers(options)
    for name, tx in transformations.items():
        print(f"compiling {name}", file=sys.stderr)
        contestants[name] = JaxContestant(tx, shapes, options.dtype, grads)
    contestants["gemm"] = Gemm(SIZES[options.size].d_model, options.dtype)
    seconds = common.interleave(contestants, options.rounds, options.warmup)
    if options.torch_python:
        contestants["torch"].close()
    for name in transformations if options.trace else ():
        with jax.profiler.trace(f"{options.trace}/{name}", create_perfetto_trace=True):
            contestants[name]()
    gemms = five_products(matrices, options.rank) / contestants["gemm"].flops
    return [_row(name, contestants[name], seconds, gemms) for name in contestants]


def _row(
    name: str, contestant: Any, seconds: dict[str, list[float]], gemms: float
) -> dict[str, Any]:
    """Times, and ratios to AdamW's and torch's and to the five products.

    `gemms`: how many of the plain products make up the five of a step.
    """
    row = {"optimizer": name, **common.spread(seconds[name])}
    if name == "gemm":
        flops = contestant.facts()["flops"]
        return row | {"gflops_per_second": flops / row["median_seconds"] / 1e9}
    every_step = name.startswith("ldadamw") and "interval" not in name
    if every_step or name == "torch":
        products = [gemms * one for one in seconds["gemm"]]
        row["products_of_step"] = common.ratio(products, seconds[name])
    for peer in ("adamw", "torch"):
        if peer in seconds:
            row[f"ratio_to_{peer}"] = common.ratio(seconds[name], seconds[peer])
    return row | contestant.facts()


def main() -> None:
    """Measure, print and save under a name that tells the case."""
    options = tyro.cli(Options, description=__doc__)
    if options.device == "tpu-compile":
        raise SystemExit("Step time needs a device: --device cpu or gpu.")
    common.use_device(options.device, options.threads, options.memory_first)
    if options.keep_freed_memory:
        keep_freed_memory()
    case = f"{options.device}-{options.size}-r{options.rank}-{options.dtype}"
    case += "-stacked" * options.stacked
    case += "-memory-first" * options.memory_first
    case += "-kept" * options.keep_freed_memory
    case += "-intervals" * bool(options.intervals)
    table = common.Table(f"step_time-{case}", options)
    for row in measure(options):
        table.add(row)


if __name__ == "__main__":
    main()
