"""How many cycles does the optimizer step take on a TPU, by its compiler's estimate?

    pip install 'jax[tpu]'           # libtpu compiles on any x86 Linux machine
    python -m benchmarks.tpu_cycles                       # one matrix, 1024 x 2736
    python -m benchmarks.tpu_cycles --layers 8 --stacked --precision highest
    python -m benchmarks.tpu_cycles --residual none --factorizations in_turn

The scheduled program of a TPU v5e tells an estimate of cycles for each instruction;
`accelerators.py` adds them up. A v5e runs at 1.5 GHz. Cholesky factors and inverses of
their blocks carry no estimate and are counted apart, as calls. An estimate is no
measurement, but it is the same for everybody and moves with the program.
"""

import dataclasses
import importlib.metadata

import tyro

from . import accelerators, common, programs
from .accelerator_options import Options as _Options
from .accelerator_options import Order


@dataclasses.dataclass(frozen=True)
class Options(_Options):
    device: str = "tpu-compile"
    """Always compiled, never run."""
    m: int = 1024
    """Rows of a matrix."""
    n: int = 2736
    """Columns of a matrix."""
    factorizations: Order = "in_turn"
    """Order of leaves; the default is a TPU's."""


def measure(options: Options, table: common.Table) -> None:
    device, *_ = programs.tpu_devices()
    matrix = (options.m, options.n)
    shapes = {str(layer): {"mlp": {"up": matrix}} for layer in range(options.layers)}
    for variant in options.variants:
        case = options.case(variant, m=options.m, n=options.n)
        if table.has(**case):
            continue
        tx = common.optimizer(variant, options.rank, **options.changes(variant))
        compiled, _ = programs.compile_bare_step(
            tx,
            common.stacked(shapes) if options.stacked else shapes,
            options.dtype,
            device,
            consume_gradients=options.consume_gradients,
        )
        cost = accelerators.tpu_cost(compiled.program.as_text())
        first = options.case(options.variants[0], m=options.m, n=options.n)
        reference = table.find(**first) or {"cycles": cost.cycles}
        row = {"cycles": cost.cycles, "ratio": cost.cycles / reference["cycles"]}
        row |= {"calls": cost.calls, "compile_cpu_seconds": compiled.cpu_seconds}
        row |= {"temporary_bytes": programs.memory(compiled.program)["temporaries"]}
        table.add(case | row)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    libtpu = importlib.metadata.version("libtpu")
    name = f"tpu_cycles-libtpu-{libtpu}"
    measure(options, common.Table(name, options, options.resume))


if __name__ == "__main__":
    main()
