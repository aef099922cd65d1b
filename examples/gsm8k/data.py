"""GSM8K's own files as tokens; every batch is a pure function of (seed, step).

A line of `train.jsonl` and `test.jsonl` is `{"question": ..., "answer": ...}`, and the
answer ends in `#### NUMBER`. What the model reads is

    Question: {question}
    Answer: {answer}<end>

and the loss is on the tokens of the answer and on the end.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from examples.flax_lm.data import DataError
from examples.hf.tokenizer import Tokenizer

PROMPT = "Question: {question}\nAnswer:"
_NUMBER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


class Problem(NamedTuple):
    """A question with its answer, as tokens."""

    tokens: np.ndarray
    """The prompt, the answer and the end."""
    start: int
    """Where the answer begins."""
    answer: str
    """The answer in words, with its number."""


class Batch(NamedTuple):
    """Problems, filled up to one length; nothing is learned from what fills them."""

    tokens: Any
    """Tokens, one more than are read: (b, t + 1)."""
    weights: Any
    """1 where the token that follows is the answer's, else 0: (b, t)."""


@dataclasses.dataclass(frozen=True)
class Problems:
    """The problems of a folder."""

    train: list[Problem]
    test: list[Problem]
    left_out: int
    """Training problems that are longer than a sequence."""
    fingerprint: str
    """Changes with the problems and with the tokenizer."""


def number_of(text: str) -> Decimal | None:
    """The number after `####`, without its thousands' commas; None where none is."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    try:
        return Decimal(found[1].replace(",", ""))
    except InvalidOperation:
        return None


def load_problems(
    folder: Path, tokenizer: Tokenizer, end: int, length: int
) -> Problems:
    """Read and tokenise both files.

    Args:
      folder: Folder with train.jsonl and test.jsonl.
      tokenizer: The model's.
      end: The token that ends an answer.
      length: Tokens of a training problem at most.

    Raises:
      DataError: if a file is missing, empty, or a line is not a problem.
    """
    train, test = (
        [_tokenise(row, tokenizer, end) for row in _read(Path(folder) / name)]
        for name in ("train.jsonl", "test.jsonl")
    )
    short = [problem for problem in train if len(problem.tokens) <= length + 1]
    if not short:
        raise DataError(
            f"All {len(train)} problems of {folder}/train.jsonl have more than "
            f"{length} tokens. Raise --length."
        )
    digest = hashlib.sha256()
    for problem in (*train, *test):
        digest.update(problem.tokens.tobytes())
    left_out = len(train) - len(short)
    return Problems(short, test, left_out, digest.hexdigest()[:16])


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError(
            f"{path} is missing. --data must be a folder with GSM8K's train.jsonl and "
            f"test.jsonl."
        )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            rows.append(_row(line, f"{path}, line {number}"))
    if not rows:
        raise DataError(f"{path} holds no problems.")
    return rows


def _row(line: str, place: str) -> dict[str, str]:
    try:
        row = json.loads(line)
        row = {name: row[name] for name in ("question", "answer")}
    except (ValueError, KeyError, TypeError):
        row = {}
    if not row or not all(isinstance(text, str) for text in row.values()):
        raise DataError(
            f'{place}: a line must be {{"question": "...", "answer": "..."}}, got '
            f"{line[:80]!r}."
        )
    if number_of(row["answer"]) is None:
        raise DataError(
            f"{place}: an answer must end in '#### NUMBER', got "
            f"{row['answer'][-40:]!r}."
        )
    return row


def _tokenise(row: dict[str, str], tokenizer: Tokenizer, end: int) -> Problem:
    """The text is tokenised as a whole; the answer begins where the prompt ends."""
    prompt = PROMPT.format(question=row["question"].strip())
    answer = row["answer"].strip()
    tokens = [*tokenizer.encode(f"{prompt} {answer}"), end]
    pairs = zip(tokenizer.encode(prompt), tokens, strict=False)
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Problem(np.asarray(tokens, np.int32), start, answer)


def steps_of(problems: int, epochs: int, batch_size: int) -> int:
    """Whole batches in some passes over the problems."""
    return max(1, problems * epochs // batch_size)


def training_batch(
    problems: list[Problem],
    seed: int,
    step: int,
    shape: tuple[int, int],
    sharding: jax.sharding.Sharding,
) -> Batch:
    """The problems of a step, of `shape` (batch, tokens); each pass has its order."""
    places = np.arange(step * shape[0], (step + 1) * shape[0])
    passes, within = np.divmod(places, len(problems))
    orders = {
        p: np.random.default_rng((seed, int(p))).permutation(len(problems))
        for p in np.unique(passes)
    }
    chosen = [problems[orders[p][i]] for p, i in zip(passes, within, strict=True)]
    return put(chosen, shape, sharding)


def put(
    chosen: list[Problem], shape: tuple[int, int], sharding: jax.sharding.Sharding
) -> Batch:
    """Fill problems up to one shape; each process makes the rows of its devices."""
    rows, length = shape

    def tokens(index: Any) -> np.ndarray:
        made = np.zeros((rows, length + 1), np.int32)
        for row in range(rows)[index[0]]:
            if row < len(chosen):
                made[row, : len(chosen[row].tokens)] = chosen[row].tokens
        return made[index]

    def weights(index: Any) -> np.ndarray:
        made = np.zeros((rows, length), np.float32)
        for row in range(rows)[index[0]]:
            if row < len(chosen):
                problem = chosen[row]
                made[row, problem.start - 1 : len(problem.tokens) - 1] = 1.0
        return made[index]

    return Batch(
        jax.make_array_from_callback((rows, length + 1), sharding, tokens),
        jax.make_array_from_callback((rows, length), sharding, weights),
    )


def batches_by_length(
    problems: list[Problem], batch_size: int, lengths: list[int], step: int = 64
) -> list[tuple[list[int], int]]:
    """Cut into batches of like length.

    Args:
      problems: The problems.
      batch_size: Problems in a batch.
      lengths: Tokens of each.
      step: Lengths of batches are its multiples, so that few programs are compiled.

    Returns:
      Pairs of the problems' places and the length of the batch, longest first: what
      does not fit into memory shows at once.
    """
    order = sorted(range(len(problems)), key=lambda i: -lengths[i])
    cuts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [(cut, -(-lengths[cut[0]] // step) * step) for cut in cuts]
