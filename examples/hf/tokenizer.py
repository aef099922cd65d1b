"""A model's own tokenizer, by `tokenizers` or `sentencepiece`."""

from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from .checkpoints import FormatError


class Tokenizer(Protocol):
    """Text to token ids, with what the model expects at the start, and back."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class _Tokenizers:
    def __init__(self, path: Path):
        self.model = tokenizers.Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class _SentencePiece:
    def __init__(self, path: Path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.begin = [] if self.model.bos_id() < 0 else [self.model.bos_id()]

    def encode(self, text: str) -> list[int]:
        return [*self.begin, *self.model.encode(text)]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder: `tokenizer.json`, or else `tokenizer.model`.

    Raises:
      FormatError: if there is neither, or it cannot be read.
    """
    kinds = {"tokenizer.json": _Tokenizers, "tokenizer.model": _SentencePiece}
    for name, kind in kinds.items():
        path = Path(folder) / name
        if path.is_file():
            try:
                return kind(path)
            except Exception as error:  # both raise bare exceptions
                raise FormatError(f"{path} cannot be read: {error}.") from error
    raise FormatError(f"{folder} has no tokenizer: expected {' or '.join(kinds)}.")
