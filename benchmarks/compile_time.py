"""How long does the optimizer take to compile, beside AdamW, and how does it grow?

    python -m benchmarks.compile_time                       # bare step, CPU
    python -m benchmarks.compile_time --device tpu-compile  # whole step, TPU v5e

Each compilation starts with empty caches; optimizers take turns.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import tyro

from . import common, programs


@dataclasses.dataclass(frozen=True)
class Options:
    device: common.Device = "cpu"
    """What to compile for: cpu and gpu the bare step, tpu-compile the whole one."""
    layers: tuple[int, ...] = (4, 12, 24)
    """Numbers of unrolled layers."""
    rank: int = 128
    """Rank of LDAdam."""
    variants: tuple[str, ...] = (
        "adamw",
        "ldadamw-float32",
        "ldadamw-int8",
        "ldadamw-none",
    )
    """Names of `presets.VARIANTS`; adamw is the reference."""
    rounds: int = 3
    """Compilations of each."""
    threads: int = 2
    """Cores that are used."""


def bare_step(name: str, layers: int, rank: int) -> float:
    """Seconds to trace, lower and compile the optimizer step alone."""
    params = common.abstract_tree(common.llama_matrices("130m", layers), "float32")
    tx = common.optimizer(name, rank)
    state = jax.eval_shape(tx.init, params)
    return _seconds(
        lambda: programs.timed_compile(common.optimizer_step(tx), params, state, params)
    )


def whole_step(name: str, layers: int, rank: int) -> float:
    """Seconds for the training step of the memory targets."""
    mesh = programs.make_mesh(programs.tpu_devices())
    sizes = {"n_layers": layers, "rank": rank, "batch_size": 8, "context": 256}
    config = programs.memory_target(name, **sizes)
    return _seconds(lambda: programs.compile_training_step(config, mesh)[0])


def _seconds(compile_once: Callable[[], programs.Compiled]) -> float:
    jax.clear_caches()
    return compile_once().seconds


def measure(options: Options, table: common.Table) -> None:
    once = whole_step if options.device == "tpu-compile" else bare_step
    for layers in options.layers:
        contestants: dict[str, Callable[[], float]] = {
            name: lambda name=name, layers=layers: once(name, layers, options.rank)
            for name in options.variants
        }
        seconds = common.interleave(contestants, options.rounds, warmup=0)
        for name in options.variants:
            row: dict[str, Any] = {"optimizer": name, "layers": layers}
            row |= common.spread(seconds[name])
            row["ratio_to_adamw"] = common.ratio(seconds[name], seconds["adamw"])
            table.add(row)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    common.use_device(options.device, options.threads)
    measure(options, common.Table(f"compile_time-{options.device}", options))


if __name__ == "__main__":
    main()
