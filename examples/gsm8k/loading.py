"""A model's folder and GSM8K's, read together: the tokenizer belongs to both."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from examples.flax_lm import sharding
from examples.flax_lm.config import Dtype, ModelConfig
from examples.flax_lm.model import Params
from examples.hf import architectures, llama
from examples.hf.checkpoints import FormatError, read_config, read_params
from examples.hf.tokenizer import Tokenizer, load_tokenizer

from .data import Problems, load_problems


class Loaded(NamedTuple):
    """What a run starts from."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    """Tokens that end an answer; the first one is learned."""
    problems: Problems
    fingerprint: str
    """Changes with the model, the data and the tokenizer."""


def load(
    model: Path,
    data: Path,
    mesh: Mesh,
    *,
    dtype: Dtype,
    param_dtype: Dtype,
    remat: bool = False,
    length: int = 512,
    weights: bool = True,
    progress: bool = True,
) -> Loaded:
    """Read both.

    Args:
      model: Folder of the model.
      data: Folder with train.jsonl and test.jsonl.
      mesh: Where the weights go, each device's part to it.
      dtype: Dtype of activations and products.
      param_dtype: Dtype of the weights.
      remat: Recompute each block in the backward pass.
      length: Tokens of a training problem at most.
      weights: Read them; a run that resumes has them in its checkpoint.
      progress: Show a progress bar.

    Raises:
      FormatError: if the folder is not a Llama's.
      DataError: if the files are not GSM8K's.
    """
    json = read_config(model)
    if architectures.find(json) is not llama:
        raise FormatError(
            f"The model must be a LlamaForCausalLM, {model} has "
            f"{json['architectures']}."
        )
    config = dataclasses.replace(llama.from_json(json), dtype=dtype, remat=remat)
    ends = end_tokens(json)
    tokenizer = load_tokenizer(model)
    problems = load_problems(data, tokenizer, ends[0], length)
    _require_small_ids(problems, config)
    params = None
    if weights:
        params = read_params(
            model,
            llama.entries(config),
            abstract_params(config, mesh, param_dtype),
            ignored=llama.ignored(config),
            progress=progress,
        )
    print_of = f"{sorted(json.items())} {_sizes(model)} {problems.fingerprint}"
    fingerprint = hashlib.sha256(print_of.encode()).hexdigest()[:16]
    return Loaded(config, params, tokenizer, ends, problems, fingerprint)


def _require_small_ids(problems: Problems, config: ModelConfig) -> None:
    largest = max(int(p.tokens.max()) for p in (*problems.train, *problems.test))
    if largest >= config.vocab_size:
        raise FormatError(
            f"The tokenizer is not the model's: the problems hold the token {largest}, "
            f"and the model's vocabulary has {config.vocab_size}."
        )


def _sizes(model: Path) -> list[tuple[str, int]]:
    """Names and sizes of the weights' files."""
    files = (p for p in Path(model).iterdir() if p.suffix in (".safetensors", ".bin"))
    return sorted((path.name, path.stat().st_size) for path in files)


def abstract_params(config: ModelConfig, mesh: Mesh, dtype: Dtype) -> Any:
    """Shapes and dtypes of the parameters, and where each lies on the mesh."""
    shapes = llama.abstract_params(config)
    layout = sharding.shardings(mesh, sharding.param_specs(shapes, mesh))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=s),
        shapes,
        layout,
    )


def end_tokens(json: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end a text, by config.json."""
    named: Any = json.get("eos_token_id")
    ends: list[Any] = named if isinstance(named, list) else [named]
    if not ends or not all(isinstance(end, int) for end in ends):
        raise FormatError(
            f"config.json must name eos_token_id, the token that ends a text, got "
            f"{named!r}."
        )
    return tuple(ends)
