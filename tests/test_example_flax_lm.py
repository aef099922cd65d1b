"""The main job: its model, its data, and runs that stop, go on and are refused."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from rich.console import Console

from examples.flax_lm import checkpoints, compare, data, ranks, report, sharding
from examples.flax_lm import train as train_script
from examples.flax_lm.command_line import parse
from examples.flax_lm.config import Config, ConfigError, ModelConfig
from examples.flax_lm.data import Batch
from examples.flax_lm.model import generate, graph, init_params, rotary
from examples.flax_lm.optimizers import leaf_path, make_optimizer
from examples.flax_lm.presets import preset
from examples.flax_lm.program import (
    Program,
    loss_fn,
    make_train_step,
    make_validation_loss,
)
from examples.flax_lm.train import main, train

pytestmark = pytest.mark.usefixtures("compile_once")
ROOT = Path(__file__).parents[1]
# What runs once is not worth the compiler's effort.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SMALL = ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small text files."""
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    random = np.random.default_rng(0)
    for i in range(40):
        text = " ".join(random.choice(words, size=60))
        (folder / f"{i:02}.txt").write_text(text + "\n")
    return folder


def small(folder: Path, out: Path, **changes) -> Config:
    """A run of a second; `changes` are options of any section."""
    options = {
        **dataclasses.asdict(SMALL),
        "scan_layers": True,
        "data": str(folder),
        "out": str(out),
        "mesh": "data=1",
        "steps": 6,
        "batch_size": 4,
        "context": 16,
        "rank": 4,
        "eval_every": 3,
        "eval_tokens": 64,
        "log_every": 2,
        "diagnostics_every": 0,
        "checkpoint_every": 2,
        "sample_tokens": 8,
        "progress": False,
        **changes,
    }
    return Config().replace(**options)


def arguments(config: Config) -> list[str]:
    """The command line that gives this config."""
    flags = []
    for name in Config.sections():
        for key, value in vars(getattr(config, name)).items():
            flag = key.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags += [f"--{flag}", str(value)]
    return flags


def quiet() -> Console:
    return Console(quiet=True)


@functools.partial(jit, static_argnums=0)
def logits(config: ModelConfig, params, tokens) -> jax.Array:
    return nnx.merge(graph(config), params)(tokens)


@functools.partial(jit, static_argnums=(0, 1))
def new_params(config: ModelConfig, seed: int = 0):
    return init_params(config, seed)


def tokens_of(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.randint(key, shape, 0, 256)


# The model.


def test_a_token_does_not_change_what_comes_before_it(key):
    params = new_params(SMALL)
    before = tokens_of(key, 2, 12)
    after = before.at[:, 7].set((before[:, 7] + 1) % 256)
    a, b = logits(SMALL, params, before), logits(SMALL, params, after)
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert (a[:, 7:] != b[:, 7:]).any(axis=-1).all()


def test_positions_matter_only_by_their_distance(key):
    """Rotary: the product of a query and a key depends on the difference."""
    q, k = jax.random.normal(key, (2, 1, 1, 1, 8))
    q, k = (rotary(jnp.tile(x, (1, 10, 1, 1)), 1e4)[0, :, 0] for x in (q, k))
    products = q @ k.T
    for offset in range(-3, 4):
        diagonal = jnp.diagonal(products, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)


def test_grouped_queries_are_full_attention_with_repeated_keys_and_values(key):
    grouped = SMALL
    full = dataclasses.replace(grouped, n_kv_heads=grouped.n_heads)
    params = new_params(grouped)

    def repeated(path, kernel):
        if path[-2].key not in ("key", "value"):
            return kernel
        heads = kernel.reshape(-1, grouped.n_kv_heads, grouped.head_dim)
        return heads.repeat(2, axis=1).reshape(len(kernel), -1)

    widened = jax.tree.map_with_path(repeated, params)
    tokens = tokens_of(key, 2, 12)
    np.testing.assert_allclose(
        logits(grouped, params, tokens), logits(full, widened, tokens), atol=1e-5
    )


def stacked(params):
    layers = params["layers"]
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers.values())}


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_compute_what_unrolled_ones_do(key, remat):
    unrolled = SMALL
    scanned = dataclasses.replace(SMALL, scan_layers=True, remat=remat)
    params = new_params(unrolled)
    batch = Batch(tokens_of(key, 2, 12))
    run = jit(jax.value_and_grad(loss_fn), static_argnums=2)
    value, grads = run(params, batch, graph(unrolled))
    again, again_grads = run(stacked(params), batch, graph(scanned))
    np.testing.assert_allclose(value, again, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        stacked(grads),
        again_grads,
    )


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(key):
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    params = new_params(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = tokens_of(key, 2, 12)
    a, b = logits(SMALL, params, tokens), logits(half, params, tokens)
    assert b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=0.1)


