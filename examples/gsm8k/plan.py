"""What a run's weights, gradients and optimizer state take, before anything is run.

    python -m examples.gsm8k.plan --model DIR          # any config.json of a Llama
    python -m examples.gsm8k.plan                      # Llama-2 7B

Counted on shapes alone, for weights and gradients of one dtype and all devices
together. Activations and the temporaries of the step come on top: `benchmarks.plan`
compiles the whole step.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from examples.flax_lm.config import Dtype, ModelConfig
from examples.hf import llama
from examples.hf.checkpoints import FormatError, read_config

from .compare import VARIANTS
from .config import ConfigError, OptimConfig
from .program import make_optimizer
from .train import nbytes

LLAMA2_7B = ModelConfig(
    vocab_size=32_000,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    d_mlp=11_008,
    norm_eps=1e-5,
    scan_layers=True,
)
BLOCK = 256  # of an 8-bit Adam: one float32 scale for so many codes


@dataclasses.dataclass(frozen=True)
class Options:
    model: Path | None = None
    """Folder with the config.json; without one, Llama-2 7B."""
    dtype: Dtype = "bfloat16"
    """Dtype of weights and gradients."""
    rank: int = 32
    """Rank of LDAdam."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"Rule: rank is at least 1. Given: {self}.")


def plan(options: Options) -> dict[str, dict[str, int]]:
    """Bytes of weights, gradients and state for each optimizer."""
    config = LLAMA2_7B
    if options.model is not None:
        config = llama.from_json(read_config(options.model))
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(options.dtype)),
        llama.abstract_params(config),
    )
    count = sum(x.size for x in jax.tree.leaves(params))
    weights = nbytes(params)

    def row(state: int) -> dict[str, int]:
        return {"weights": weights, "gradients": weights, "state": state}

    # By arithmetic: optax has no 8-bit Adam (two codes of a byte for each weight, and
    # their scales), and its AdamW keeps the moments in the weights' dtype.
    rows = {
        "8-bit Adam": row(2 * count + 2 * 4 * count // BLOCK),
        "adamw, float32 moments": row(2 * 4 * count),
    }
    for name, changes in VARIANTS.items():
        optim: dict[str, Any] = {"rank": options.rank} | changes
        tx = make_optimizer(OptimConfig(**optim), 100)
        rows[name] = row(nbytes(jax.eval_shape(tx.init, params)))
    return dict(sorted(rows.items(), key=lambda item: -item[1]["state"]))


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    try:
        rows = plan(options)
    except FormatError as error:
        raise SystemExit(f"FormatError: {error}") from error
    table = Table("optimizer", "weights", "gradients", "state", "sum")
    table.title = f"GiB, {options.dtype} weights, rank {options.rank}"
    for name, row in rows.items():
        sizes = (*row.values(), sum(row.values()))
        table.add_row(name, *(f"{size / 2**30:.2f}" for size in sizes))
    Console().print(table)


if __name__ == "__main__":
    main()
