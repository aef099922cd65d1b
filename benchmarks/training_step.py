"""How long does a whole training step of the main job take, beside AdamW's?

    python -m benchmarks.training_step                    # 0.8 M parameters, CPU
    python -m benchmarks.training_step --device gpu --preset llama-350m \
        --tokens 131072 --micro-batches 4
    python -m benchmarks.training_step --device tpu-compile --preset llama-130m

On `tpu-compile` nothing runs: operations, bytes and memory are the compiler's.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from examples.flax_lm.config import Config, Preset
from examples.flax_lm.data import Batch
from examples.flax_lm.presets import preset, with_variant
from examples.flax_lm.program import init_state, make_train_step

from . import common, programs


@dataclasses.dataclass(frozen=True)
class Options:
    device: common.Device = "cpu"
    """Where to run, or what to compile for."""
    preset: Preset = "tiny"
    """Size of the main job."""
    tokens: int = 0
    """Tokens in a step; 0: what the preset has."""
    micro_batches: int = 1
    """Micro-batches that a step averages over."""
    rank: int = 0
    """Rank of LDAdam; 0: what the preset has."""
    variants: tuple[str, ...] = ("adamw", "ldadamw-float32", "ldadamw-int8")
    """Names of `presets.VARIANTS`."""
    remat: bool = True
    """Gradient checkpointing."""
    rounds: int = 10
    """Rounds that count."""
    threads: int = 2
    """Cores that are used on the CPU."""


def config_of(options: Options, variant: str) -> Config:
    base = preset(options.preset)
    tokens = options.tokens or base.train.tokens
    return with_variant(base, variant).replace(
        remat=options.remat,
        rank=options.rank or base.optim.rank,
        batch_size=tokens // base.train.context,
        accumulate=options.micro_batches,
    )


class Contestant:
    """One training step with its own state, which it donates."""

    def __init__(self, config: Config):
        self.state = jax.jit(partial(init_state, config))()
        shape = (config.train.batch_size, config.train.context + 1)
        vocabulary = config.model.vocab_size
        key = jax.random.key(0)
        self.batch = Batch(jax.random.randint(key, shape, 0, vocabulary, jnp.int32))
        step = jax.jit(make_train_step(config), donate_argnums=0)
        self.step = step.lower(self.state, self.batch).compile()

    def __call__(self) -> float:
        return common.clock(self._advance)

    def _advance(self) -> Any:
        self.state, loss = self.step(self.state, self.batch)
        return self.state, loss


def timed(options: Options) -> list[dict[str, Any]]:
    contestants = {
        name: Contestant(config_of(options, name)) for name in options.variants
    }
    seconds = common.interleave(contestants, options.rounds, warmup=2)
    reference = seconds[options.variants[0]]
    return [
        {
            "optimizer": name,
            **common.spread(seconds[name]),
            "ratio": common.ratio(seconds[name], reference),
            **programs.memory(contestant.step),
        }
        for name, contestant in contestants.items()
    ]


def counted(options: Options) -> list[dict[str, Any]]:
    """Operations, bytes and memory of the program for one TPU chip."""
    mesh, rows = programs.make_mesh(programs.tpu_devices()), []
    for name in options.variants:
        config = config_of(options, name)
        compiled, _ = programs.compile_training_step(config, mesh)
        cost = compiled.program.cost_analysis()
        row = {"optimizer": name, "flops": cost["flops"]}
        row["bytes_accessed"] = cost["bytes accessed"]
        rows.append(row | programs.memory(compiled.program))
    return rows


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    common.use_device(options.device, options.threads)
    name = f"training_step-{options.device}-{options.preset}"
    table = common.Table(name, options)
    for row in (counted if options.device == "tpu-compile" else timed)(options):
        table.add(row)


if __name__ == "__main__":
    main()
