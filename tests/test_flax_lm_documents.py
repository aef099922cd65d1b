"""The main job on shards of documents: what is read, in which order, and resumed."""

import dataclasses
import gzip
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.flax_lm import make_shards, report, sharding
from examples.flax_lm.config import Config, ModelConfig
from examples.flax_lm.data import Batch, DataError
from examples.flax_lm.model import graph, init_params
from examples.flax_lm.program import loss_fn, summed_loss
from examples.flax_lm.train import main

documents = pytest.importorskip("examples.flax_lm.documents", exc_type=ImportError)
load_tokenizer, train_tokenizer = documents.load_tokenizer, documents.train_tokenizer
sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [
    pytest.mark.usefixtures("compile_once"),
    # pyarrow's and fsspec's own, where a stream is left in the middle.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "again"]
DOCUMENTS, SHARDS = 12, 3


def text_of(shard: int, number: int) -> str:
    """Each document begins with its own name."""
    random = np.random.default_rng((shard, number))
    words = " ".join(random.choice(WORDS, size=random.integers(3, 30)))
    return f"{shard}.{number}: {words}"


def write_shard(path: Path, records: list[dict]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c4")
    about = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}
    for shard in range(SHARDS + 1):
        records = [{"text": text_of(shard, i), **about} for i in range(DOCUMENTS)]
        split = "train" if shard < SHARDS else "validation"
        name = f"c4-{split}.{shard % SHARDS:05}-of-00003.json.gz"
        write_shard(folder / name, records)
    return folder


@pytest.fixture(scope="module")
def byte_pairs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    texts = (text_of(s, i) for s in range(SHARDS) for i in range(DOCUMENTS))
    train_tokenizer(texts, 300, path)
    return path


def data_of(shards: Path, tokenizer: Path, **options) -> "documents.DocumentData":
    fresh = {"data": str(shards), "tokenizer": str(tokenizer), "vocab_size": 300}
    config = Config().replace(**fresh | {"shuffle_window": 5} | options)
    rows = sharding.batch_sharding(sharding.make_mesh("data=1"), 2, 1)
    found = documents.find_shards(str(shards))
    return documents.open_documents(found, config, (2, 17), rows)


def batches(data, count: int) -> np.ndarray:
    return np.stack([data.training_batch(0, i).tokens_bt for i in range(count)])


# The order.


def texts(shards: Path, seed: int, reader: int = 0, readers: int = 1, epochs: int = 1):
    stream = documents.find_shards(str(shards)).stream("train", reader, readers, seed)
    return list(documents._Documents(stream, str(shards), epochs))


def test_an_epoch_has_every_document_once_and_its_own_order_of_shards(shards):
    whole = {text_of(s, i) for s in range(SHARDS) for i in range(DOCUMENTS)}
    orders = set()
    for seed in range(4):
        two = texts(shards, seed, epochs=2)
        for epoch in (two[: len(whole)], two[len(whole) :]):
            assert set(epoch) == whole
            assert len(epoch) == len(whole)
            orders.add(tuple(epoch))
    assert len(orders) > 2


def test_readers_have_shards_of_their_own(shards):
    parts = [texts(shards, 0, reader, 3) for reader in range(3)]
    assert [len(part) for part in parts] == [DOCUMENTS] * 3
    assert len({text for part in parts for text in part}) == 3 * DOCUMENTS


def test_the_seed_decides_the_batches(shards, byte_pairs):
    again = [batches(data_of(shards, byte_pairs, seed=s), 6) for s in (0, 0, 1)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any()


def test_sequences_are_the_documents_end_to_end(shards, byte_pairs):
    """Nothing is lost, nothing is read twice: one document after another."""
    data = data_of(shards, byte_pairs, shuffle_window=1)
    order = texts(shards, data.config.train.seed)
    told = data.tokenizer.decode(batches(data, 8).reshape(-1).tolist())
    assert "".join(order).startswith(told[: len(told) // 2])


def test_the_position_goes_on_bit_for_bit_from_every_place(shards, byte_pairs):
    """Over windows and epochs, through JSON, wherever the reader stood before."""
    data, count, ahead = data_of(shards, byte_pairs), 50, 4
    places = []
    for step in range(count):
        places.append(json.dumps(data.position.get_state()))
        data.training_batch(0, step)
    last = json.loads(places[-1])["parent_state"]["parent_window_start_state"]
    assert last["epoch"] >= 1
    whole = batches(data_of(shards, byte_pairs), count + ahead)
    other = data_of(shards, byte_pairs)
    for step, place in enumerate(places):
        other.position.set_state(json.loads(place))
        np.testing.assert_array_equal(
            batches(other, ahead), whole[step : step + ahead], err_msg=f"step {step}"
        )


# Tokenizers.


def test_a_trained_tokenizer_gives_the_text_back(byte_pairs):
    tokenizer = load_tokenizer(byte_pairs, "", 300)
    text = "the quick brown fox, naïve and 日本語"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert len(tokenizer.encode("the quick brown fox")) < 10
    assert ids.max() < tokenizer.size <= 300
    assert tokenizer.end == 0


def test_a_sentencepiece_model_is_read(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text_of(0, i) for i in range(DOCUMENTS)] * 20),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    tokenizer = load_tokenizer(path, "", 300)
    ids = tokenizer.encode("the quick brown fox")
    assert tokenizer.decode(ids.tolist()) == "the quick brown fox"
    assert (tokenizer.size, tokenizer.end) == (60, 2)
    with pytest.raises(DataError, match="no token <stop>"):
        load_tokenizer(path, "<stop>", 300)


def test_extra_ids_of_t5_need_no_room(tmp_path):
    """T5's tokenizer has 32,100 ids; text becomes the first 32,000 of them."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁the", -1.0)]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in range(3)]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    model.add_special_tokens([name for name, _ in pieces if name.startswith("<")])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", "", 4)
    assert (tokenizer.size, tokenizer.end) == (4, 1)
    with pytest.raises(DataError, match="Give --vocab-size 4"):
        load_tokenizer(tmp_path / "tokenizer.json", "", 3)
    with pytest.raises(DataError, match="none of the tokens <stop>"):
        load_tokenizer(tmp_path / "tokenizer.json", "<stop>", 4)


# What is predicted.

MODEL = ModelConfig(
    vocab_size=300, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_mlp=24
)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_masked_documents_are_as_if_each_stood_alone(key, scan_layers):
    """Packed with segments, logits are those of each document by itself."""
    config = dataclasses.replace(MODEL, scan_layers=scan_layers, remat=scan_layers)
    params = init_params(config, 0)
    tokens = jax.random.randint(key, (1, 12), 0, 300)
    segments = jnp.array([[1] * 5 + [2] * 7])
    model = graph(config)
    run = jax.jit(lambda *batch: jax.jit(_logits, static_argnums=0)(model, *batch))
    packed = run(params, tokens, segments)
    alone = run(params, tokens[:, 5:], jnp.ones((1, 7), int))
    np.testing.assert_allclose(packed[:, 5:], alone, atol=1e-5)
    assert abs(run(params, tokens, jnp.ones((1, 12), int)) - packed)[:, 5:].max() > 1e-2


def _logits(model, params, tokens, segments):
    from flax import nnx

    return nnx.merge(model, params)(tokens, segments)


def test_the_first_token_of_a_document_is_not_predicted(key):
    tokens = jax.random.randint(key, (2, 9), 0, 300)
    segments = jnp.array([[1] * 4 + [2] * 5, [1] * 9])
    params, model = init_params(MODEL, 0), graph(MODEL)
    total = jax.jit(summed_loss, static_argnums=2)
    value, count = total(params, Batch(tokens, segments), model)
    assert count == 15
    other = tokens.at[0, 4].set(tokens[0, 4] + 1)  # still seen by those after it
    moved, _ = total(params, Batch(other, segments), model)
    assert moved != value
    alone = [
        total(params, Batch(part), model)
        for part in (tokens[:1, :4], tokens[:1, 4:], tokens[1:])
    ]
    np.testing.assert_allclose(value, sum(v for v, _ in alone), rtol=1e-5)
    mean = jax.jit(loss_fn, static_argnums=2)(params, Batch(tokens, segments), model)
    np.testing.assert_allclose(mean, value / 15, rtol=1e-6)


def test_the_numbers_of_packed_documents_tell_where_one_ends(shards, byte_pairs):
    data = data_of(shards, byte_pairs, mask_documents=True)
    for step in range(5):
        tokens, segments = map(np.asarray, data.training_batch(0, step))
        ends = tokens[:, :-1] == data.tokenizer.end
        np.testing.assert_array_equal(np.diff(segments) == 1, ends)


def test_validation_takes_its_budget_of_held_out_tokens(shards, byte_pairs):
    data = data_of(shards, byte_pairs)
    few, all_of_it = (data_of(shards, byte_pairs) for _ in "ab")
    assert len(few.validation_batches(32)) == 1
    assert len(few.validation_batches(32)) == 1
    whole = all_of_it.validation_batches(10**6)
    assert len(whole) > 3
    first = np.asarray(whole[0]().tokens_bt).reshape(-1)
    assert data.tokenizer.decode(first[:10].tolist()).startswith(f"{SHARDS}.0:")
    np.testing.assert_array_equal(
        first, few.validation_batches(32)[0]().tokens_bt.ravel()
    )


# Which process reads what.


class Sharding:
    """One device a process, with these rows."""

    def __init__(self, rows: list[tuple[int, int]]):
        self.rows = rows

    def devices_indices_map(self, shape):
        devices = map(Device, range(len(self.rows)))
        spans = [(slice(*span), slice(None)) for span in self.rows]
        return dict(zip(devices, spans, strict=True))


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int


@pytest.mark.parametrize(
    ("rows", "here", "expected"),
    [
        ([(0, 4), (4, 8)], 1, (1, 2, range(4, 8))),
        ([(4, 8), (0, 4)], 0, (1, 2, range(4, 8))),
        ([(0, 4), (0, 4), (4, 8), (4, 8)], 1, (0, 2, range(4))),  # groups of `tensor`
        ([(0, 8), (0, 8)], 1, (0, 1, range(8))),
    ],
)
def test_processes_with_the_same_rows_are_one_reader(monkeypatch, rows, here, expected):
    monkeypatch.setattr(jax, "process_index", lambda: here)
    found = documents.Reader.of_this_process((8, 17), Sharding(rows))
    assert (found.number, found.count, found.rows) == expected


def test_rows_that_overlap_are_refused(monkeypatch):
    with pytest.raises(DataError, match="overlap"):
        documents.Reader.of_this_process((8, 17), Sharding([(0, 6), (4, 8)]))


def test_every_reader_needs_a_shard(shards, byte_pairs, monkeypatch):
    four = documents.Reader(0, 4, range(2))
    monkeypatch.setattr(documents.Reader, "of_this_process", lambda *_: four)
    with pytest.raises(DataError, match=r"3 shards .* for 4 processes"):
        data_of(shards, byte_pairs)


# Runs.

RUN = [
    *("--d-model=16", "--n-layers=1", "--n-heads=2", "--n-kv-heads=2", "--d-mlp=24"),
    *("--vocab-size=300", "--optimizer=adamw", "--steps=6", "--batch-size=2"),
    *("--context=16", "--mesh=data=1", "--shuffle-window=5", "--mask-documents"),
    *("--eval-every=3", "--eval-tokens=64", "--log-every=1", "--sample-tokens=4"),
    "--diagnostics-every=0",
    *("--checkpoint-every=2", "--no-progress"),
]


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "run"
    main([*RUN, f"--data={shards}", f"--out={folder}"])
    return folder


def test_a_run_on_shards_resumes_bit_for_bit(finished, tmp_path):
    assert load_tokenizer(finished / "tokenizer.json", "<|endoftext|>", 300).size <= 300
    stopped = shutil.copytree(finished, tmp_path / "stopped")
    shutil.rmtree(stopped / "checkpoints" / "6")
    main(["--resume", f"--out={stopped}"])
    rows = [report.read_metrics(f / "metrics.csv") for f in (finished, stopped)]
    names = ("step", "train_loss", "valid_loss")
    whole, resumed = ([[r.get(n) for n in names] for r in found] for found in rows)
    assert len(whole) == 6
    assert whole == resumed


def test_a_run_does_not_go_on_with_other_documents(finished, shards, tmp_path):
    stopped = shutil.copytree(finished, tmp_path / "stopped")
    other = shutil.copytree(shards, tmp_path / "other")
    write_shard(other / "c4-train.00000-of-00003.json.gz", [{"text": "else"}] * 9)
    with pytest.raises(SystemExit, match=r"data\.data was"):
        main(["--resume", f"--out={stopped}", f"--data={other}"])
    with pytest.raises(SystemExit, match=r"mask_documents was True and is now False"):
        main(["--resume", f"--out={stopped}", "--no-mask-documents"])


def test_a_damaged_position_is_refused(finished, tmp_path):
    stopped = shutil.copytree(finished, tmp_path / "stopped")
    (path,) = (stopped / "checkpoints" / "6" / "data").glob("process_*")
    path.write_text(path.read_text()[:20])
    with pytest.raises(SystemExit, match="checkpoints/6 cannot be read"):
        main(["--resume", f"--out={stopped}"])


def test_overwriting_a_run_on_shards_leaves_the_shards(finished, shards, tmp_path):
    again = shutil.copytree(finished, tmp_path / "again")
    main([*RUN, f"--data={shards}", f"--out={again}", "--overwrite", "--steps=2"])
    assert len(report.read_metrics(again / "metrics.csv")) == 2


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("no validation", "0 for validation; it needs both"),
        ("cut off", "cannot be read"),
        ("no text", "a JSON object with a `text`"),
        ("text files", "are for shards"),
    ],
)
def test_shards_that_cannot_be_read_are_refused(shards, tmp_path, harm, told):
    broken = shutil.copytree(shards, tmp_path / "broken")
    valid = next(broken.glob("*validation*"))
    if harm == "no validation":
        valid.unlink()
    for path in broken.glob("*train*"):
        if harm == "cut off":
            path.write_bytes(path.read_bytes()[:40])
        elif harm == "no text":
            write_shard(path, [{"content": "a document"}] * 20)
        elif harm == "text files":
            path.unlink()
            valid.unlink(missing_ok=True)
            (broken / "a.txt").write_text("text")
    with pytest.raises(SystemExit, match=told):
        main([*RUN, f"--data={broken}", f"--out={tmp_path / 'run'}"])


# The script that makes shards.


def lines(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_text_becomes_the_same_shards_each_time(tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    sentence = "This is a sentence of a book number {} and there are some more of it. "
    for i in range(40):
        (books / f"{i}.txt").write_text("\n\n".join([sentence.format(i) * 5] * 3))
    (books / "code.txt").write_text("x = {1: [2]} ; " * 50)
    again = {"text": sentence.format("ten") * 4}
    records = [again, again, {"nested": {"passage": sentence.format("six") * 4}}]
    (books / "r.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n{broken\n")
    made = []
    for name in ("one", "two"):
        out = ["--shards=2", "--held-out=0.2", "--max-chars=400"]
        make_shards.main([f"--out={tmp_path / name}", f"--sources={books}", *out])
        paths = sorted((tmp_path / name).iterdir())
        made.append([path.read_bytes() for path in paths])
    assert made[0] == made[1]
    names = [path.name for path in paths]
    assert names[0] == "text-train.00000-of-00002.json.gz"
    assert names[-1] == "text-validation.00000-of-00001.json.gz"
    train, valid = lines(paths[0]) + lines(paths[1]), lines(paths[2])
    texts = [line["text"] for line in train + valid]
    assert len(set(texts)) == len(texts) == 42  # three equal pieces of a book are one
    assert not any("x = " in text for text in texts)
    assert {line["url"] for line in train}.isdisjoint(
        {line["url"] for line in valid} - {"r.jsonl"}
    )
    assert set(train[0]) == {"text", "timestamp", "url"}
    with pytest.raises(SystemExit, match="holds something already"):
        make_shards.main([f"--out={tmp_path / 'one'}", f"--sources={books}"])
