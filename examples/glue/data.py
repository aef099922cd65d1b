"""Rows of GLUE's TSV files or of `datasets`, as token ids in batches of few lengths.

A batch is a pure function of (seed, step), so that the step is all that a resumed run
has to know of the data. Rows are shuffled each epoch; within windows of some batches
they are then put in order of length, so that a batch pads little, and the batches of
a window are shuffled again. A batch is as long as the first of `BUCKETS` that holds
its longest row: a handful of shapes, and as many compilations.
"""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import BertWordPieceTokenizer, Tokenizer

from .tasks import Split, Task

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WINDOW = 16  # batches that are ordered by length together
ON_DISK = "dataset_dict.json"  # what datasets' save_to_disk writes
HUB = "datasets:"  # put before a name for datasets.load_dataset


class DataError(ValueError):
    """Data or a tokenizer that cannot be trained on."""


class Rows(NamedTuple):
    """Texts (one or two a row) and labels; none where the labels are kept secret."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray | None
    left_out: int = 0
    """Rows that were cut short, in a file that is known for it."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Rows as token ids."""

    ids: list[list[int]]
    types: list[list[int]]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.ids])

    @property
    def fingerprint(self) -> str:
        """Changes with any token or label."""
        labels = None if self.labels is None else self.labels.tolist()
        listing = json.dumps([self.ids, self.types, labels])
        return hashlib.sha256(listing.encode()).hexdigest()[:16]


class Batch(NamedTuple):
    """Arrays of a fixed number of rows; the weight of a row that only pads is 0."""

    tokens_bt: np.ndarray
    types_bt: np.ndarray
    mask_bt: np.ndarray
    labels_b: np.ndarray
    weights_b: np.ndarray


def read_rows(data: str, task: Task, split: Split, limit: int = 0) -> Rows:
    """Read one split.

    Args:
      data: GLUE's folder with one folder for each task, or a task's own; a folder
        of `DatasetDict.save_to_disk`; or `datasets:NAME` for a name on the hub.
      task: The task.
      split: The split of it.
      limit: Rows to take, spread evenly: files are in order of origin. 0: all.

    Raises:
      DataError: if files, columns or labels are missing, or rows are broken.
    """
    read = _read_datasets if _is_datasets(data, task) else _read_tsv
    rows = read(data, task, split)
    if not rows.texts:
        raise DataError(f"{split.tsv} of {task.name} in {data} holds no rows.")
    if not limit or limit >= len(rows.texts):
        return rows
    taken = [i * len(rows.texts) // limit for i in range(limit)]
    labels = None if rows.labels is None else rows.labels[taken]
    return Rows([rows.texts[i] for i in taken], labels, rows.left_out)


def has_split(data: str, task: Task, split: Split) -> bool:
    """Whether a split is there, to be read by `read_rows`."""
    if data.startswith(HUB):
        return True
    if _is_datasets(data, task):
        splits = json.loads((_folder(data, task) / ON_DISK).read_text())["splits"]
        return split.datasets in splits
    return (_folder(data, task) / f"{split.tsv}.tsv").is_file()


def _folder(data: str, task: Task) -> Path:
    """The task's own folder, under any of its names, or the one that is given."""
    root = Path(data)
    named = (root / name for name in (task.name, task.name.upper(), task.config))
    return next((folder for folder in named if folder.is_dir()), root)


def _is_datasets(data: str, task: Task) -> bool:
    return data.startswith(HUB) or (_folder(data, task) / ON_DISK).is_file()


def _read_tsv(data: str, task: Task, split: Split) -> Rows:
    path = _folder(data, task) / f"{split.tsv}.tsv"
    if not path.is_file():
        raise DataError(
            f"{path} is missing. --data must be a folder with GLUE's files, such as "
            f"{task.name}/train.tsv, or a folder of datasets' save_to_disk, or "
            f"{HUB}NAME; got {data!r}."
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            # A quotation mark is text: GLUE's files do not quote.
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} is not tab-separated UTF-8: {error}.") from error
    has_labels = split.tsv.split("_")[0] != "test"
    first = 1
    if has_labels and task.header:
        columns, first = task.header, 0
    else:
        columns = tuple(lines[0]) if lines else ()
    wanted = (*task.sentences, task.label) if has_labels else task.sentences
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise DataError(
            f"{path} must have the columns {list(wanted)}; {missing} are missing, its "
            f"first line is {list(columns)}."
        )
    at = [columns.index(name) for name in wanted]
    texts, labels, left_out = [], [], 0
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line:
            continue  # an empty line, such as at the end
        if len(line) <= max(at):
            if task.broken_rows:
                left_out += 1
                continue
            raise DataError(
                f"Line {number} of {path} has {len(line)} columns and needs "
                f"{max(at) + 1}: {line}."
            )
        texts.append(tuple(line[i] for i in at[: len(task.sentences)]))
        if has_labels:
            labels.append(_label(task, line[at[-1]], f"Line {number} of {path}"))
    return Rows(texts, _label_array(task, labels) if has_labels else None, left_out)


def _label(task: Task, text: str, where: str) -> float:
    """The class's number, or the score."""
    if task.is_regression:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if 0 <= value <= 5:
            return value
        raise DataError(f"{where}: a score lies between 0 and 5, got {text!r}.")
    known = task.labels if task.in_words else [str(i) for i in range(len(task.labels))]
    if text not in known:
        raise DataError(f"{where}: a label is one of {list(known)}, got {text!r}.")
    return known.index(text)


def _label_array(task: Task, labels: Sequence[float]) -> np.ndarray:
    return np.array(labels, np.float32 if task.is_regression else np.int32)


def _from_hub(name: str, task: Task) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, task.config)
    except (OSError, ValueError) as error:
        raise DataError(
            f"datasets cannot load {task.config} of {name!r}: {error}."
        ) from error


