"""GSM8K: from small files to a trained model, and what is refused on the way."""

import dataclasses
import json
import shutil
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("safetensors")

from hf_files import SMALL, save_small, small_params

from examples.flax_lm import report, sharding
from examples.flax_lm.data import DataError
from examples.gsm8k import compare, data, evaluate, plan
from examples.gsm8k.config import Config, OptimConfig, parse
from examples.gsm8k.loading import load
from examples.gsm8k.program import Program, learning_rate
from examples.gsm8k.train import main
from examples.hf import architectures, llama
from examples.hf.checkpoints import FormatError
from examples.hf.tokenizer import load_tokenizer

LENGTH = 96


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    save_small(folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Twelve problems to train on, of which the first four are the test's."""
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = [
        {
            "question": f"Anna has {a} apples and buys {b} more. How many has she now?",
            "answer": f"She has {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}",
        }
        for a in range(1, 5)
        for b in range(1, 4)
    ]
    for name, part in (("train", rows), ("test", rows[:4])):
        lines = (json.dumps(row) for row in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(model, problems, out, **changes):
    options = {
        "model": model,
        "data": problems,
        "out": out,
        "mesh": "data=1",
        "optimizer": "ldadamw",
        "rank": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "steps": 6,
        "batch_size": 4,
        "length": LENGTH,
        "dtype": "float32",
        "eval_batch_size": 4,
        "generate_problems": 2,
        "generate_batch_size": 4,
        "max_new_tokens": 8,
        "log_every": 2,
        "eval_every": 3,
        "checkpoint_every": 2,
        "keep_checkpoints": 3,
        "progress": False,
        **changes,
    }
    flags = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


@pytest.fixture(scope="module")
def finished(model, problems, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    main(arguments(model, problems, out))
    return out


def loaded_small(model, problems, mesh="data=1", **changes):
    options = {"dtype": "float32", "param_dtype": "float32", "length": LENGTH}
    options |= {"progress": False} | changes
    return load(model, problems, sharding.make_mesh(mesh), **options)


def program_of(model, problems, mesh="data=1", **changes):
    config = parse(arguments(model, problems, "unused", mesh=mesh, **changes))
    loaded = loaded_small(model, problems, mesh, param_dtype=config.train.param_dtype)
    program = Program(config, loaded.config, sharding.make_mesh(mesh), 6)
    program.compile()
    return program, loaded


# The data.


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3.\n#### 7", 7),
        ("#### 1,234,567", 1234567),
        ("####-5", -5),
        ("#### $18.00 in all", 18),
        ("#### .5", Decimal("0.5")),
        ("7", None),
        ("#### seven", None),
    ],
)
def test_the_number_is_what_follows_the_mark(text, number):
    assert data.number_of(text) == number


def test_the_loss_is_on_the_answer_and_its_end_alone(model, problems):
    loaded = loaded_small(model, problems)
    rows = sharding.batch_sharding(sharding.make_mesh("data=1"), 2, 1)
    chosen = loaded.problems.test[:1]
    batch = data.put(chosen, (2, LENGTH), rows)
    learned = np.asarray(batch.tokens)[0, 1:][np.asarray(batch.weights)[0] == 1]
    assert learned[-1] == loaded.ends[0] == 0
    text = load_tokenizer(model).decode(learned[:-1].tolist())
    assert text == f" {chosen[0].answer}"
    assert not np.asarray(batch.weights)[1].any()


def test_each_pass_takes_each_problem_once_in_its_own_order(model, problems):
    train = loaded_small(model, problems).problems.train
    rows = sharding.batch_sharding(sharding.make_mesh("data=1"), 4, 1)
    read = lambda step, seed=0: np.asarray(
        data.training_batch(train, seed, step, (4, LENGTH), rows).tokens
    )
    passes = [np.concatenate([read(3 * p + i) for i in range(3)]) for p in (0, 1)]
    sets = [{row.tobytes() for row in part} for part in passes]
    assert len(sets[0]) == 12
    assert sets[0] == sets[1]
    assert (passes[0] != passes[1]).any()
    np.testing.assert_array_equal(read(4), read(4))
    assert (read(4) != read(4, seed=1)).any()


def test_longer_problems_are_left_out_of_the_training(model, problems):
    lengths = [len(p.tokens) - 1 for p in loaded_small(model, problems).problems.train]
    loaded = loaded_small(model, problems, length=min(lengths))
    assert len(loaded.problems.train) == lengths.count(min(lengths))
    assert loaded.problems.left_out == 12 - lengths.count(min(lengths))
    with pytest.raises(DataError, match="Raise --length"):
        loaded_small(model, problems, length=8)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            '{"question": "Why?", "answer": "So."}',
            "line 13: .*must end in '#### NUMBER'",
        ),
        ('{"question": "Why?"}', r"line 13: a line must be \{"),
        ("Why?", r"line 13: a line must be \{"),
    ],
)
def test_a_line_that_is_not_a_problem_is_named(model, problems, tmp_path, line, told):
    folder = shutil.copytree(problems, tmp_path / "data")
    with (folder / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=told):
        loaded_small(model, folder)
    (folder / "train.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no problems"):
        loaded_small(model, folder)
    (folder / "test.jsonl").unlink()
    (folder / "train.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"train\.jsonl is missing"):
        main(arguments(model, folder, tmp_path / "run"))


def test_the_tokenizer_of_a_larger_model_is_refused(model, problems, tmp_path):
    small = dataclasses.replace(SMALL, vocab_size=300)
    save_small(tmp_path / "small", small)
    with pytest.raises(FormatError, match=r"token 3\d\d, and .* has 300"):
        loaded_small(tmp_path / "small", problems)


# Decoding.


@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_cache_gives_what_the_whole_sequence_does(key, scan_layers):
    """Each token is the likeliest after all before it, for each row's own length."""
    config = dataclasses.replace(SMALL, scan_layers=scan_layers)
    params = small_params(config)
    lengths, new = np.array([3, 9, 6]), 5
    prompts = np.asarray(jax.random.randint(key, (3, 9), 1, 320))
    made = evaluate.greedy(
        params, prompts, lengths, config=config, new=new, ends=(320,)
    )
    for prompt, length, tokens in zip(prompts, lengths, made, strict=True):
        whole = jnp.concatenate([prompt[:length], tokens])
        logits = llama.logits(config, params, whole[None])[0]
        np.testing.assert_array_equal(
            tokens, jnp.argmax(logits[length - 1 : -1], axis=-1)
        )


def test_a_row_that_has_ended_stays_so(key):
    params = small_params()
    prompts = jax.random.randint(key, (2, 6), 1, 320)
    lengths = np.array([6, 4])
    free = np.asarray(
        evaluate.greedy(params, prompts, lengths, config=SMALL, new=6, ends=(320,))
    )
    end = int(free[0, 2])
    made = np.asarray(
        evaluate.greedy(params, prompts, lengths, config=SMALL, new=6, ends=(end,))
    )
    stop = free[0].tolist().index(end)
    np.testing.assert_array_equal(made[0, : stop + 1], free[0, : stop + 1])
    assert (made[0, stop:] == end).all()


def test_answer_loss_is_the_mean_over_all_answer_tokens(model, problems):
    """Whatever batches the problems come in."""
    loaded = loaded_small(model, problems)
    test = loaded.problems.test
    total = 0.0
    for problem in test:
        logits = llama.logits(SMALL, loaded.params, problem.tokens[None, :-1])[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, problem.tokens[1:]
        )
        total += float(losses[problem.start - 1 :].sum())
    expected = total / sum(len(p.tokens) - p.start for p in test)
    mesh = sharding.make_mesh("data=1")
    for size in (1, 3):
        loss = evaluate.answer_loss(
            SMALL, loaded.params, test, size, mesh, progress=False
        )
        assert loss == pytest.approx(expected, rel=1e-5)


# Training.


def test_a_run_learns_and_leaves_all_its_files(finished, model, problems):
    result = json.loads((finished / "result.json").read_text())
    losses = result["answer_losses"]
    assert list(losses) == ["0", "3", "6"]
    assert losses["6"] < losses["0"] - 0.5
    assert result["answer_loss"] == losses["6"]
    assert result["solved_problems"] == 2
    assert (finished / "loss.png").stat().st_size > 1000
    solutions = (finished / "solutions.jsonl").read_text().splitlines()
    assert set(json.loads(solutions[0])) == {"solution", "answer", "right"}
    assert (finished / "model" / "tokenizer.json").exists()
    options = evaluate.Options(
        finished / "model", problems, max_new_tokens=0, mesh="data=1", progress=False
    )
    again = evaluate.evaluate(options)["answer_loss"]
    assert again == pytest.approx(losses["6"], rel=1e-5)


def test_transformers_reads_the_trained_model(finished):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
    _, config, params = architectures.load(finished / "model")
    tokens = np.arange(30)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(
        llama.logits(config, params, tokens), expected, atol=1e-4
    )


def rows_without_time(folder):
    rows = report.read_metrics(folder / "metrics.csv")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_resuming_is_bit_for_bit_the_run_that_never_stopped(finished, tmp_path):
    stopped = shutil.copytree(finished, tmp_path / "stopped")
    for path in ("result.json", "loss.png", "solutions.jsonl"):
        (stopped / path).unlink()
    shutil.rmtree(stopped / "model")
    for step in ("4", "6"):
        shutil.rmtree(stopped / "checkpoints" / step)
    main(["--resume", "--out", str(stopped)])
    assert rows_without_time(stopped) == rows_without_time(finished)
    a, b = (f / "model" / "model.safetensors" for f in (stopped, finished))
    assert a.read_bytes() == b.read_bytes()


def test_a_folder_with_a_run_is_not_written_over(finished, model, problems, tmp_path):
    before = (finished / "metrics.csv").read_bytes()
    with pytest.raises(SystemExit, match=r"already holds a run.*--resume.*--overwrite"):
        main(arguments(model, problems, finished))
    with pytest.raises(SystemExit, match=r"belongs to another run.*rank was 4"):
        main(["--resume", "--out", str(finished), "--rank", "5"])
    assert (finished / "metrics.csv").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(SystemExit, match="left alone"):
        main([*arguments(model, problems, tmp_path), "--overwrite"])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(SystemExit, match="no run to resume"):
        main([*arguments(model, problems, tmp_path), "--resume"])


def test_micro_batches_make_the_step_of_the_whole_batch(model, problems):
    """Though their answers are of different lengths."""
    seen = []
    for accumulate in (1, 4):
        program, loaded = program_of(model, problems, accumulate=accumulate)
        state = program.init(loaded.params)
        for step in range(2):
            batch = program.batch(loaded.problems.train, step)
            state, loss = program.train_step(state, batch)
        seen.append((float(loss), state.params))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        seen[0][1],
        seen[1][1],
    )


