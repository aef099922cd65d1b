"""Tokenizers of pre-training: read from a file, or trained on the text at hand."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from .data import DataError
from .files import whole

END = "<|endoftext|>"
_ENDS = ("</s>", END, "<eos>", "<|end_of_text|>", "[SEP]")


class Tokenizer(Protocol):
    """Text to token ids without any special token, and back."""

    size: int
    """One more than the largest id that text can become."""
    end: int
    """The token that ends a document."""

    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: list[int]) -> str: ...


class _Tokenizers:
    """`tokenizer.json`: byte-pair, T5's, and all others of the package."""

    def __init__(self, path: Path, end: str):
        self.model = tokenizers.Tokenizer.from_file(str(path))
        named = (end,) if end else _ENDS
        ids = [i for n in named if (i := self.model.token_to_id(n)) is not None]
        if not ids:
            raise DataError(
                f"{path} has none of the tokens {', '.join(named)} that end a "
                f"document. Name one of its own with --eos."
            )
        self.end = ids[0]
        added = self.model.get_added_tokens_decoder()  # T5's hundred extra ids
        text = (i for i in self.model.get_vocab().values() if i not in added)
        self.size = 1 + max(*text, self.end)

    def encode(self, text: str) -> np.ndarray:
        ids = self.model.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int32)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class _SentencePiece:
    """A model file of sentencepiece, such as Llama-2's `tokenizer.model`."""

    def __init__(self, path: Path, end: str):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.end = self.model.piece_to_id(end) if end else self.model.eos_id()
        if self.end < 0 or (end and self.end == self.model.unk_id()):
            raise DataError(f"{path} has no token {end or 'that ends a document'}.")
        self.size = self.model.vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.model.encode(text), np.int32)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


def load_tokenizer(path: Path, end: str, vocab_size: int) -> Tokenizer:
    """Read a tokenizer whose ids the model has room for.

    Args:
        path: `tokenizer.json`, or a sentencepiece model (`*.model`).
        end: The token that ends a document; empty: the usual names are tried.
        vocab_size: Number of ids that the model knows.

    Raises:
        DataError: If it cannot be read, has no such token, or has too many.
    """
    kind = _SentencePiece if path.suffix == ".model" else _Tokenizers
    try:
        tokenizer = kind(path, end)
    except DataError:
        raise
    except Exception as error:  # both packages raise bare exceptions
        raise DataError(
            f"--tokenizer {path} cannot be read ({error}). Give a tokenizer.json, or a "
            f"sentencepiece model whose name ends in .model."
        ) from error
    if tokenizer.size > vocab_size:
        raise DataError(
            f"The tokenizer {path} has {tokenizer.size:,} tokens, the model knows "
            f"{vocab_size:,}. Give --vocab-size {tokenizer.size}."
        )
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level byte-pair tokenizer and write it as `tokenizer.json`."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    with whole(path) as beside:
        model.save(str(beside))


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
