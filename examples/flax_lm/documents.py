"""Documents in shards of C4's form, tokenized and packed into sequences.

`datasets` reads the shards, in a folder or streamed from a hub; `grain` shuffles,
packs, batches and prefetches, and its iterator is the position that a checkpoint saves:
a resumed run reads on bit for bit. Each epoch has its own order of shards, of documents
within a window, and every process that has rows of its own has shards of its own.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import grain
import grain.experimental
import jax
import numpy as np
from datasets.distributed import split_dataset_by_node
from jax.experimental import multihost_utils

from .config import Config
from .data import Batch, DataError
from .tokenizers import Tokenizer, file_hash, load_tokenizer, train_tokenizer

PATTERN = "*.json.gz"
HUB = "hub:"
TOKENIZER_TEXTS = 20_000  # documents that a tokenizer is trained on
Stream = Callable[[int], datasets.IterableDataset]  # an epoch's documents


@dataclasses.dataclass(frozen=True)
class Shards:
    """Where training and held-out documents are."""

    name: str
    train: tuple[str, ...]
    valid: tuple[str, ...]
    subset: str = ""

    @property
    def hub(self) -> bool:
        return self.name.startswith(HUB)

    @property
    def fingerprint(self) -> str:
        """Changes with the names and sizes of the shards."""
        if self.hub:
            return f"{self.name} {self.subset}".strip()
        sizes = [f"{Path(p).name} {Path(p).stat().st_size}" for p in self.train]
        return hashlib.sha256("\n".join(sizes).encode()).hexdigest()[:16]

    def stream(self, split: str, reader: int, readers: int, seed: int) -> Stream:
        """Documents of an epoch that one of several readers takes."""
        paths = self.train if split == "train" else self.valid

        def of_epoch(epoch: int) -> datasets.IterableDataset:
            if self.hub:
                found = datasets.load_dataset(
                    self.name.removeprefix(HUB),
                    self.subset or None,
                    split=split,
                    streaming=True,
                )
                return split_dataset_by_node(found, reader, readers)
            order = list(paths)
            if split == "train":
                np.random.default_rng((seed, epoch)).shuffle(order)
            # Dealt out after the shuffle, which is the same for every reader.
            return datasets.load_dataset(
                "json",
                data_files={split: order[reader::readers]},
                split=split,
                streaming=True,
            )

        return of_epoch


def find_shards(data: str, subset: str = "") -> Shards:
    """The shards of `--data`.

    Raises:
        DataError: If there are none to train on, or none held out.
    """
    if data.startswith(HUB):
        return Shards(data, ("train",), ("validation",), subset)
    paths = sorted(Path(data).glob(PATTERN))
    valid = tuple(str(p) for p in paths if "valid" in p.name)
    train = tuple(str(p) for p in paths if "valid" not in p.name)
    if not train or not valid:
        raise DataError(
            f"{data} holds {len(train)} shards to train on and {len(valid)} for "
            f"validation; it needs both. Shards for validation have it in their names, "
            f"as in c4-validation.00000-of-00008{PATTERN[1:]}."
        )
    return Shards(data, train, valid)


class _Documents(grain.IterDataset):
    """Texts, epoch after epoch; only the last one of `epochs` ends."""

    def __init__(self, stream: Stream, name: str, epochs: int | None):
        super().__init__()
        self.stream, self.name, self.epochs = stream, name, epochs

    def __iter__(self) -> "_DocumentIterator":
        return _DocumentIterator(self)


class _DocumentIterator(grain.DatasetIterator):
    """Reads on from where `datasets` says that an epoch's stream stands."""

    def __init__(self, source: _Documents):
        super().__init__()
        self.source = source
        self._open(0, None)

    def _open(self, epoch: int, state: dict[str, Any] | None) -> None:
        self.epoch, self.read = epoch, 0
        try:
            self.stream = self.source.stream(epoch)
            if state is not None:
                self.stream.load_state_dict(state)
            self.documents = iter(self.stream)
        except Exception as error:  # of the file system, the network, the format
            raise self._refusal(error) from error

    def __next__(self) -> str:
        while True:
            try:
                document = next(self.documents)
                self.read += 1
                return document["text"]
            except StopIteration:
                last = self.source.epochs == self.epoch + 1
                if last or not self.read:
                    raise
                self._open(self.epoch + 1, None)
            except Exception as error:
                raise self._refusal(error) from error

    def get_state(self) -> dict[str, Any]:
        stream = self.stream.state_dict()
        return {"epoch": self.epoch, "read": self.read, "stream": stream}

    def set_state(self, state: dict[str, Any]) -> None:
        self._open(state["epoch"], state["stream"])
        self.read = state["read"]

    def _refusal(self, error: Exception) -> DataError:
        cause = error.__cause__ or error
        return DataError(
            f"{self.source.name} cannot be read: {type(cause).__name__}: "
            f"{str(cause)[:300]}. Each line of a shard is a JSON object with a `text`."
        )


