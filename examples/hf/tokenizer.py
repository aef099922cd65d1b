"""A model's own tokenizer, by `tokenizers` or `sentencepiece`."""

from pathlib import Path
from typing import NamedTuple, Protocol

import sentencepiece
import tokenizers

from .checkpoints import FormatError


class Encoded(NamedTuple):
    """Token ids, and where in the text each token ends."""

    ids: list[int]
    ends: list[int]


class Tokenizer(Protocol):
    """Text to token ids, with what the model expects at the start, and back."""

    def encode(self, text: str) -> Encoded: ...
    def decode(self, ids: list[int]) -> str: ...


class _Tokenizers:
    def __init__(self, path: Path):
        self.model = tokenizers.Tokenizer.from_file(str(path))

    def encode(self, text: str) -> Encoded:
        encoding = self.model.encode(text)
        return Encoded(encoding.ids, [end for _, end in encoding.offsets])

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class _SentencePiece:
    def __init__(self, path: Path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def encode(self, text: str) -> Encoded:
        pieces = self.model.encode(text, out_type="immutable_proto").pieces
        begin = [] if self.model.bos_id() < 0 else [self.model.bos_id()]
        ids = begin + [piece.id for piece in pieces]
        return Encoded(ids, [0] * len(begin) + [piece.end for piece in pieces])

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
