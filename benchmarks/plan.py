"""Which model fits on how many chips? Compiles one training step; nothing runs.

    python -m benchmarks.plan                             # Llama 1B, 4 and 16 chips
    python -m benchmarks.plan --models 7b 13b --chips v5e-16 v5e-64 v5p-16
    python -m benchmarks.plan --models 70b --chips v5e-256 v5p-64 --resume

Each row holds one sequence a chip, gradient checkpointing, scanned layers, weights and
state sharded over all chips (FSDP; `--tensor` splits them along hidden units too).
"""

import dataclasses
from typing import Any, Literal

import tyro
from jax.errors import JaxRuntimeError

from examples.flax_lm.config import Config
from examples.flax_lm.presets import SIZES, sized, with_variant

from . import common, programs
from .collectives import collective_bytes

Chips = Literal[
    "v5e-1",
    "v5e-4",
    "v5e-16",
    "v5e-64",
    "v5e-256",
    "v5p-4",
    "v5p-16",
    "v5p-64",
    "v5p-256",
]
SLICES = {
    "v5e-1": "v5e:2x2x1",
    "v5e-4": "v5e:2x2x1",
    "v5e-16": "v5e:4x4x1",
    "v5e-64": "v5e:8x8x1",
    "v5e-256": "v5e:16x16x1",
    "v5p-4": "v5p:2x2x1",
    "v5p-16": "v5p:2x2x4",
    "v5p-64": "v5p:4x4x4",
    "v5p-256": "v5p:4x8x8",
}
# Bytes of memory on a chip.
CAPACITY = {"v5e": 16 * 2**30, "v5p": 95 * 2**30}


@dataclasses.dataclass(frozen=True)
class Options:
    device: Literal["tpu-compile"] = "tpu-compile"
    """Always compiled, never run."""
    models: tuple[common.Size, ...] = ("1b",)
    """Llama sizes."""
    chips: tuple[Chips, ...] = ("v5e-4", "v5e-16")
    """Slices: the kind of chip and how many."""
    variants: tuple[str, ...] = (
        "adamw",
        "ldadamw-float32",
        "ldadamw-int8",
        "ldadamw-none",
    )
    """Names of `presets.VARIANTS`."""
    rank: tuple[int, ...] = (0,)
    """Ranks; 0: a quarter of the width."""
    layers: tuple[int, ...] = (0,)
    """Numbers of layers; 0: as many as the model has."""
    param_dtype: common.Dtype = "float32"
    """Dtype of the parameters; activations are bfloat16. One result file each."""
    tensor: int = 1
    """Chips along the tensor axis; the others are along fsdp."""
    context: int = 1024
    """Tokens in a sequence."""
    resume: bool = False
    """Keep the rows of the result file, and add those that are missing."""


def config_of(
    model: str, variant: str, rank: int, layers: int, chips: int, **options: Any
) -> Config:
    """The main job's config; one sequence a chip."""
    base = with_variant(sized(Config(), model), variant)
    return base.replace(
        **options,
        vocab_size=32_000,
        dtype="bfloat16",
        scan_layers=True,
        remat=True,
        n_layers=layers or base.model.n_layers,
        rank=rank or base.model.d_model // 4,
        batch_size=chips,
    )


def plan(config: Config, chips: Chips, tensor: int) -> dict[str, Any]:
    """Bytes on each chip, bytes sent, and seconds to compile."""
    kind, count = chips.split("-")
    devices = programs.tpu_devices(SLICES[chips])
    mesh = programs.make_mesh(devices, int(count) // tensor, tensor)
    try:
        compiled, state = programs.compile_training_step(config, mesh)
    except JaxRuntimeError as error:  # the compiler refuses what cannot fit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "refused": str(error).splitlines()[0][:300]}
    counted = programs.memory(compiled.program)
    sent = collective_bytes(compiled.program.as_text())
    return {
        "fits": counted["peak"] <= CAPACITY[kind],
        "parameter_bytes": programs.nbytes_on_one_device(state.params),
        "state_bytes": programs.nbytes_on_one_device(state.opt_state),
        "temporary_bytes": counted["temporaries"],
        "peak_bytes": counted["peak"],
        "collective_bytes": sum(sent.values()),
        "collectives": sent,
        "compile_seconds": compiled.seconds,
        "compile_cpu_seconds": compiled.cpu_seconds,
    }


def cases(options: Options) -> list[dict[str, Any]]:
    """What names a row, small models and slices first."""
    return [
        {
            "model": model,
            "chips": chips,
            "optimizer": variant,
            "rank": 0 if variant == "adamw" else rank or SIZES[model].d_model // 4,
            "layers": layers or SIZES[model].n_layers,
            "param_dtype": options.param_dtype,
            "tensor": options.tensor,
            "context": options.context,
        }
        for model in options.models
        for layers in options.layers
        for chips in options.chips
        for variant in options.variants
        for rank in (options.rank if variant != "adamw" else (0,))
    ]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    name = "plan" if options.param_dtype == "float32" else f"plan-{options.param_dtype}"
    table = common.Table(name, options, options.resume)
    for case in cases(options):
        if table.has(**case):
            continue
        config = config_of(
            case["model"],
            case["optimizer"],
            case["rank"],
            case["layers"],
            int(case["chips"].split("-")[1]) // options.tensor,
            context=options.context,
            param_dtype=options.param_dtype,
        )
        table.add(case | plan(config, case["chips"], options.tensor))


if __name__ == "__main__":
    main()
