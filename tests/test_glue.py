"""GLUE: files, batches and metrics, and runs that stop, go on or are refused."""

import dataclasses
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")

from examples.flax_lm.config import ConfigError
from examples.glue import compare, data, optimizers, report
from examples.glue import train as training
from examples.glue.config import (
    Config,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from examples.glue.data import DataError, Rows, Tokens
from examples.glue.program import rates, total_steps
from examples.glue.tasks import TASKS, majority, predictions, score, submission
from examples.hf import architectures, encoder

# First lines of GLUE's own files.
HEADERS = {
    "SST-2": "sentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\t"
    "sentence1\tsentence2\tscore",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\t"
    "sentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\t"
    "sentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
    "CoLA": "source\tlabel\tmark\tsentence",  # the names; its files have no header
}
WORDS = ["cat", "dog", "sun", "moon", "red", "blue", "runs", "sleeps", "no", "yes"]
CONSOLE = Console(file=io.StringIO())


def write_split(
    root: Path, name: str, texts: list[tuple[str, ...]], labels: list[str], split: str
) -> None:
    """A file in GLUE's form; columns that are not read hold their own names."""
    task, columns = TASKS[name], HEADERS[name].split("\t")
    lines = [] if task.header else [HEADERS[name]]
    for text, label in zip(texts, labels, strict=True):
        cells = dict(zip(columns, columns, strict=True)) | {task.label: label}
        cells |= dict(zip(task.sentences, text, strict=True))
        lines.append("\t".join(cells[column] for column in columns))
    (root / name).mkdir(exist_ok=True, parents=True)
    (root / name / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def labels_of(name: str) -> list[str]:
    """A label of each kind as the files spell them."""
    task = TASKS[name]
    if task.is_regression:
        return ["0.0", "2.500", "5"]
    return list(task.labels) if task.in_words else [str(i) for i in range(2)]


@pytest.mark.parametrize("name", HEADERS)
def test_columns_are_taken_by_name(name: str, tmp_path: Path):
    task, labels = TASKS[name], labels_of(name)
    texts = [
        tuple(f"{WORDS[i]} {column}" for column in task.sentences)
        for i in range(len(labels))
    ]
    for split in (task.train, *task.valid):
        write_split(tmp_path, name, texts, labels, split.tsv)
        rows = data.read_rows(str(tmp_path), task, split)
        assert rows.texts == texts
        expected = [0.0, 2.5, 5.0] if task.is_regression else range(len(labels))
        np.testing.assert_array_equal(rows.labels, expected)
    assert len(task.valid) == (2 if name == "MNLI" else 1)
    assert not data.has_split(str(tmp_path), task, task.test[0])


@pytest.mark.parametrize("name", HEADERS)
def test_datasets_gives_the_same_rows(name: str, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    task, labels = TASKS[name], labels_of(name)
    texts = [tuple(f"{w} {i}" for i in task.sentences) for w in WORDS[: len(labels)]]
    write_split(tmp_path, name, texts, labels, "train")
    from_tsv = data.read_rows(str(tmp_path), task, task.train)
    columns = task.datasets_sentences or task.sentences
    table = dict(zip(columns, map(list, zip(*texts, strict=True)), strict=True))
    assert from_tsv.labels is not None
    whole = datasets.Dataset.from_dict(
        {**table, "idx": list(range(len(labels))), "label": from_tsv.labels.tolist()}
    )
    hidden = datasets.Dataset.from_dict({**table, "label": [-1] * len(labels)})
    splits = {"train": whole, task.test[0].datasets: hidden}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved" / task.config))
    saved = str(tmp_path / "saved")
    rows = data.read_rows(saved, task, task.train)
    assert rows.texts == from_tsv.texts
    np.testing.assert_array_equal(rows.labels, from_tsv.labels)
    assert rows.labels is not None
    assert rows.labels.dtype == from_tsv.labels.dtype
    assert data.has_split(saved, task, task.test[0])
    assert not data.has_split(saved, task, task.valid[0])
    assert data.read_rows(saved, task, task.test[0]).labels is None


def test_quotes_are_text_and_a_byte_order_mark_is_not(tmp_path: Path):
    (tmp_path / "MRPC").mkdir()
    lines = f'{HEADERS["MRPC"]}\n1\ta\tb\t"He said\t"so" he did\n0\ta\tb\tx\ty\n'
    (tmp_path / "MRPC" / "train.tsv").write_text(lines, encoding="utf-8-sig")
    rows = data.read_rows(str(tmp_path), TASKS["MRPC"], TASKS["MRPC"].train)
    assert rows.texts == [('"He said', '"so" he did'), ("x", "y")]


def test_rows_of_qqp_that_are_cut_short_are_left_out(tmp_path: Path):
    """GLUE's own file has such rows; in every other task they are refused."""
    write_split(tmp_path, "QQP", [("a", "b")] * 2, ["0", "1"], "train")
    with (tmp_path / "QQP" / "train.tsv").open("a") as file:
        file.write("7\t8\t9\thalf a row\n")
    rows = data.read_rows(str(tmp_path), TASKS["QQP"], TASKS["QQP"].train)
    assert len(rows.texts) == 2
    assert rows.left_out == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", "Line 2 .* 3 columns"),
        ("index\tsentence1\tsentence2\n0\ta\tb\n", "'label'.* missing"),
        ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "'maybe'"),
        ("index\tsentence1\tsentence2\tlabel\n", "no rows"),
        ("", "missing"),
        (None, "RTE/train.tsv is missing"),
    ],
)
def test_broken_files_are_refused(content: str | None, told: str, tmp_path: Path):
    (tmp_path / "RTE").mkdir()
    if content is not None:
        (tmp_path / "RTE" / "train.tsv").write_text(content)
    with pytest.raises(DataError, match=told):
        data.read_rows(str(tmp_path), TASKS["RTE"], TASKS["RTE"].train)


