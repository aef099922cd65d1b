"""Weights in the folder format of transformers: `config.json` beside the tensors.

Tensors are read one by one, and of each only what a device holds, from

    model.safetensors                 pytorch_model.bin (needs torch)
    model.safetensors.index.json      pytorch_model.bin.index.json

A model's module says which tensor is which parameter: a list of `Entry`. Names and
shapes are compared with the files' headers before a parameter is made, so that a
checkpoint of another model costs no memory and its error names what does not fit.
Folders are written beside their place and moved there when they are whole.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

SHARD_BYTES = 5 * 10**9  # transformers' own limit for one file
# What belongs to a model beside its weights, by the names that transformers writes.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
Index = tuple[slice, ...]


class FormatError(ValueError):
    """A folder that is not a checkpoint of the model it is read as."""


class Entry(NamedTuple):
    """One tensor of the files, and where it lies in the tree of parameters."""

    tensor: str
    """Name in the files, such as `model.layers.0.mlp.up_proj.weight`."""
    path: tuple[str | int, ...]
    """Keys on the way to the parameter, such as `("embed", "embedding")`."""
    transposed: bool = False
    """torch's Linear holds (out, in), Flax's kernels are (in, out)."""
    layer: int | None = None
    """Place on axis 0, where the parameter is a stack of all layers."""


class Source(Protocol):
    """Files that tell their tensors' shapes, and give parts of them."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: Index) -> np.ndarray: ...


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`.

    Raises:
      FormatError: if there is none, or it is not an object in JSON.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FormatError(
            f"{folder} has no config.json. A model is a folder as transformers' "
            f"save_pretrained writes it; GGUF files: python -m examples.hf.from_gguf."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} must hold an object, got {type(config).__name__}.")
    return config


def config_value(config: dict[str, Any], name: str, *default: Any) -> Any:
    """An entry of `config.json`, or the default where one is given.

    Raises:
      FormatError: if it is missing and there is no default.
    """
    if name in config:
        return config[name]
    if default:
        return default[0]
    raise FormatError(
        f"config.json lacks {name!r}, which the architecture "
        f"{config.get('architectures')} needs."
    )


@contextlib.contextmanager
def open_source(folder: Path) -> Iterator[Source]:
    """Open the tensors of a folder; safetensors go before pytorch_model.bin.

    Raises:
      FormatError: if there are none, or a file is missing, damaged or cut short.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        for name, kind in (("model.safetensors", _Safe), ("pytorch_model.bin", _Torch)):
            files = _files(folder, name)
            if files:
                yield kind(files, stack)
                return
        raise FormatError(
            f"{folder} has no weights: expected model.safetensors, "
            f"model.safetensors.index.json, pytorch_model.bin or "
            f"pytorch_model.bin.index.json."
        )


def _files(folder: Path, name: str) -> list[Path]:
    """The one file, or those that the index names; none where neither is there."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    try:
        named = json.loads(index.read_text())["weight_map"].values()
        files = [folder / file for file in sorted(set(named))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{index} has no readable weight_map: {error}.") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FormatError(f"{folder} lacks {_some(missing)}, which {index.name} names.")
    return files


class _Safe:
    """Safetensors, mapped into memory: only what is asked for is read."""

    def __init__(self, files: Sequence[Path], stack: contextlib.ExitStack):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._slices: dict[str, Any] = {}
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{path} cannot be read: {error}.") from error
            for name in file.keys():  # noqa: SIM118 (it is not a dict)
                self._slices[name] = file.get_slice(name)
                self.shapes[name] = tuple(self._slices[name].get_shape())

    def read(self, name: str, index: Index) -> np.ndarray:
        return self._slices[name][index]


class _Torch:
    """Pickled tensors, by torch's reader that runs no code of the file."""

    def __init__(self, files: Sequence[Path], stack: contextlib.ExitStack):
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise FormatError(
                f"{files[0]} needs torch to be read: pip install torch, or save the "
                f"model as safetensors."
            ) from error
        self._tensors: dict[str, Any] = {}
        for path in files:
            try:
                self._tensors |= torch.load(
                    path, map_location="cpu", weights_only=True, mmap=True
                )
            except Exception as error:  # pickle and zip raise many kinds
                raise FormatError(
                    f"{path} cannot be read: {type(error).__name__}: "
                    f"{str(error)[:200]}."
                ) from error
        stack.callback(self._tensors.clear)
        self.shapes = {name: tuple(x.shape) for name, x in self._tensors.items()}
        self._bfloat16, self._int16 = torch.bfloat16, torch.int16

    def read(self, name: str, index: Index) -> np.ndarray:
        part = self._tensors[name][index].contiguous()
        if part.dtype == self._bfloat16:  # NumPy knows it by ml_dtypes alone
            return part.view(self._int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()


def read_params(
    folder: Path,
    entries: Sequence[Entry],
    like: Any,
    *,
    ignored: Iterable[str] = (),
    progress: bool = False,
) -> Any:
    """Read the parameters of a model.

    Args:
      folder: Folder with the weights.
      entries: Which tensor is which parameter; together they name every leaf of
        ``like`` (each layer of it, where the leaf is a stack).
      like: Nested dicts of ``jax.ShapeDtypeStruct``: shapes, dtypes, and the
        shardings that the parameters shall have, where they carry one.
      ignored: Regular expressions of tensors that may be there and are not read.
      progress: Show a progress bar.

    Returns:
      The parameters, in the structure of ``like``.

    Raises:
      FormatError: if tensors are missing, surplus or misshapen, before any is read.
    """
    leaves, treedef = jax.tree.flatten_with_path(like)
    groups = _by_leaf(entries, [_keys(path) for path, _ in leaves])
    with open_source(folder) as source:
        require_tensors(folder, source.shapes, tensor_shapes(entries, like), ignored)
        bar = tqdm(
            zip(groups, leaves, strict=True),
            total=len(leaves),
            desc="loading",
            unit="array",
            disable=not progress or jax.process_index() != 0,
            leave=False,
        )
        read = [_read_leaf(source, group, leaf) for group, (_, leaf) in bar]
    return treedef.unflatten(read)


def require_tensors(
    folder: Path,
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
) -> None:
    """Compare names and shapes.

    Raises:
      FormatError: with the missing, surplus and misshapen tensors by name.
    """
    skipped = [re.compile(pattern) for pattern in ignored]
    missing = [name for name in expected if name not in found]
    surplus = [
        name
        for name in found
        if name not in expected and not any(p.fullmatch(name) for p in skipped)
    ]
    misshapen = [
        f"{name} is {found[name]} and must be {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    told = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("surplus", surplus),
            ("misshapen", misshapen),
        )
        if names
    ]
    if told:
        raise FormatError(
            f"The tensors of {folder} do not fit its config.json: {'; '.join(told)}. "
            f"Nothing was loaded."
        )


def tensor_shapes(entries: Sequence[Entry], like: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by its name, for parameters such as `like`."""
    leaves = {_keys(path): leaf for path, leaf in jax.tree.leaves_with_path(like)}
    return {e.tensor: _tensor_shape(leaves[e.path].shape, e) for e in entries}


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _keys(path: tuple[Any, ...]) -> tuple[str | int, ...]:
    return tuple(key.key for key in path)


def _by_leaf(
    entries: Sequence[Entry], paths: Sequence[tuple[str | int, ...]]
) -> list[list[Entry]]:
    """The entries of each leaf, layers in order."""
    groups: dict[tuple[str | int, ...], list[Entry]] = {path: [] for path in paths}
    for entry in entries:
        groups[entry.path].append(entry)
    empty = [path for path, group in groups.items() if not group]
    if empty:
        raise KeyError(f"no tensor is named for the parameters {empty}")
    return [sorted(groups[path], key=lambda e: e.layer or 0) for path in paths]


def _tensor_shape(shape: tuple[int, ...], entry: Entry) -> tuple[int, ...]:
    own = shape if entry.layer is None else shape[1:]
    return own[::-1] if entry.transposed else own


def _read_leaf(source: Source, group: list[Entry], leaf: Any) -> jax.Array:
    """Make one parameter; of a split one, each device asks for its part."""

    def part(index: Index | None) -> np.ndarray:
        whole = tuple(slice(None) for _ in leaf.shape)
        index = whole if index is None else index
        if group[0].layer is None:
            return _read_part(source, group[0], index).astype(leaf.dtype)
        layers = [_read_part(source, e, index[1:]) for e in group[index[0]]]
        return np.stack([layer.astype(leaf.dtype) for layer in layers])

    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.numpy.asarray(part(None))
    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _read_part(source: Source, entry: Entry, index: Index) -> np.ndarray:
    if entry.transposed:
        return source.read(entry.tensor, index[::-1]).T
    return source.read(entry.tensor, index)


def write_folder(
    folder: Path,
    config: dict[str, Any],
    entries: Sequence[Entry],
    params: Any,
    *,
    files_from: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as transformers reads it: whole, or not at all.

    Every process of a run on several hosts calls it; the first one writes.

    Args:
      folder: Where to; it must not exist, or be empty.
      config: Contents of `config.json`.
      entries: As `read_params` takes them.
      params: The parameters, in the dtype that they are to be written in.
      files_from: Folder whose tokenizer files are copied.
      shard_bytes: Largest size of one file; above it, files and an index.

    Raises:
      FormatError: if the folder holds something.
    """
    leaves = {_keys(path): x for path, x in jax.tree.leaves_with_path(params)}
    tensors: dict[str, Callable[[], np.ndarray]] = {
        e.tensor: lambda e=e: _tensor_of(e, leaves[e.path]) for e in entries
    }
    sizes = {
        e.tensor: math.prod(shape) * leaves[e.path].dtype.itemsize
        for e, shape in zip(
            entries, tensor_shapes(entries, params).values(), strict=True
        )
    }
    with new_folder(folder) as partial:
        if partial is not None:
            write_json(partial / "config.json", config)
            if files_from is not None:
                copy_files(files_from, partial)
        write_tensors(partial, tensors, sizes, shard_bytes)


def write_tensors(
    folder: Path | None,
    tensors: dict[str, Callable[[], np.ndarray]],
    sizes: dict[str, int],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write named tensors, each made when its file is due; no folder: only make."""
    shards = _shards(sizes, shard_bytes)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {name: np.ascontiguousarray(tensors[name]()) for name in names}
        if folder is not None:
            save_file(arrays, folder / file, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / file)  # not the owner's
        index |= dict.fromkeys(names, file)
    if folder is not None and len(shards) > 1:
        about = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        write_json(folder / "model.safetensors.index.json", about)


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _tensor_of(entry: Entry, leaf: Any) -> np.ndarray:
    array = leaf if entry.layer is None else leaf[entry.layer]
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    array = np.asarray(array)
    return array.T if entry.transposed else array


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path | None]:
    """A folder to fill, which takes its place when the block ends without an error.

    Yields:
      Where to write; None in all processes but the first.

    Raises:
      FormatError: if the place is taken.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FormatError(f"{folder} already exists and is left alone: name another.")
    if jax.process_index() != 0:
        yield None
        return
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_files(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, those that are there."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