def test_a_mesh_of_eight_devices_gives_the_losses_of_one(model, problems):
    seen = []
    for mesh in ("data=1", "data=2,fsdp=2,tensor=2"):
        program, loaded = program_of(model, problems, mesh)
        state, losses = program.init(loaded.params), []
        for step in range(3):
            batch = program.batch(loaded.problems.train, step)
            state, loss = program.train_step(state, batch)
            losses.append(float(loss))
        seen.append(losses)
    np.testing.assert_allclose(*seen, rtol=1e-4)
    up = state.params["layers"]["mlp"]["up"]["kernel"]
    assert len(up.sharding.device_set) == 8
    assert up.addressable_shards[0].data.size * 4 == up.size


def test_bfloat16_weights_stay_so_and_learn(model, problems):
    program, loaded = program_of(
        model, problems, dtype="bfloat16", param_dtype="bfloat16"
    )
    state, losses = program.init(loaded.params), []
    for step in range(6):
        batch = program.batch(loaded.problems.train, step)
        state, loss = program.train_step(state, batch)
        losses.append(float(loss))
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert losses[-1] < losses[0] - 0.3


def test_the_rate_rises_and_falls_in_lines():
    rate = learning_rate(OptimConfig(learning_rate=1.0, warmup_steps=3), 11)
    rates = [float(rate(i)) for i in range(12)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(np.diff(rates[3:]), -1 / 8, rtol=1e-5)
    assert rates[11] == pytest.approx(0.0, abs=1e-7)


def test_published_settings_are_the_default():
    config = Config()
    assert (config.train.length, config.train.epochs) == (512, 3)
    assert (config.train.batch_size, config.optim.warmup_steps) == (32, 20)
    assert (config.optim.learning_rate, config.optim.weight_decay) == (5e-5, 0.0)
    assert data.steps_of(7473, 3, 32) == 700


def test_the_plan_counts_what_a_run_holds(model, problems, finished, capsys):
    """The state of a run of the same options, to the byte."""
    options = plan.Options(model, dtype="float32", rank=4)
    rows = plan.plan(options)
    result = json.loads((finished / "result.json").read_text())
    assert rows["ldadamw-float32"]["state"] == result["state_bytes"]
    assert rows["ldadamw-float32"]["weights"] == result["parameter_bytes"]
    plan.main([])
    told = capsys.readouterr().out
    assert "12.55" in told  # 6.74 G weights of two bytes
    with pytest.raises(SystemExit, match=r"no config\.json"):
        plan.main(["--model", str(problems)])


def test_learned_problems_are_solved(model, problems, tmp_path):
    """Trained on four problems until it knows them, it writes their numbers."""
    folder = shutil.copytree(problems, tmp_path / "data")
    shutil.copy(folder / "test.jsonl", folder / "train.jsonl")
    options = {"steps": 150, "optimizer": "adamw", "learning_rate": 1e-2}
    options |= {"generate_problems": 0, "generate_before": True, "eval_every": 0}
    options |= {"max_new_tokens": 60, "checkpoint_every": -1}
    main(arguments(model, folder, tmp_path / "run", **options))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["exact_match"] == 1.0
    before = (tmp_path / "run" / "before.jsonl").read_text().splitlines()
    assert [json.loads(line)["right"] for line in before] == [False] * 4
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_comparison_goes_on_where_it_was_stopped(
    model, problems, tmp_path, monkeypatch
):
    options = {"steps": 2, "eval_every": 0, "generate_problems": -1, "warmup_steps": 1}
    argv = [*arguments(model, problems, tmp_path / "out", **options)]
    argv += ["--variants", "adamw", "ldadamw-recovery"]
    argv += ["--adamw-rates", "1e-3", "--ldadamw-rates", "3e-3"]
    made, train = [], compare.train

    def counted(config, console):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(config)
        return train(config, console)

    monkeypatch.setattr(compare, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        compare.main(argv)
    monkeypatch.setattr(compare, "train", train)
    first = tmp_path / "out" / "adamw-lr0.001" / "result.json"
    stamp = first.stat().st_mtime_ns
    compare.main([*argv, "--exact-match-problems", "2"])
    assert first.stat().st_mtime_ns == stamp
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [(r["variant"], r["rate"]) for r in told["runs"]] == [
        ("adamw", 1e-3),
        ("ldadamw-recovery", 3e-3),
    ]
    assert "match" in told["before"]
    assert str(tmp_path) not in json.dumps(told)
    assert (tmp_path / "out" / "compare.md").read_text().count("**") == 4
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="other options"):
        compare.main([*argv, "--seed", "1"])
