"""Which module reads a checkpoint, by the class that `config.json` names.

Such a module has the functions of `Architecture`; it is imported when it is needed.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import jax

from .checkpoints import Entry, FormatError, read_config, read_params, write_folder

# Class in `architectures` of config.json -> module of this package.
MODULES = {
    "LlamaForCausalLM": "llama",
    "BertModel": "encoder",
    "BertForSequenceClassification": "encoder",
    "RobertaModel": "encoder",
    "RobertaForSequenceClassification": "encoder",
    "RobertaForMaskedLM": "encoder",
}


class Architecture(Protocol):
    """What a module tells of its models; `config` is of the module's own type."""

    def from_json(self, json: dict[str, Any]) -> Any:
        """The model's config; a `FormatError` names what is not supported."""
        ...

    def to_json(self, config: Any) -> dict[str, Any]:
        """The contents of `config.json`, with `architectures` and `model_type`."""
        ...

    def abstract_params(self, config: Any) -> Any:
        """Nested dicts of `jax.ShapeDtypeStruct`."""
        ...

    def entries(self, config: Any) -> Sequence[Entry]:
        """Which tensor is which parameter."""
        ...

    def ignored(self, config: Any) -> Sequence[str]:
        """Regular expressions of tensors that may be there and are not read."""
        ...

    def last_output(self, config: Any, params: Any, tokens_t: jax.Array) -> Any:
        """Logits of the last position; for an encoder the pooled output."""
        ...


def find(json: dict[str, Any]) -> Architecture:
    """The module of the class that a `config.json` names.

    Raises:
      FormatError: if it names none, or one that is not known.
    """
    named = json.get("architectures") or []
    for name in named:
        if name in MODULES:
            module = importlib.import_module(f".{MODULES[name]}", __package__)
            return cast(Architecture, module)
    raise FormatError(
        f"The architecture must be one of {', '.join(sorted(MODULES))}; config.json "
        f"has architectures={named!r}, model_type={json.get('model_type')!r}."
    )


def load(folder: Path, *, progress: bool = False) -> tuple[Architecture, Any, Any]:
    """Read a folder: the architecture's module, the model's config, its parameters.

    Raises:
      FormatError: if the folder is not a checkpoint of a known architecture.
    """
    json = read_config(folder)
    module = find(json)
    config = module.from_json(json)
    params = read_params(
        folder,
        module.entries(config),
        module.abstract_params(config),
        ignored=module.ignored(config),
        progress=progress,
    )
    return module, config, params


def save(
    folder: Path,
    module: Architecture,
    config: Any,
    params: Any,
    *,
    files_from: Path | None = None,
    **options: Any,
) -> None:
    """Write a folder that transformers, and `load`, read.

    Args:
      folder: Where to; it must not exist, or be empty.
      module: The architecture's module.
      config: The model's config.
      params: The parameters; their dtype is the files'.
      files_from: The folder that the model was read from: its tokenizer is copied,
        and what its config.json says beyond the architecture is kept.
      **options: `shard_bytes` of `write_folder`.
    """
    json = {} if files_from is None else read_config(files_from)
    dtype = jax.tree.leaves(params)[0].dtype.name
    json |= {**module.to_json(config), "dtype": dtype, "torch_dtype": dtype}
    write_folder(
        folder,
        json,
        module.entries(config),
        params,
        files_from=files_from,
        **options,
    )
