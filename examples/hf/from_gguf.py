"""Turn a GGUF file into a folder as transformers writes it.

    python -m examples.hf.from_gguf FILE --out DIR

Llama only. Weights of any type that the package `gguf` can decode (floats, Q8_0,
Q4_1 and more) are written as floats; the tokenizer inside becomes `tokenizer.json`.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
import tyro
from gguf import GGUFReader, ReaderTensor, dequantize
from tqdm import tqdm

from examples.flax_lm.config import ModelConfig

from . import llama
from .checkpoints import (
    FormatError,
    new_folder,
    require_tensors,
    tensor_shapes,
    write_json,
    write_tensors,
)
from .gguf_tokenizer import write_tokenizer

# The end of a tensor's name in a layer: GGUF's -> transformers'.
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Options:
    file: Annotated[Path, tyro.conf.Positional]
    """The GGUF file."""
    out: Path
    """Folder to write; it must not exist, or be empty."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights that are written."""


def convert(options: Options) -> ModelConfig:
    """Write the folder; return the config of its model.

    Raises:
      FormatError: if the file is damaged, not a Llama, or its tensors do not fit.
    """
    reader = open_file(options.file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found = {str(tensor.name): tensor for tensor in reader.tensors}
    config = read_model_config(fields, tied="output.weight" not in found)
    names = tensor_names(config)
    shapes = tensor_shapes(llama.entries(config), llama.abstract_params(config))
    require_tensors(
        options.file,
        {name: tuple(int(n) for n in t.shape[::-1]) for name, t in found.items()},
        {own: shapes[name] for own, name in names.items()},
    )
    tensors = {
        name: _maker(found[own], config, DTYPES[options.dtype])
        for own, name in names.items()
    }
    size = np.dtype(DTYPES[options.dtype]).itemsize
    sizes = {name: math.prod(shapes[name]) * size for name in tensors}
    with new_folder(options.out) as partial:
        if partial is not None:
            ids = write_tokenizer(fields, partial)
            json = llama.to_json(config) | ids | {"dtype": options.dtype}
            context = fields.get("llama.context_length", 2048)
            json |= {"max_position_embeddings": context, "torch_dtype": options.dtype}
            write_json(partial / "config.json", json)
        with tqdm(total=len(tensors), desc="converting", unit="tensor") as bar:
            counted = {name: _counted(make, bar) for name, make in tensors.items()}
            write_tensors(partial, counted, sizes)
    return config


def open_file(path: Path) -> GGUFReader:
    """Map the file into memory; a `FormatError` where it is not GGUF or cut short."""
    if not path.is_file():
        raise FormatError(f"{path} must be a GGUF file; there is none.")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise FormatError(f"{path} is not a whole GGUF file: {error}.") from error


def read_model_config(fields: dict[str, Any], tied: bool) -> ModelConfig:
    """The config, from the file's key-value pairs."""
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise FormatError(f"The architecture must be 'llama', the file has {kind!r}.")

    def value(name: str, *default: Any) -> Any:
        if f"llama.{name}" not in fields and not default:
            raise FormatError(f"The GGUF file lacks the key 'llama.{name}'.")
        return fields.get(f"llama.{name}", *default)

    scaling = value("rope.scaling.type", "none")
    if scaling != "none":
        raise FormatError(f"llama.rope.scaling.type must be 'none', got {scaling!r}.")
    heads, d_model = value("attention.head_count"), value("embedding_length")
    head_size = value("attention.key_length", value("rope.dimension_count", 0))
    return ModelConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        d_model=d_model,
        n_layers=value("block_count"),
        n_heads=heads,
        n_kv_heads=value("attention.head_count_kv", heads),
        head_size=0 if head_size * heads == d_model else head_size,
        d_mlp=value("feed_forward_length"),
        # Stored as float32: 1e-5 reads 9.99999974738e-06.
        norm_eps=float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=float(value("rope.freq_base", 10_000.0)),
        tied_head=tied,
        scan_layers=True,
    )


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Name in the file -> name in transformers' folder."""
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if not config.tied_head:
        names["output.weight"] = "lm_head.weight"
    for i in range(config.n_layers):
        for own, name in LAYER_NAMES.items():
            names[f"blk.{i}.{own}.weight"] = f"model.layers.{i}.{name}.weight"
    return names


def _maker(
    tensor: ReaderTensor, config: ModelConfig, dtype: Any
) -> Callable[[], np.ndarray]:
    """Decodes the tensor when it is called."""
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    parts = tensor.name.split(".")
    rows_of = heads.get(parts[-2])

    def make() -> np.ndarray:
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise FormatError(
                f"{tensor.name} is stored as {tensor.tensor_type.name}, which the "
                f"package gguf does not decode."
            ) from error
        if rows_of is not None:
            array = rows_in_order(array, rows_of)
        return array.astype(dtype)

    return make


def rows_in_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's order of the rows of a query or key projection.

    GGUF puts the two rows that are turned together beside each other; transformers
    has first all of the one, then all of the other.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _counted(make: Callable[[], np.ndarray], bar: tqdm) -> Callable[[], np.ndarray]:
    def counted() -> np.ndarray:
        array = make()
        bar.update()
        return array

    return counted


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    try:
        config = convert(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(
        f"{options.out}: Llama of {config.n_layers} layers, {config.d_model} wide, "
        f"vocabulary {config.vocab_size:,}."
    )


if __name__ == "__main__":
    main()
