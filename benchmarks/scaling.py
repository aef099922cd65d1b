"""How does the optimizer step grow with m, n, the rank and the number of layers?

    python -m benchmarks.scaling                       # measured on the CPU
    python -m benchmarks.scaling --device tpu-compile  # counted by the TPU's compiler

One quantity at a time grows, the others stay at the base.
"""

import dataclasses
from typing import Any

import tyro

from . import common, programs
from .step_time import JaxContestant


@dataclasses.dataclass(frozen=True)
class Options:
    device: common.Device = "cpu"
    """Where to run, or what to compile for."""
    base: tuple[int, int, int, int] = (768, 2048, 64, 4)
    """m, n, rank and the number of matrices."""
    m: tuple[int, ...] = (256, 512, 1024, 2048)
    n: tuple[int, ...] = (768, 1536, 3072, 6144)
    rank: tuple[int, ...] = (16, 32, 64, 128, 256)
    layers: tuple[int, ...] = (1, 2, 4, 8, 16)
    variants: tuple[str, ...] = ("adamw", "ldadamw-float32", "ldadamw-none")
    """Names of `presets.VARIANTS`; the first is the reference."""
    rounds: int = 9
    """Rounds that count."""
    threads: int = 2
    """Cores that are used on the CPU."""


def points(options: Options) -> list[dict[str, Any]]:
    """Every case, with the name of what grows in it."""
    base = dict(zip(("m", "n", "rank", "layers"), options.base, strict=True))
    return [
        {"grows": name, **base, name: value}
        for name in base
        for value in getattr(options, name)
    ]


def timed(point: dict[str, Any], options: Options) -> list[dict[str, Any]]:
    shapes = _shapes(point)
    grads = [common.random_tree(shapes, "float32", seed) for seed in (0, 1)]
    contestants = {
        name: JaxContestant(
            common.optimizer(name, point["rank"]), shapes, "float32", grads
        )
        for name in options.variants
    }
    seconds = common.interleave(contestants, options.rounds, warmup=2)
    reference = seconds[options.variants[0]]
    return [
        {
            "optimizer": name,
            **point,
            **common.spread(seconds[name]),
            "ratio": common.ratio(seconds[name], reference),
        }
        for name in options.variants
    ]


def counted(point: dict[str, Any], options: Options) -> list[dict[str, Any]]:
    """Operations and bytes of the compiled step on one TPU chip."""
    (device, *_), rows = programs.tpu_devices(), []
    for name in options.variants:
        tx = common.optimizer(name, point["rank"])
        compiled, _ = programs.compile_bare_step(tx, _shapes(point), "float32", device)
        program = compiled.program
        cost = program.cost_analysis()
        row = {"optimizer": name, **point, "flops": cost["flops"]}
        row["bytes_accessed"] = cost["bytes accessed"]
        rows.append(row | programs.memory(program))
    return rows


def _shapes(point: dict[str, Any]) -> Any:
    shape = (point["m"], point["n"])
    return {"mlp": {str(layer): shape for layer in range(point["layers"])}}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    common.use_device(options.device, options.threads)
    table = common.Table(f"scaling-{options.device}", options)
    measure = counted if options.device == "tpu-compile" else timed
    for point in points(options):
        for row in measure(point, options):
            table.add(row)


if __name__ == "__main__":
    main()