@pytest.mark.parametrize("text", ["5.1", "-1", "much", "nan"])
def test_scores_outside_their_range_are_refused(text: str, tmp_path: Path):
    write_split(tmp_path, "STS-B", [("a", "b")], [text], "train")
    with pytest.raises(DataError, match="between 0 and 5"):
        data.read_rows(str(tmp_path), TASKS["STS-B"], TASKS["STS-B"].train)


def test_metrics_are_glues():
    """Against their formulas: tp 3, fp 1, fn 2, tn 4."""
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    found = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
    assert score(TASKS["MRPC"], labels, found) == pytest.approx(
        {"accuracy": 0.7, "f1": 2 * 3 / (2 * 3 + 1 + 2)}
    )
    matthews = (3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6)
    assert score(TASKS["CoLA"], labels, found) == pytest.approx(
        {"matthews_correlation": matthews}
    )
    x, y = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.5, 0.0, 3.0, 3.5])
    told = score(TASKS["STS-B"], x, y)
    assert told["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert told["spearman"] == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert majority(TASKS["STS-B"], x) == {"pearson": 0.0, "spearman": 0.0}
    assert majority(TASKS["RTE"], np.array([0, 1, 1])) == {"accuracy": 2 / 3}
    names = {name for task in TASKS.values() for name in task.metrics}
    assert len(TASKS) == 9
    assert names == {"accuracy", "f1", "matthews_correlation", "pearson", "spearman"}


def test_submissions_have_the_servers_form():
    outputs = np.array([[0.1, 0.9], [2.0, -1.0], [np.nan, np.nan]])
    told = submission(TASKS["RTE"], predictions(TASKS["RTE"], outputs))
    assert told == (
        "index\tprediction\n0\tnot_entailment\n1\tentailment\n2\tentailment\n"
    )
    told = submission(TASKS["CoLA"], predictions(TASKS["CoLA"], outputs))
    assert told == "index\tprediction\n0\t1\n1\t0\n2\t0\n"
    scores = predictions(TASKS["STS-B"], np.array([[-0.5], [2.25], [7.0]]))
    told = submission(TASKS["STS-B"], scores)
    assert told == "index\tprediction\n0\t0.000\n1\t2.250\n2\t5.000\n"
    splits = [split.submission for task in TASKS.values() for split in task.test]
    assert sorted(splits) == sorted([*(set(TASKS) - {"MNLI"}), "MNLI-m", "MNLI-mm"])


def some_tokens(n: int) -> Tokens:
    random = np.random.default_rng(0)
    ids = [[7] * int(k) for k in random.integers(1, 65, n)]
    types = [[0] * len(row) for row in ids]
    return Tokens(ids, types, np.arange(n, dtype=np.int32))


def test_an_epoch_holds_each_row_once_in_few_lengths():
    tokens = some_tokens(500)
    order = data.epoch_order(tokens.lengths, 16, seed=3, epoch=1)
    assert sorted(np.concatenate(order).tolist()) == list(range(500))
    batches = [data.make_batch(tokens, rows, 16, 64, pad=5) for rows in order]
    assert {b.tokens_bt.shape[1] for b in batches} <= {16, 32, 48, 64}
    again = data.epoch_order(tokens.lengths, 16, seed=3, epoch=1)
    other = data.epoch_order(tokens.lengths, 16, seed=3, epoch=2)
    assert [a.tolist() for a in order] == [a.tolist() for a in again]
    assert [a.tolist() for a in order] != [a.tolist() for a in other]
    padded = sum(b.tokens_bt.size for b in batches)
    at_random = sum(
        16 * data.bucket(max(tokens.lengths[rows]), 64)
        for rows in np.array_split(np.random.default_rng(0).permutation(500), 32)
    )
    assert padded < 0.8 * at_random


def test_a_batch_masks_what_it_pads():
    tokens = Tokens([[2, 7, 3], [2, 3]], [[0, 1, 1], [0, 0]], np.array([1.5, 4.0]))
    batch = data.make_batch(tokens, [1, 0], 3, 128, pad=9)
    assert batch.tokens_bt.shape == (3, 16)
    np.testing.assert_array_equal(
        batch.tokens_bt[:, :4], [[2, 3, 9, 9], [2, 7, 3, 9], [9] * 4]
    )
    np.testing.assert_array_equal(batch.types_bt[1, :4], [0, 1, 1, 0])
    np.testing.assert_array_equal(batch.mask_bt.sum(axis=1), [2, 3, 1])
    np.testing.assert_array_equal(batch.labels_b, [4.0, 1.5, 0.0])
    np.testing.assert_array_equal(batch.weights_b, [1, 1, 0])


def test_the_rate_is_linear_to_zero():
    told = rates(TrainConfig(learning_rate=1.0), 4)
    np.testing.assert_allclose(told, [1.0, 0.75, 0.5, 0.25])
    warmed = rates(TrainConfig(learning_rate=1.0, warmup=0.5), 4)
    np.testing.assert_allclose(warmed, [1 / 3, 2 / 3, 1.0, 0.5])
    assert total_steps(TrainConfig(epochs=3), 33) == 9
    assert total_steps(TrainConfig(epochs=0.5), 320) == 10


# A tiny encoder, and a task that it can learn: whether both sentences are the same.

SETTINGS = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": len(WORDS) + 4,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.3,  # as far from 0 as a trained model's weights
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BertModel with a vocabulary, as transformers lays it out."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = encoder.from_json(SETTINGS)
    init = jax.jit(encoder.init_params, static_argnums=0)
    architectures.save(path, encoder, config, init(config, jax.random.key(0)))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return path


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTE's files: entailment where the second sentence says yes."""
    root = tmp_path_factory.mktemp("glue")
    random = np.random.default_rng(0)
    for split, n in (("train", 150), ("dev", 60)):
        texts, labels = [], []
        for _ in range(n):
            first, second = (list(random.choice(WORDS[:8], 3)) for _ in range(2))
            yes = random.random() < 0.5
            second[1] = "yes" if yes else "no"
            texts.append((" ".join(first), " ".join(second)))
            labels.append("entailment" if yes else "not_entailment")
        write_split(root, "RTE", texts, labels, split)
    test = ["index\tsentence1\tsentence2", "0\tred sun\tyes cat", "1\tdog\tno no"]
    (root / "RTE" / "test.tsv").write_text("\n".join(test) + "\n")
    return root


def small(model: Path, glue: Path, out: Path, **changes: Any) -> Config:
    """A run of a few steps; `changes` are options of any section."""
    options = {
        "learning_rate": 1e-2,
        "epochs": 4.0,
        "max_length": 16,
        "seeds": (0,),
        "progress": False,
        "checkpoint_every": 7,
        "rank": 4,
    } | changes
    made = {}
    for section in (RunConfig, OptimConfig, TrainConfig):
        names = {field.name for field in dataclasses.fields(section)}
        given = {name: options[name] for name in names & options.keys()}
        if section is RunConfig:
            given |= {"model": str(model), "data": str(glue), "out": str(out)}
            given |= {"task": "RTE"}
        made[section] = section(**given)
    return Config(made[RunConfig], made[OptimConfig], made[TrainConfig])


@pytest.fixture(scope="module")
def finished(model: Path, glue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two seeds."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert training.train(small(model, glue, out, seeds=(0, 1)), CONSOLE)
    return out


def test_a_run_learns_and_leaves_its_results(finished: Path):
    result = json.loads((finished / "result.json").read_text())
    accuracy = result["metrics"]["accuracy"]
    assert len(accuracy["values"]) == 2
    assert accuracy["mean"] > result["majority"]["accuracy"] + 0.3
    assert accuracy["std"] == pytest.approx(np.std(accuracy["values"], ddof=1))
    assert (finished / "curves.png").stat().st_size > 1000
    own = json.loads((finished / "seed-1" / "result.json").read_text())
    assert own["steps"] == 40  # 10 batches, the last of 6 rows, 4 epochs
    assert [row["step"] for row in own["epochs"]] == [10, 20, 30, 40]
    assert own["metrics"]["accuracy"] == accuracy["values"][1]
    assert not (finished / "seed-1" / "checkpoints").exists()


def test_predictions_are_written_for_the_server(finished: Path, glue: Path):
    tested = (finished / "seed-0" / "predictions" / "RTE.tsv").read_text()
    lines = tested.splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == ["0", "1"]
    assert {line.split("\t")[1] for line in lines[1:]} <= set(TASKS["RTE"].labels)
    # Those of the validation rows give the accuracy that the result tells.
    own = (finished / "seed-0" / "predictions-dev" / "RTE.tsv").read_text()
    found = [line.split("\t")[1] for line in own.splitlines()[1:]]
    rows = data.read_rows(str(glue), TASKS["RTE"], TASKS["RTE"].valid[0])
    assert rows.labels is not None
    right = np.mean([TASKS["RTE"].labels[i] for i in rows.labels] == np.array(found))
    result = json.loads((finished / "seed-0" / "result.json").read_text())
    assert result["metrics"]["accuracy"] == pytest.approx(right)


def test_the_trained_model_gives_the_same_predictions(finished: Path, glue: Path):
    """Saved as a classifier with its tokenizer, and read again."""
    folder = finished / "seed-0" / "model"
    module, config, params = architectures.load(folder)
    assert config.architecture == "BertForSequenceClassification"
    assert config.labels == TASKS["RTE"].labels
    rows = data.read_rows(str(glue), TASKS["RTE"], TASKS["RTE"].test[0])
    tokenizer = data.load_tokenizer(folder, 16)
    tokens = data.tokenize(rows, tokenizer, config.vocab_size, 2)
    assert tokens.types[1] == [0, 0, 0, 1, 1, 1]
    compiled = training.program(config, OptimConfig(rank=4), "float32")
    outputs = compiled.predict(params, tokens, 4, 16, config.pad_token_id)
    told = submission(TASKS["RTE"], predictions(TASKS["RTE"], outputs))
    assert told == (finished / "seed-0" / "predictions" / "RTE.tsv").read_text()
    assert module is encoder


class StopAt:
    """A log that sends the signal of Ctrl-C at a step."""

    def __init__(self, step: int, monkeypatch: pytest.MonkeyPatch):
        add = report.Log.add

        def stopping(log: report.Log, row: dict[str, Any]) -> None:
            add(log, row)
            if row["step"] == step:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(report.Log, "add", stopping)


def test_a_resumed_run_ends_on_the_same_bits(
    finished: Path,
    model: Path,
    glue: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Stopped in the middle of an epoch, with dropout, moments and error on the way."""
    with monkeypatch.context() as patch:
        StopAt(13, patch)
        config = small(model, glue, tmp_path / "run", log_every=13)
        assert training.train(config, CONSOLE) is None
    assert not (tmp_path / "run" / "seed-0" / "result.json").exists()
    again = small(model, glue, tmp_path / "run", resume=True)
    assert training.train(again, CONSOLE)
    names = ("model/model.safetensors", "predictions-dev/RTE.tsv")
    for name in names:
        ours = (tmp_path / "run" / "seed-0" / name).read_bytes()
        assert ours == (finished / "seed-0" / name).read_bytes()
    steps = [r["step"] for r in report.Log.read(tmp_path / "run/seed-0/metrics.jsonl")]
    assert steps == sorted(set(steps))
    # Finished seeds stay as they are.
    before = (tmp_path / "run" / "seed-0" / "result.json").stat().st_mtime_ns
    assert training.train(again, CONSOLE)
    after = (tmp_path / "run" / "seed-0" / "result.json").stat().st_mtime_ns
    assert before == after


def test_a_run_that_diverges_says_so(model: Path, glue: Path, tmp_path: Path):
    """And its files are JSON all the same, which has no NaN."""
    config = small(model, glue, tmp_path / "run", learning_rate=1e30, epochs=1.0)
    assert training.train(config, CONSOLE)
    text = (tmp_path / "run" / "seed-0" / "result.json").read_text()
    assert json.loads(text)["diverged"]
    assert "NaN" not in text + (tmp_path / "run/seed-0/metrics.jsonl").read_text()


def test_another_run_is_not_gone_on_with(finished: Path, model: Path, glue: Path):
    with pytest.raises(ConfigError, match="already"):
        training.train(small(model, glue, finished), CONSOLE)
    changed = small(model, glue, finished, resume=True, learning_rate=2e-2)
    with pytest.raises(ConfigError, match="other options"):
        training.train(changed, CONSOLE)


def cli(model: Path, glue: Path, out: Path, *more: str) -> str:
    """The message of a refusal on the command line."""
    given = ("--model", str(model), "--data", str(glue), "--task", "RTE")
    with pytest.raises(SystemExit) as caught:
        training.main([*given, "--out", str(out), "--no-progress", *more])
    return str(caught.value)


def test_refusals_are_one_message(model: Path, glue: Path, tmp_path: Path):
    out = tmp_path / "out"
    told = cli(tmp_path, glue, out)
    assert told.startswith("FormatError: ")
    assert "config.json" in told
    told = cli(model, tmp_path, out, "--max-length", "16")
    assert told.startswith("DataError: ")
    assert "32 positions" in cli(model, glue, out, "--max-length", "64")
    told = cli(model, glue, out, "--max-length", "16", "--resume")
    assert "no run to resume" in told
    assert not any(out.glob("seed-*"))


def test_tokenizers_that_do_not_fit_are_refused(model: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no tokenizer"):
        data.load_tokenizer(tmp_path, 16)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        data.load_tokenizer(tmp_path, 16)
    tokenizer = data.load_tokenizer(model, 16)
    with pytest.raises(DataError, match="do not belong together"):
        data.tokenize(Rows([("yes",)], None), tokenizer, len(WORDS), 2)


def test_long_rows_are_cut_in_their_longer_sentence(model: Path):
    tokenizer = data.load_tokenizer(model, 8)
    rows = Rows([("cat " * 9, "dog sun")], None)
    tokens = data.tokenize(rows, tokenizer, 99, 2)
    assert len(tokens.ids[0]) == 8
    assert tokens.types[0] == [0, 0, 0, 0, 0, 1, 1, 1]


def test_ldadam_takes_the_kernels_of_attention_and_mlp_alone(model: Path):
    config = encoder.from_json(json.loads((model / "config.json").read_text()))
    params = encoder.abstract_params(config)
    leaves = jax.tree.leaves_with_path(params)
    taken = [leaf.shape for path, leaf in leaves if optimizers.is_routed(path)]
    assert sorted(taken) == sorted([(16, 16)] * 4 + [(16, 32), (32, 16)])


@pytest.mark.parametrize("name", compare.RATES)
def test_every_optimizer_steps(name: str, model: Path, any_rank_promotion: None):
    """Traced, not run: states and updates of the shapes that they were given."""
    config = encoder.from_json(json.loads((model / "config.json").read_text()))
    params = encoder.abstract_params(config)
    tx = optimizers.make_optimizer(OptimConfig(optimizer=name, rank=2))  # pyright: ignore[reportArgumentType]
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    told = [jax.tree.map(lambda x: (x.shape, x.dtype), t) for t in (state, after)]
    assert told[0] == told[1]
    assert jax.tree.map(lambda x: x.shape, updates) == jax.tree.map(
        lambda x: x.shape, params
    )


def test_fewer_rows_are_spread_over_the_file(tmp_path: Path):
    """STS-B's file, for one, is in order of origin."""
    texts = [(str(i), "b") for i in range(10)]
    write_split(tmp_path, "STS-B", texts, [str(i / 2) for i in range(10)], "train")
    rows = data.read_rows(str(tmp_path), TASKS["STS-B"], TASKS["STS-B"].train, 4)
    assert [text[0] for text in rows.texts] == ["0", "2", "5", "7"]
    np.testing.assert_allclose(rows.labels, [0.0, 1.0, 2.5, 3.5])


def test_state_bytes_tell_the_optimizers_apart(model: Path):
    """AdamW: two buffers of the parameters' size; the others less on the matrices."""
    config = encoder.from_json(json.loads((model / "config.json").read_text()))
    params = encoder.abstract_params(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    found = {
        name: optimizers.state_bytes(OptimConfig(optimizer=name, rank=2), params)
        for name in compare.RATES
    }
    assert found["adamw"]["all"] == pytest.approx(8 * count, abs=16)
    matrices = 8 * (4 * 16 * 16 + 2 * 16 * 32)
    assert found["adamw"]["matrices"] == matrices
    own = {name: told["matrices"] for name, told in found.items()}
    assert own["ldadamw-recovery"] < own["ldadamw-int8"] < own["ldadamw"] < matrices
    assert own["galore"] < matrices
    rest = {name: told["all"] - told["matrices"] for name, told in found.items()}
    assert rest["ldadamw"] == pytest.approx(rest["adamw"], rel=0.02)


def test_a_comparison_goes_on_and_makes_its_table(
    model: Path,
    glue: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "compare"
    given = ["--model", str(model), "--data", str(glue), "--out", str(out)]
    given += ["--tasks", "RTE", "--variants", "adamw", "adafactor"]
    given += ["--max-length", "16", "--epochs", "0.5", "--no-progress"]
    given += ["--rates", "1e-3", "1e-2"]
    compare.main([*given, "--seeds", "0"])
    files = sorted(out.glob("RTE/*/*/seed-0/result.json"))
    assert len(files) == 4
    before = [file.stat().st_mtime_ns for file in files]
    compare.main([*given, "--seeds", "0", "1"])
    assert [file.stat().st_mtime_ns for file in files] == before
    content = json.loads((out / "compare.json").read_text())
    assert len(content["runs"]) == 6
    for variant in ("adamw", "adafactor"):
        tuned = [
            r for r in content["runs"] if r["variant"] == variant and r["seed"] == 0
        ]
        best = max(tuned, key=lambda run: run["score"])["learning_rate"]
        later = [r for r in content["runs"] if r["variant"] == variant and r["seed"]]
        assert [run["learning_rate"] for run in later] == [best]
    capsys.readouterr()
    compare.main([*given, "--sizes"])
    assert "| AdamW | 0.0" in capsys.readouterr().out
    again = tmp_path / "again"
    compare.main(["--redraw", str(out / "compare.json"), "--out", str(again)])
    assert (again / "compare.md").read_text() == (out / "compare.md").read_text()
    assert (again / "compare.png").stat().st_size > 1000
    assert "| Adafactor |" in (again / "compare.md").read_text()
