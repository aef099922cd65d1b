"""Print what a checkpoint makes of some tokens, to hold against another program.

    python -m examples.hf.logits --model DIR --tokens "1 2 3"

A list in JSON: the logits of the last position, for an encoder the pooled output.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro

from . import architectures
from .checkpoints import FormatError, config_value, read_config


@dataclasses.dataclass(frozen=True)
class Options:
    model: Path
    """Folder as transformers writes it."""
    tokens: str
    """Token ids, apart by blanks."""


def read_tokens(options: Options) -> list[int]:
    """The token ids; a `FormatError` where the vocabulary does not hold them."""
    size = config_value(read_config(options.model), "vocab_size")
    try:
        tokens = [int(token) for token in options.tokens.split()]
    except ValueError:
        tokens = []
    if not tokens or not all(0 <= token < size for token in tokens):
        raise FormatError(
            f"--tokens must be at least one number from 0 to {size - 1}, apart by "
            f"blanks, got {options.tokens!r}."
        )
    return tokens


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    try:
        tokens = read_tokens(options)
        module, config, params = architectures.load(options.model, progress=True)
        output = module.last_output(config, params, jnp.asarray(tokens, jnp.int32))
    except ValueError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(json.dumps([float(x) for x in np.asarray(output, np.float32)]))


if __name__ == "__main__":
    main()