def _read_datasets(data: str, task: Task, split: Split) -> Rows:
    import datasets

    if data.startswith(HUB):
        found = _from_hub(data.removeprefix(HUB), task)
    else:
        found = datasets.load_from_disk(str(_folder(data, task)))
    if split.datasets not in found:
        raise DataError(f"{data} has the splits {list(found)}, not {split.datasets!r}.")
    rows: Any = found[split.datasets]
    sentences = task.datasets_sentences or task.sentences
    missing = [n for n in (*sentences, "label") if n not in rows.column_names]
    if missing:
        raise DataError(
            f"{split.datasets} of {data} must have the columns "
            f"{[*sentences, 'label']}; {missing} are missing of {rows.column_names}."
        )
    columns = [list(rows[name]) for name in sentences]
    texts = list(zip(*columns, strict=True))
    if split.datasets.split("_")[0] == "test":
        return Rows(texts, None)
    labels = list(rows["label"])
    highest = 5 if task.is_regression else len(task.labels) - 1
    wrong = [i for i, label in enumerate(labels) if not 0 <= label <= highest]
    if wrong:
        raise DataError(
            f"Row {wrong[0]} of {split.datasets} in {data} has the label "
            f"{labels[wrong[0]]}; {task.name} goes from 0 to {highest}."
        )
    return Rows(texts, _label_array(task, labels))


def load_tokenizer(folder: Path, max_length: int) -> Any:
    """The model's tokenizer, cutting the longer sentence first.

    Raises:
      DataError: if neither `tokenizer.json` nor `vocab.txt` can be read.
    """
    whole, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
        elif vocabulary.is_file():
            about = folder / "tokenizer_config.json"
            options = json.loads(about.read_text()) if about.is_file() else {}
            lowercase = bool(options.get("do_lower_case", True))
            tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=lowercase)
        else:
            raise DataError(
                f"{folder} has no tokenizer: expected tokenizer.json or vocab.txt. "
                f"transformers' AutoTokenizer writes the first by save_pretrained."
            )
    except DataError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception
        raise DataError(
            f"The tokenizer in {folder} cannot be read: {error}."
        ) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    return tokenizer


def tokenize(
    rows: Rows, tokenizer: Tokenizer, vocab_size: int, type_vocab_size: int
) -> Tokens:
    """Turn rows into ids; a model without token types gets zeros.

    Raises:
      DataError: if an id is not in the model's vocabulary.
    """
    encoded = tokenizer.encode_batch(
        [row[0] if len(row) == 1 else row for row in rows.texts]
    )
    ids = [row.ids for row in encoded]
    types = [
        [min(kind, type_vocab_size - 1) for kind in row.type_ids] for row in encoded
    ]
    highest = max(map(max, ids))
    if highest >= vocab_size:
        raise DataError(
            f"The tokenizer gives the id {highest}, the model's vocabulary has "
            f"{vocab_size}: they do not belong together."
        )
    return Tokens(ids, types, rows.labels)


def bucket(length: int, max_length: int) -> int:
    """The padded length of a batch."""
    return min(max_length, next(b for b in BUCKETS if b >= min(length, BUCKETS[-1])))


def make_batch(
    tokens: Tokens, rows: Sequence[int], size: int, max_length: int, pad: int
) -> Batch:
    """Put rows into arrays of `size` rows; what is left over has weight 0."""
    t = bucket(max(len(tokens.ids[i]) for i in rows), max_length)
    ids = np.full((size, t), pad, np.int32)
    types, mask = np.zeros((size, t), np.int32), np.zeros((size, t), bool)
    labels, weights = np.zeros(size, np.float32), np.zeros(size, np.float32)
    mask[:, 0] = True  # rows that only pad attend to something, too
    for at, i in enumerate(rows):
        n = len(tokens.ids[i])
        ids[at, :n], types[at, :n], mask[at, :n] = tokens.ids[i], tokens.types[i], True
    weights[: len(rows)] = 1.0
    if tokens.labels is not None:
        labels[: len(rows)] = tokens.labels[list(rows)]
        if tokens.labels.dtype == np.int32:
            labels = labels.astype(np.int32)
    return Batch(ids, types, mask, labels, weights)


def steps_per_epoch(rows: int, size: int) -> int:
    return -(-rows // size)


def epoch_order(lengths: np.ndarray, size: int, seed: int, epoch: int) -> list[Any]:
    """Rows of each batch of an epoch; every row once."""
    random = np.random.default_rng((seed, epoch))
    shuffled = random.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(shuffled), size * WINDOW):
        rows = shuffled[start : start + size * WINDOW]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + size] for i in range(0, len(rows), size)]
    return [batches[i] for i in random.permutation(len(batches))]


def in_order(
    tokens: Tokens, size: int, max_length: int, pad: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """All rows once, shortest first, with their numbers: for evaluation."""
    order = np.argsort(tokens.lengths, kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, make_batch(tokens, list(rows), size, max_length, pad)