class _Packed(grain.IterDataset):
    """The packed sequences of a data set, whose position outlives a file.

    grain 0.2.18 tells "no part of a document is left" by comparing with a tuple, and
    JSON, in which its own checkpoints are written, makes a list of it: the document
    after that place was cut wrongly. Delete this class once its packing compares lists
    as well; the test that resumes at every place tells.
    """

    def __init__(self, parent: grain.IterDataset, length: int):
        packed = grain.experimental.ConcatThenSplitIterDataset(
            parent, length_struct={"tokens": length}
        )
        super().__init__(packed)

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(iter(self.parents[0]))


class _PackedIterator(grain.DatasetIterator):
    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {k: tuple(v) for k, v in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": slices})


class DocumentData:
    """Shards as `Data`: what the training loop reads."""

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        fingerprint: str,
        config: Config,
        shape: tuple[int, int],
        sharding: jax.sharding.Sharding,
    ):
        self.shards, self.tokenizer, self.config = shards, tokenizer, config
        self.shape, self.sharding = shape, sharding
        self.name, self.fingerprint = shards.name, fingerprint
        self.reader = Reader.of_this_process(shape, sharding)
        if not shards.hub and len(shards.train) < self.reader.count:
            raise DataError(
                f"{self.name} holds {len(shards.train)} shards to train on for "
                f"{self.reader.count} processes that each read their own. Cut the text "
                f"into more shards."
            )
        rows = len(self.reader.rows)
        self.position: Any = iter(
            grain.experimental.ThreadPrefetchIterDataset(
                self._sequences("train", None).batch(rows, drop_remainder=True),
                prefetch_buffer_size=2,
            )
        )
        self._valid: list[dict[str, np.ndarray]] = []

    def _sequences(self, split: str, epochs: int | None) -> grain.IterDataset:
        """Packed sequences of context + 1 tokens, with the documents' numbers."""
        data, seed = self.config.data, self.config.train.seed
        mine = (self.reader.number, self.reader.count) if split == "train" else (0, 1)
        stream = self.shards.stream(split, *mine, seed)
        found: grain.IterDataset = _Documents(stream, self.name, epochs)
        if split == "train" and data.shuffle_window > 1:
            found = grain.experimental.WindowShuffleIterDataset(
                found, window_size=data.shuffle_window, seed=seed
            )
        end = np.array([self.tokenizer.end], np.int32)
        encode = self.tokenizer.encode
        found = found.map(lambda x: {"tokens": np.concatenate([encode(x), end])})
        return _Packed(found, self.shape[1])

    def told(self) -> str:
        return (
            f"{self.name}: {len(self.shards.train)} shards to train on, "
            f"{len(self.shards.valid)} held out; {self.tokenizer.size:,} tokens"
        )

    def training_batch(self, seed: int, step: int) -> Batch:
        """The next batch; `seed` and `step` stand in the position already."""
        try:
            found = next(self.position)
        except StopIteration:
            raise DataError(f"{self.name} holds no documents to train on.") from None
        first = self.reader.rows[0]

        def place(x: np.ndarray) -> jax.Array:
            def rows(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(self.shape[0])
                return x[start - first : stop - first]

            return jax.make_array_from_callback(self.shape, self.sharding, rows)

        return self._batch(found, place)

    def _batch(self, found: dict[str, np.ndarray], place: Callable[..., Any]) -> Batch:
        tokens = place(found["tokens"])
        if not self.config.data.mask_documents:
            return Batch(tokens)
        return Batch(tokens, place(found["tokens_segment_ids"].astype(np.int32)))

    def validation_batches(self, tokens: int) -> list[Callable[[], Batch]]:
        """The first held-out tokens, the same for every process."""
        if not self._valid:
            count = math.ceil(tokens / (self.shape[0] * (self.shape[1] - 1)))
            held_out = self._sequences("validation", 1)
            batches = iter(held_out.batch(self.shape[0], drop_remainder=True))
            self._valid = list(itertools.islice(batches, count))
        if not self._valid:
            raise DataError(
                f"{self.name} holds less than one batch of {self.shape[0]} x "
                f"{self.shape[1]} tokens for validation."
            )

        def place(x: np.ndarray) -> jax.Array:
            whole = lambda index: x[index]
            return jax.make_array_from_callback(self.shape, self.sharding, whole)

        return [lambda found=found: self._batch(found, place) for found in self._valid]

    def prompt(self, length: int) -> np.ndarray:
        text = next(iter(_Documents(self._held_out(), self.name, 1)))
        return self.tokenizer.encode(text)[:length]

    def _held_out(self) -> Stream:
        return self.shards.stream("validation", 0, 1, 0)

    def text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(
            [int(x) for x in tokens if x < self.tokenizer.size]
        )


@dataclasses.dataclass(frozen=True)
class Reader:
    """Which rows of a batch a process reads, and the how manieth reader that makes it.

    Processes whose devices hold the same rows (those of one `tensor` group) are one
    reader: they read the same.
    """

    number: int
    count: int
    rows: range

    @classmethod
    def of_this_process(
        cls, shape: tuple[int, int], sharding: jax.sharding.Sharding
    ) -> "Reader":
        spans: dict[int, set[tuple[int, int]]] = {}
        for device, index in sharding.devices_indices_map(shape).items():
            start, stop, _ = index[0].indices(shape[0])
            spans.setdefault(device.process_index, set()).add((start, stop))
        whole = {
            process: (min(s for s, _ in found), max(s for _, s in found))
            for process, found in spans.items()
        }
        parts = sorted(set(whole.values()))
        apart = all(a[1] <= b[0] for a, b in itertools.pairwise(parts))
        if not apart or len({stop - start for start, stop in parts}) > 1:
            raise DataError(
                f"The processes' devices hold the rows {parts}, which overlap: shards "
                f"cannot be dealt out. Order the --mesh so that each process has rows "
                f"of its own, or all of one group have the same."
            )
        mine = whole[jax.process_index()]
        return cls(parts.index(mine), len(parts), range(*mine))


def open_documents(
    shards: Shards, config: Config, shape: tuple[int, int], sharding: Any
) -> DocumentData:
    """Get the tokenizer ready, in the run's folder if it is trained, and the data."""
    data, vocab_size = config.data, config.model.vocab_size
    path = Path(data.tokenizer)
    if not data.tokenizer:
        path = config.folder / "tokenizer.json"
        if jax.process_index() == 0 and not path.exists():
            train_tokenizer(_first_texts(shards, config.train.seed), vocab_size, path)
        multihost_utils.sync_global_devices("the tokenizer is trained")
    tokenizer = load_tokenizer(path, data.eos, vocab_size)
    fingerprint = f"{shards.fingerprint} {file_hash(path)}"
    return DocumentData(shards, tokenizer, fingerprint, config, shape, sharding)


def _first_texts(shards: Shards, seed: int) -> Iterator[str]:
    stream = shards.stream("train", 0, 1, seed)
    return itertools.islice(iter(_Documents(stream, shards.name, 1)), TOKENIZER_TEXTS)
