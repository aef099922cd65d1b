"""What a run reads; here: bytes of text files, each batch a function of (seed, step).

The position in the data is therefore the step count, and nothing else has to be
saved. A process reads the rows that its own devices hold and no others. Documents in
shards, with a tokenizer, are in `documents.py`.
"""

import dataclasses
import hashlib
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

VALIDATION_STRIDE = 20  # every twentieth file is for validation
# Tests repeat what they test; the tables of `encodings` are near copies of each
# other, so that validation files would not be apart from the training files.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


class DataError(ValueError):
    """A folder that cannot be trained on."""


class Batch(NamedTuple):
    """Sequences of context + 1 tokens: each but the first is to be predicted."""

    tokens_bt: Any
    segments_bt: Any = None
    """Numbers of documents that a sequence is packed of; None: all is one."""


class Data(Protocol):
    """What the training loop and its reports ask of a data set."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def position(self) -> Any:
        """A `grain` iterator that checkpoints save; None: the step tells all."""
        ...

    def told(self) -> str:
        """What is trained and validated on, in a sentence."""
        ...

    def training_batch(self, seed: int, step: int) -> Batch:
        """The batch of a step; steps are asked for in order."""
        ...

    def validation_batches(self, tokens: int) -> list[Callable[[], Batch]]:
        """Held-out text, about this many tokens, read when called."""
        ...

    def prompt(self, length: int) -> np.ndarray:
        """The first held-out tokens."""
        ...

    def text(self, tokens: np.ndarray) -> str:
        """Tokens as text."""
        ...


class Text:
    """Files, end to end, as one sequence of bytes of which only windows are read."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        sizes = [path.stat().st_size for path in paths]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def window(self, start: int, length: int) -> np.ndarray:
        """The bytes from `start`, shape (length,), across the ends of files."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts, left = [], length
        for path, file_start in zip(
            self.paths[first:], self.starts[first:-1], strict=True
        ):
            offset = start + length - left - int(file_start)
            parts.append(np.fromfile(path, np.uint8, count=left, offset=offset))
            left -= len(parts[-1])
            if not left:
                break
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation text, from files that are apart."""

    name: str
    train: Text
    valid: Text
    fingerprint: str
    """Changes with the names, the sizes and the split of the files."""


@dataclasses.dataclass(frozen=True)
class ByteData:
    """A corpus as `Data`: its bytes are the tokens."""

    corpus: Corpus
    shape: tuple[int, int]
    """Rows of a batch over all devices, and context + 1."""
    sharding: jax.sharding.Sharding
    position: None = None

    @property
    def name(self) -> str:
        return self.corpus.name

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def told(self) -> str:
        return (
            f"{self.name}: {len(self.corpus.train):,} bytes to train on, "
            f"{len(self.corpus.valid):,} of other files for validation"
        )

    def training_batch(self, seed: int, step: int) -> Batch:
        return Batch(training_batch(self.corpus, seed, step, self.shape, self.sharding))

    def validation_batches(self, tokens: int) -> list[Callable[[], Batch]]:
        count = math.ceil(tokens / (self.shape[0] * (self.shape[1] - 1)))
        reads = validation_batches(self.corpus, count, self.shape, self.sharding)
        return [lambda read=read: Batch(read()) for read in reads]

    def prompt(self, length: int) -> np.ndarray:
        return self.corpus.valid.window(0, length)

    def text(self, tokens: np.ndarray) -> str:
        """Other tokens than bytes are left out."""
        return bytes(tokens[tokens < 256].astype(np.uint8)).decode(errors="replace")


def load_corpus(folder: str, context: int) -> Corpus:
    """Split the text files of a folder, or of the standard library, in two.

    Args:
        folder: Folder of text files; empty for the standard library's source.
        context: Tokens in a sequence; both parts must be longer than that.

    Raises:
        DataError: If the folder is missing, or does not hold enough text.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    name = folder or "source of the Python standard library"
    if not root.is_dir():
        raise DataError(f"--data must be a folder of text files, got {folder!r}.")
    paths = _text_files(root) if folder else _source_files(root)
    corpus = Corpus(
        name=name,
        train=Text([p for i, p in enumerate(paths) if i % VALIDATION_STRIDE]),
        valid=Text(paths[::VALIDATION_STRIDE]),
        fingerprint=_fingerprint(root, paths),
    )
    if min(len(corpus.train), len(corpus.valid)) <= context:
        raise DataError(
            f"{name} holds {len(paths)} text files with {len(corpus.train)} bytes to "
            f"train on and {len(corpus.valid)} for validation; both must exceed the "
            f"context of {context}. Give a folder with more text, at least two files, "
            f"or a smaller --context."
        )
    return corpus


def _source_files(root: Path) -> list[Path]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / p for p in sorted(paths) if not LEFT_OUT.intersection(p.parts)]


def _text_files(root: Path) -> list[Path]:
    """All files without a zero byte near their start and without a hidden name."""
    paths = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
    shown = (p for p in sorted(paths) if not any(s.startswith(".") for s in p.parts))
    return [root / p for p in shown if _is_text(root / p)]


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _fingerprint(root: Path, paths: list[Path]) -> str:
    listing = [f"{p.relative_to(root)} {p.stat().st_size}" for p in paths]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]


def training_batch(
    corpus: Corpus,
    seed: int,
    step: int,
    shape: tuple[int, int],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Sequences at random places, `shape` (batch, context + 1), the same each time."""
    random = np.random.default_rng((seed, step))
    starts = random.integers(0, len(corpus.train) - shape[1] + 1, size=shape[0])
    return _batch(corpus.train, starts, shape, sharding)


def validation_batches(
    corpus: Corpus,
    batches: int,
    shape: tuple[int, int],
    sharding: jax.sharding.Sharding,
) -> list[Callable[[], jax.Array]]:
    """Sequences spread evenly over the validation text, read when called."""
    last = len(corpus.valid) - shape[1]
    starts = np.linspace(0, last, num=batches * shape[0]).astype(np.int64)
    parts = starts.reshape(shape[0], batches).T
    return [lambda s=s: _batch(corpus.valid, s, shape, sharding) for s in parts]


def _batch(
    text: Text,
    starts: np.ndarray,
    shape: tuple[int, int],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Let each device ask for its rows: no process reads another one's."""

    def rows(index: Any) -> np.ndarray:
        windows = [text.window(int(s), shape[1]) for s in starts[index[0]]]
        return np.stack(windows).astype(np.int32)

    return jax.make_array_from_callback(shape, sharding, rows)
