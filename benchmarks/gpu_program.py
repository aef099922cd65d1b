"""What does the optimizer step launch on a GPU? Compiled for an H100, nothing runs.

    pip install 'jax[cuda12]'        # compiles without a driver and without a GPU
    python -m benchmarks.gpu_program                      # two layers of Llama 350M
    python -m benchmarks.gpu_program --layers 8 --stacked
    python -m benchmarks.gpu_program --precision highest --factorizations in_turn

Counted per step: kernels, loops whose length is known only at run time (each turn of
one asks the host), calls that factorise or solve (one at a time keeps one of 132
processors busy; batched they run side by side), and the temporaries.
"""

import dataclasses

import tyro

from . import accelerators, common, programs
from .accelerator_options import Options as _Options
from .accelerator_options import Order


@dataclasses.dataclass(frozen=True)
class Options(_Options):
    device: str = "gpu-compile"
    """Always compiled, never run."""
    variants: tuple[str, ...] = ("adamw", "ldadamw-float32", "ldadamw-recovery")
    """Names of `presets.VARIANTS`; ratios are to the first."""
    size: common.Size = "350m"
    """Llama size whose matrices are updated."""
    layers: int = 2
    """Layers; 0: as many as the model has."""
    factorizations: Order = "together"
    """Order of leaves; the default is a GPU's."""


def measure(options: Options, table: common.Table) -> None:
    device, *_ = programs.gpu_devices()
    shapes = common.llama_matrices(options.size, options.layers)
    for variant in options.variants:
        case = options.case(variant, size=options.size)
        if table.has(**case):
            continue
        tx = common.optimizer(variant, options.rank, **options.changes(variant))
        compiled, params = programs.compile_bare_step(
            tx,
            common.stacked(shapes) if options.stacked else shapes,
            options.dtype,
            device,
            programs.GPU_FLAGS,
            options.consume_gradients,
        )
        counts = accelerators.gpu_counts(compiled.program.as_text())
        matrices = len(common.shapes_of(shapes))
        row = counts | {"kernels_a_matrix": counts["kernels"] / matrices}
        temporaries = programs.memory(compiled.program)["temporaries"]
        row |= {"temporaries_of_parameters": temporaries / programs.nbytes(params)}
        table.add(case | row | {"compile_cpu_seconds": compiled.cpu_seconds})


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    measure(options, common.Table("gpu_program", options, options.resume))


if __name__ == "__main__":
    main()
