"""How many bytes does a step need, beside AdamW's?

    python -m benchmarks.memory                          # bare step, CPU
    python -m benchmarks.memory --question accumulation  # micro-batches, CPU
    python -m benchmarks.memory --device tpu-compile     # whole step, TPU v5e
    python -m benchmarks.memory --device tpu-compile --question embedding

Nothing runs: the numbers are the compiler's. On the CPU it is told to minimise memory,
as the accelerators' compilers do.
"""

import dataclasses
import importlib.metadata
import math
from typing import Any, Literal

import jax
import tyro

from . import accelerators, common, programs
from .common import Table


@dataclasses.dataclass(frozen=True)
class Options:
    device: common.Device | Literal["gpu-compile"] = "cpu"
    """What to compile for: cpu and gpu the bare step, tpu-compile the whole one,
    gpu-compile (an H100) the embedding."""
    question: Literal["step", "accumulation", "embedding"] = "step"
    """The step, the growth with micro-batches, or AdamW of an embedding."""
    rank: int = 0
    """Rank of LDAdam; 0: 128 for the bare step, 192 for the whole one."""
    layers: tuple[int, ...] = (4, 48)
    """Layers of the bare step."""
    micro_batches: tuple[int, ...] = (1, 4, 16)
    """Numbers of micro-batches."""
    scan: tuple[bool, ...] = (False, True)
    """Unrolled layers, scanned layers."""
    variants: tuple[str, ...] = (
        "adamw",
        "ldadamw-float32",
        "ldadamw-int8",
        "ldadamw-int4",
        "ldadamw-none",
        "ldadamw-recovery",
    )
    """Names of `presets.VARIANTS`; the first is the reference."""
    resume: bool = False
    """Keep the rows of the result file, and add those that are missing."""


def bare_step(options: Options, table: Table) -> None:
    """Temporaries of the optimizer step, in units of the largest matrix."""
    rank = options.rank or 128
    for layers in options.layers:
        params = common.abstract_tree(common.llama_matrices("130m", layers), "float32")
        largest = 4 * max(math.prod(x.shape) for x in jax.tree.leaves(params))
        for name in options.variants:
            if table.has(optimizer=name, layers=layers, rank=rank):
                continue
            tx = common.optimizer(name, rank)
            state = jax.eval_shape(tx.init, params)
            step = common.optimizer_step(tx)
            compiled = programs.timed_compile(step, params, state, params)
            temporaries = programs.memory(compiled.program)["temporaries"]
            table.add(
                {
                    "optimizer": name,
                    "layers": layers,
                    "rank": rank,
                    "parameter_bytes": programs.nbytes(params),
                    "state_bytes": programs.nbytes(state),
                    "temporary_bytes": temporaries,
                    "temporaries_in_largest_matrices": temporaries / largest,
                }
            )


def accumulation(options: Options, table: Table) -> None:
    """The whole step of two layers, its batch of 16 cut into micro-batches."""
    sizes = {
        "n_layers": 2,
        "rank": options.rank or 192,
        "batch_size": 16,
        "context": 64,
    }
    mesh = _one_device(options)
    for name in options.variants:
        for micro in options.micro_batches:
            if not table.has(optimizer=name, micro_batches=micro):
                config = programs.memory_target(name, accumulate=micro, **sizes)
                row = {"optimizer": name, "micro_batches": micro}
                table.add(row | _whole_step(config, mesh))


def whole_step(options: Options, table: Table) -> None:
    """The training step of the targets, batch 8 x 256, with gradient checkpointing."""
    sizes = {"rank": options.rank or 192, "batch_size": 8, "context": 256}
    # As by default on a TPU, which is not the backend that compiles.
    sizes |= {"factorizations": "in_turn"}
    mesh = _one_device(options)
    for scan in options.scan:
        for name in options.variants:
            if not table.has(optimizer=name, scan_layers=scan):
                config = programs.memory_target(name, scan_layers=scan, **sizes)
                row = {"optimizer": name, "scan_layers": scan}
                table.add(row | _whole_step(config, mesh))


def embedding(options: Options, table: Table) -> None:
    """The bare step of an embedding on AdamW, 32,000 x 1024, its moments in 8 bits."""
    to_compile_for = {"tpu-compile": programs.tpu_devices}
    to_compile_for |= {"gpu-compile": programs.gpu_devices}
    device, *_ = to_compile_for.get(options.device, jax.devices)()
    on_gpu = options.device == "gpu-compile"
    flags = programs.GPU_FLAGS if on_gpu else None
    order = "together" if on_gpu else "in_turn"  # as by default there
    shapes = {"embedding": (32_000, 1024)}
    for dtype in ("float32", "int8"):
        if table.has(moments=dtype):
            continue
        moments = {"mu_dtype": dtype, "nu_dtype": dtype}
        tx = common.optimizer("ldadamw-none", 128, factorizations=order, **moments)
        compiled, _ = programs.compile_bare_step(tx, shapes, "float32", device, flags)
        counted = programs.memory(compiled.program)
        row = {f"{name}_bytes": size for name, size in counted.items()}
        if options.device == "tpu-compile":
            row["cycles"] = accelerators.tpu_cost(compiled.program.as_text()).cycles
        table.add({"moments": dtype} | row)


def _one_device(options: Options) -> Any:
    """A mesh of one device, of the chip that is compiled for or of this machine."""
    if options.device == "tpu-compile":
        return programs.make_mesh(programs.tpu_devices())
    return programs.make_mesh(jax.devices())


def _whole_step(config: Any, mesh: Any) -> dict[str, Any]:
    compiled, state = programs.compile_training_step(config, mesh)
    counted = programs.memory(compiled.program)
    return {
        "parameter_bytes": programs.nbytes(state.params),
        "state_bytes": programs.nbytes(state.opt_state),
        **{f"{name}_bytes": size for name, size in counted.items()},
        "compile_seconds": compiled.seconds,
        "compile_cpu_seconds": compiled.cpu_seconds,
    }


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    common.use_device(options.device, memory_first=True)
    device = options.device
    if whole := device == "tpu-compile":
        device += f"-libtpu-{importlib.metadata.version('libtpu')}"
    step = whole_step if whole else bare_step
    questions = {"step": step, "accumulation": accumulation, "embedding": embedding}
    kind = "" if options.question == "step" else f"{options.question}-"
    table = Table(f"memory-{kind}{device}", options, options.resume)
    questions[options.question](options, table)


if __name__ == "__main__":
    main()