def test_generate_keeps_the_prompt_and_draws_the_rest(key):
    params = new_params(SMALL)
    prompt = jnp.zeros(10, jnp.int32).at[:4].set(7)
    fill = jit(generate, static_argnums=(0, 3))
    drawn = fill(SMALL, params, prompt, 4, key)
    np.testing.assert_array_equal(drawn[:4], 7)
    assert len(set(drawn[4:].tolist())) > 1


@pytest.mark.parametrize(
    ("name", "millions"), [("60m", 58), ("130m", 134), ("350m", 368), ("1b", 1339)]
)
def test_presets_have_the_published_sizes(name, millions):
    shapes = jax.eval_shape(lambda: init_params(preset(f"llama-{name}").model, 0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6) == millions


# The data.


def test_a_window_runs_across_the_ends_of_files(tmp_path):
    paths = [tmp_path / name for name in "abcd"]
    for path, text in zip(paths, ("one", "", "two", "three"), strict=True):
        path.write_text(text)
    text = data.Text(paths)
    whole = b"onetwothree"
    assert len(text) == len(whole)
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            window = text.window(start, stop - start)
            assert window.tobytes() == whole[start:stop]


def test_training_and_validation_files_are_apart(folder):
    corpus = data.load_corpus(str(folder), 16)
    assert len(corpus.valid.paths) == 2
    assert not set(corpus.train.paths) & set(corpus.valid.paths)


def test_the_standard_library_is_there_without_any_argument():
    corpus = data.load_corpus("", 256)
    assert len(corpus.train) > 2**20
    assert len(corpus.valid) > 2**16


def test_a_process_reads_the_rows_of_its_devices_only(folder, monkeypatch):
    """Row i of a batch does not depend on who reads it, nor on the mesh."""
    corpus = data.load_corpus(str(folder), 16)
    one, eight = (
        sharding.batch_sharding(sharding.make_mesh(mesh), 8, 1)
        for mesh in ("data=1", "data=2,fsdp=4")
    )
    batch = data.training_batch(corpus, 3, 5, (8, 17), one)
    read = []
    window = data.Text.window
    monkeypatch.setattr(
        data.Text, "window", lambda *args: read.append(args[1]) or window(*args)
    )
    again = data.training_batch(corpus, 3, 5, (8, 17), eight)
    np.testing.assert_array_equal(batch, again)
    assert len(read) == 8
    other = data.training_batch(corpus, 3, 6, (8, 17), one)
    assert (np.asarray(batch) != np.asarray(other)).any()


def test_validation_batches_cover_the_text_evenly(folder):
    corpus = data.load_corpus(str(folder), 16)
    rows = sharding.batch_sharding(sharding.make_mesh("data=1"), 4, 1)
    reads = data.validation_batches(corpus, 3, (4, 17), rows)
    batches = [np.asarray(read()) for read in reads]
    assert len({row.tobytes() for batch in batches for row in batch}) == 12
    last = corpus.valid.window(len(corpus.valid) - 17, 17)
    np.testing.assert_array_equal(batches[-1][-1], last)


@pytest.mark.parametrize("content", [None, "short"])
def test_a_folder_without_enough_text_is_refused(tmp_path, content):
    if content:
        (tmp_path / "a.txt").write_text(content)
        (tmp_path / "binary").write_bytes(b"\0" * 1000)
    with pytest.raises(data.DataError, match=r"0 bytes .* validation|text files"):
        data.load_corpus(str(tmp_path), 16)
    with pytest.raises(data.DataError, match="must be a folder"):
        data.load_corpus(str(tmp_path / "missing"), 16)


# The config.


def test_config_survives_the_file_and_the_command_line(folder, tmp_path):
    config = small(folder, tmp_path, rank=3, residual="none", optimizer="muon")
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config
    assert parse(arguments(config)) == config


def test_resume_takes_the_options_of_the_saved_run(folder, tmp_path):
    config = small(folder, tmp_path, rank=3)
    among_four = {"coordinator": "host:1", "num_processes": 4, "process_id": 2}
    config.replace(overwrite=True, **among_four).save(tmp_path / "config.json")
    parsed = parse(["--resume", "--out", str(tmp_path), "--log-every", "7"])
    assert parsed.optim == config.optim
    assert parsed == config.replace(resume=True, log_every=7, decay_steps=6)


def test_presets_are_defaults_that_options_change():
    config = parse(["--preset", "llama-130m", "--rank", "32"])
    assert config.model == preset("llama-130m").model
    assert config.optim.rank == 32


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"n_heads": 3}, "n_heads divides d_model"),
        ({"n_kv_heads": 3}, "n_kv_heads divides n_heads"),
        ({"accumulate": 3}, "accumulate divides batch_size"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout is at least 1"),
        ({"rank_run": "runs/short"}, "rank_run is for rank_gradients"),
        ({"ranks": "head"}, "ranks are PATH=RANK,PATH=RANK"),
        ({"ranks": "head=0"}, "ranks are PATH=RANK,PATH=RANK"),
        ({"stochastic_rounding": True}, "is for param_dtype bfloat16"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, tmp_path, changes, rule):
    with pytest.raises(ConfigError, match=rule):
        small(folder, tmp_path, **changes)


# Training.


def state_after(config: Config):
    """The state in the last checkpoint of a run, as NumPy arrays."""
    corpus = data.load_corpus(config.data.data, config.train.context)
    same = checkpoints.identity(config, corpus.fingerprint)
    with checkpoints.Checkpoints(config.folder, same) as saved:
        state, _ = saved.restore(Program(config).abstract_state)
    return jax.tree.map(np.asarray, state)


def losses(folder: Path) -> list:
    names = ("step", "train_loss", "valid_loss", "learning_rate", "tokens")
    rows = report.read_metrics(folder / "metrics.csv")
    return [[row.get(name) for name in names] for row in rows]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Config:
    """A run that went through without a stop, and looked at its subspaces."""
    out = tmp_path_factory.mktemp("run") / "whole"
    config = small(folder, out, diagnostics_every=3)
    main(arguments(config))
    return config


def test_a_run_learns_and_leaves_all_its_files(finished):
    rows = report.read_metrics(finished.folder / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[-1]["valid_loss"] < rows[2]["valid_loss"] < 6
    assert rows[-1]["valid_perplexity"] == np.exp(rows[-1]["valid_loss"])
    names = {path.name for path in finished.folder.iterdir()}
    assert names >= {
        "config.json",
        "diagnostics.csv",
        "diagnostics.png",
        "loss.png",
        "metrics.csv",
        "result.json",
        "sample.txt",
        "tensorboard",
        "checkpoints",
    }
    result = json.loads((finished.folder / "result.json").read_text())
    assert result["parameters"] == 12_112
    assert result["state_bytes"] == sum(result["state_bytes_by_group"].values())
    assert (finished.folder / "loss.png").stat().st_size > 1000


def test_weights_of_16_bits_learn_what_rounding_to_nearest_would_drop(folder, tmp_path):
    """At this rate an update is far below the 1/512 that rounding to nearest keeps."""

    def learned(**options) -> float:
        out = tmp_path / ("rounded" if options else "nearest")
        tiny = {"learning_rate": 3e-6, "warmup": 0.0, "checkpoint_every": 0}
        tiny |= {"param_dtype": "bfloat16", "eval_every": 0} | options
        config = small(folder, out, residual="recovery", **tiny)
        main(arguments(config))
        last = state_after(config).params
        assert {x.dtype for x in jax.tree.leaves(last)} == {jnp.dtype("bfloat16")}
        first = new_params(config.model)
        moved = jax.tree.map(lambda x, y: np.mean(x != y), last, first)
        return float(moved["layers"]["mlp"]["up"]["kernel"])

    assert learned() < 0.01 < 0.02 < learned(stochastic_rounding=True)


def test_resuming_is_bit_for_bit_the_run_that_never_stopped(finished, tmp_path):
    stopped = at_checkpoint(finished, tmp_path / "stopped", 4)
    main([*arguments(stopped), "--resume"])
    assert losses(stopped.folder) == losses(finished.folder)
    logs = [run.folder / "diagnostics.csv" for run in (stopped, finished)]
    assert logs[0].read_bytes() == logs[1].read_bytes()
    jax.tree.map(
        np.testing.assert_array_equal, state_after(stopped), state_after(finished)
    )


def test_a_run_tells_what_its_subspaces_do_matrix_by_matrix(finished, folder):
    """Two looks, with the step's basis, at seven matrices in each of two layers."""
    rows = report.read_metrics(finished.folder / "diagnostics.csv")
    assert [row["step"] for row in rows] == [1] * 14 + [4] * 14
    assert rows[0]["matrix"] == "layers/attention/key/kernel[0]"
    program = Program(finished)
    source = data.ByteData(
        data.load_corpus(str(folder), 16), program.batch_shape, program.rows
    )
    state, batch = program.init(), program.batch(source, 0)
    first = {row["matrix"]: row for row in rows if row["step"] == 1}
    loss = functools.partial(loss_fn, model=graph(finished.model))
    up = jit(jax.grad(loss))(state.params, batch)["layers"]["mlp"]["up"]["kernel"][1]
    row = first["layers/mlp/up/kernel[1]"]
    # At the first step nothing waits: what is lost is what the subspace does not hold.
    np.testing.assert_allclose(row["residual"] ** 2, 1 - row["share"], rtol=1e-4)
    values = np.linalg.svd(np.asarray(up, np.float64))[1] ** 2
    assert 0.5 < row["share"] / (values[:4].sum() / values.sum()) <= 1 + 1e-6
    assert row["turned"] > 0.1
    assert all(row["orthonormality"] < 1e-5 for row in rows)


def test_looking_at_the_subspaces_changes_no_bit_of_the_run(finished, tmp_path):
    blind = finished.replace(out=str(tmp_path / "blind"), diagnostics_every=0)
    main(arguments(blind))
    assert losses(blind.folder) == losses(finished.folder)
    assert not (blind.folder / "diagnostics.csv").exists()


def test_ranks_of_leaves_are_options(folder, tmp_path):
    given = "layers/mlp/up/kernel=7,layers/attention/key/kernel=3"
    config = small(folder, tmp_path, rank=5, ranks=given)
    params = jax.eval_shape(lambda: init_params(config.model, 0))
    state = jax.eval_shape(make_optimizer(config.optim, config.train).init, params)
    (projector,) = optax.tree.get_all_with_path(state, "projector")
    shapes = {leaf_path(p): x.shape for p, x in jax.tree.leaves_with_path(projector[1])}
    assert shapes["layers/mlp/up/kernel"][-1] == 7
    assert shapes["layers/attention/key/kernel"][-1] == 3
    assert shapes["layers/mlp/gate/kernel"][-1] == 5
    strange = config.replace(ranks="layers/mlp/upp/kernel=7")
    with pytest.raises(ConfigError, match="layers/mlp/upp/kernel"):
        make_optimizer(strange.optim, strange.train).init(params)


def test_the_bytes_of_one_rank_are_shared_out_by_gradients_of_a_run(
    finished, folder, tmp_path, monkeypatch
):
    """At that run's last parameters; what is resumed has the ranks, looked for once."""
    seen, propose = [], ranks.proposed
    spy = lambda config, grads: seen.extend(grads) or propose(config, grads)
    monkeypatch.setattr(ranks, "proposed", spy)
    options = {"rank_gradients": 1, "rank_run": str(finished.folder)}
    config = small(folder, tmp_path / "ranked", rank=12, **options)
    program = Program(config)
    source = train_script.open_data(program)
    ranked = ranks.with_proposed_ranks(program, source, quiet())
    loss = functools.partial(loss_fn, model=graph(config.model))
    params = state_after(finished).params
    expected = jax.jit(jax.grad(loss))(params, program.batch(source, 0))
    jax.tree.map(np.testing.assert_array_equal, seen[0], expected)
    # Multiples of 8, on sides of 8 and 16.
    assert set(ranked.optim.rank_of_leaf.values()) == {8, 16}
    size, budget = (
        sum(report.bytes_by_group(p.abstract_state.opt_state).values())
        for p in (Program(ranked), program)
    )
    assert 0.9 * budget < size <= budget
    resumed = parse(["--resume", "--out", str(config.folder)])
    assert resumed.optim == ranked.optim


def test_a_run_asks_for_ranks_unless_it_has_them(folder, tmp_path, monkeypatch):
    def ask(program, *_):
        raise ConfigError(f"asked for {program.config.optim.rank_gradients}")

    monkeypatch.setattr(train_script, "with_proposed_ranks", ask)
    with pytest.raises(SystemExit, match="asked for 3"):
        main(arguments(small(folder, tmp_path / "run", rank_gradients=3)))


def at_checkpoint(finished: Config, out: Path, step: int) -> Config:
    """A copy of a run as it was just after a checkpoint."""
    shutil.copytree(finished.folder, out)
    for path in (out / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    return finished.replace(out=str(out))


def test_a_folder_with_a_run_is_not_written_over(finished, tmp_path):
    before = (finished.folder / "metrics.csv").read_bytes()
    with pytest.raises(SystemExit, match=r"already holds a run.*--resume.*--overwrite"):
        main(arguments(finished))
    assert (finished.folder / "metrics.csv").read_bytes() == before
    with pytest.raises(SystemExit, match="no run to resume"):
        main(["--resume", "--out", str(tmp_path)])
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(SystemExit, match="left alone"):
        main(["--overwrite", "--out", str(tmp_path)])
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--d-mlp=32", "model.d_mlp was 24 and is now 32"),
        ("--optimizer=adamw", "optim.optimizer was 'ldadamw' and is now 'adamw'"),
        ("--seed=1", "train.seed was 0 and is now 1"),
        (f"--data={ROOT / 'examples'}", "data.data was"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(finished, option, told):
    with pytest.raises(SystemExit, match=told):
        main([*arguments(finished), "--resume", option])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(path: Path, harm: str) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()
    if harm == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "one bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_a_checksum_sees_each_bit_and_each_exchange_and_no_mesh(key):
    x = jax.random.normal(key, (8, 4, 3))
    value = checkpoints.checksums({"x": x})
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32).at[3, 2, 1]
    for bit in (0, 13, 31):
        flipped = jax.lax.bitcast_convert_type(bits.add(1 << bit), jnp.float32)
        assert checkpoints.checksums({"x": flipped}) != value
    for axis in range(3):
        assert checkpoints.checksums({"x": jnp.roll(x, 1, axis)}) != value
    rows = sharding.batch_sharding(sharding.make_mesh("data=8"), 8, 1)
    assert checkpoints.checksums({"x": jax.device_put(x, rows)}) == value


# Where one read fails, Orbax leaves the others to a loop that is closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", ["truncated", "missing", "one bit", "foreign"])
def test_a_broken_checkpoint_is_refused_and_nothing_is_written(
    finished, tmp_path, harm
):
    broken = at_checkpoint(finished, tmp_path / "broken", 6)
    step = broken.folder / "checkpoints" / "6"
    if harm == "foreign":
        (step / "run" / "metadata").write_text('{"made by": "another program"}')
    else:
        files = [p for p in (step / "state").rglob("d/*") if p.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        damage(largest, harm)
    before = contents(broken.folder)
    told = {
        "foreign": "belongs to another",
        "one bit": r"is damaged: .*\['.*from step 4",
    }.get(harm, "cannot be read.*from step 4")
    with pytest.raises(SystemExit, match=rf"(?s)checkpoints/6 {told}"):
        main([*arguments(broken), "--resume"])
    assert contents(broken.folder) == before


def test_a_signal_saves_and_stops_and_the_run_goes_on(
    folder, finished, tmp_path, monkeypatch
):
    """It comes, twice, while the fourth batch is read: four steps are made."""
    config = small(folder, tmp_path / "run", checkpoint_every=0)
    batch = Program.batch

    def interrupted(program, source, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # as launchers do
        return batch(program, source, step)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "batch", interrupted)
        result = train(config, quiet())
    assert result.step == 4
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    main(["--resume", "--no-progress", "--out", str(config.folder)])
    assert losses(config.folder) == losses(finished.folder)


def test_ctrl_c_ends_the_program_cleanly(folder, tmp_path):
    """The whole program in a process of its own, as a terminal runs it."""
    config = small(
        folder,
        tmp_path / "run",
        optimizer="adamw",
        steps=100_000,
        eval_every=100_000,
        checkpoint_every=0,
    )
    path = os.pathsep.join([*filter(None, [os.getenv("PYTHONPATH")]), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "examples.flax_lm.train", *arguments(config)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        metrics = config.folder / "metrics.csv"
        while process.poll() is None and len(report.read_metrics(metrics)) < 4:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0
    assert "Go on with --resume" in told
    (step,) = (int(p.name) for p in (config.folder / "checkpoints").glob("[0-9]*"))
    assert step == report.read_metrics(metrics)[-1]["step"]


def test_micro_batches_make_the_step_of_the_large_batch(folder, tmp_path, key):
    """Also where the averaged gradient is clipped, here to a tenth or so."""
    batch = Batch(tokens_of(key, 8, 17))
    for clip_norm in (0.0, 0.2):
        one_and_four_parts_agree(folder, tmp_path, batch, clip_norm)


def one_and_four_parts_agree(folder, tmp_path, batch, clip_norm):
    states, values = [], []
    for accumulate in (1, 4):
        config = small(folder, tmp_path, accumulate=accumulate, clip_norm=clip_norm)
        state, loss = jit(make_train_step(config))(Program(config).init(), batch)
        states.append(state.params)
        values.append(loss)
    np.testing.assert_allclose(*values, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *states)


def test_validation_takes_as_many_rows_at_once_as_training(folder, tmp_path, key):
    batch, found, temporaries = Batch(tokens_of(key, 8, 17)), [], []
    for accumulate in (1, 4):
        config = small(folder, tmp_path, accumulate=accumulate)
        params = init_params(config.model, 0)
        loss = jit(make_validation_loss(config)).lower(params, batch).compile()
        found.append(np.array(loss(params, batch)))
        temporaries.append(loss.memory_analysis().temp_size_in_bytes)
    np.testing.assert_allclose(*found, rtol=1e-6)
    assert found[0][1] == 8 * 16
    assert temporaries[1] < temporaries[0] / 2


def test_a_mesh_of_eight_devices_gives_the_losses_of_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ldadam_optax._schedule._LARGE_MATRIX", 1)  # loop over layers
    corpus = data.load_corpus(str(folder), 16)
    seen, states = [], []
    for mesh in ("data=1", "data=2,fsdp=2,tensor=2"):
        options = {"mesh": mesh, "batch_size": 8, "clip_norm": 1.0}
        program = Program(small(folder, tmp_path, **options))
        source = data.ByteData(corpus, program.batch_shape, program.rows)
        program.compile()
        state = program.init()
        losses = []
        for step in range(3):
            state, loss = program.train_step(state, program.batch(source, step))
            losses.append(float(loss))
        seen.append(losses)
        states.append(state)
    np.testing.assert_allclose(*seen, rtol=1e-4)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(states[1]))
    up = states[1].params["layers"]["mlp"]["up"]["kernel"]
    assert up.sharding.spec == P(None, "fsdp", "tensor")
    assert up.addressable_shards[0].data.size * 4 == up.size


@pytest.mark.parametrize("scan_layers", [False, True])
def test_weights_are_split_by_rule_where_the_axes_divide_them(scan_layers):
    mesh = sharding.make_mesh("fsdp=2,tensor=4")
    model = dataclasses.replace(SMALL, d_mlp=26, scan_layers=scan_layers)
    params = jax.eval_shape(lambda: init_params(model, 0))
    specs = sharding.param_specs(params, mesh)
    block, stack = (
        (specs["layers"], (None,)) if scan_layers else (specs["layers"][1], ())
    )
    assert specs["embed"]["embedding"] == P("tensor", "fsdp")
    assert block["attention"]["query"]["kernel"] == P(*stack, "fsdp", "tensor")
    assert block["attention"]["out"]["kernel"] == P(*stack, "tensor", "fsdp")
    assert block["mlp"]["up"]["kernel"] == P(*stack, "fsdp", None)
    assert block["mlp_norm"]["scale"] == P()


@pytest.mark.parametrize(("d_mlp", "up"), [(32, (None, "fsdp")), (26, ("fsdp", None))])
def test_fsdp_alone_splits_the_axis_that_is_not_compressed(d_mlp, up):
    """The longer one, columns of a square one; the other where it does not divide."""
    mesh = sharding.make_mesh("fsdp=8")
    model = dataclasses.replace(SMALL, d_mlp=d_mlp, scan_layers=True)
    specs = sharding.param_specs(jax.eval_shape(lambda: init_params(model, 0)), mesh)
    names = lambda spec: tuple(a if a == "fsdp" else None for a in spec)
    layers = jax.tree.map(names, specs["layers"], is_leaf=lambda x: isinstance(x, P))
    assert layers["attention"]["query"]["kernel"] == (None, None, "fsdp")
    assert layers["attention"]["out"]["kernel"] == (None, None, "fsdp")
    assert layers["mlp"]["up"]["kernel"] == (None, *up)
    assert layers["mlp"]["down"]["kernel"] == (None, *up[::-1])


def test_galore_takes_stacked_layers_one_by_one(folder, tmp_path, key):
    """A stack of layers moves as its layers do, each on its own."""
    both = [
        small(folder, tmp_path, optimizer="galore", scan_layers=scan)
        for scan in (False, True)
    ]
    params = new_params(SMALL)
    grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    moved = []
    for config, tree in zip(both, (lambda x: x, stacked), strict=True):
        tx = make_optimizer(config.optim, config.train)
        state = jit(tx.init)(tree(params))
        moved.append(jit(tx.update)(tree(grads), state, tree(params))[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        stacked(moved[0]),
        moved[1],
    )


@pytest.mark.parametrize("mesh", ["data=3,fsdp=3", "data", "rows=2", "data=-1,fsdp=-1"])
def test_a_mesh_that_does_not_fit_is_refused(mesh):
    with pytest.raises(ConfigError, match="--mesh"):
        sharding.make_mesh(mesh)
    assert dict(sharding.make_mesh("fsdp=4").shape) == {
        "data": 1,
        "fsdp": 4,
        "tensor": 1,
    }


# The comparison.


def test_a_comparison_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch):
    argv = ["--variants", "adamw", "adafactor", "--learning-rates", "0.003"]
    argv += ["--out", str(tmp_path)]
    base = arguments(small(folder, tmp_path, steps=3, eval_every=1))
    at = base.index("--out")
    argv += base[:at] + base[at + 2 :]
    run, made = train_script.run, []

    def counted(config, console):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(config)
        return run(config, console)

    monkeypatch.setattr(train_script, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        compare.main(argv)
    monkeypatch.setattr(train_script, "run", run)
    result = tmp_path / "adamw" / "lr0.003-seed0" / "result.json"
    before = result.stat().st_mtime_ns
    compare.main(argv)
    assert result.stat().st_mtime_ns == before
    runs = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert len(runs) == 2
    assert all(len(run["curve"]) == 3 for run in runs)
    assert (tmp_path / "compare.md").read_text().count("**") == 4
    assert (tmp_path / "compare.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="other options"):
        compare.main([*argv, "--d-mlp", "32"])
