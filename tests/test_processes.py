"""Two processes train together on the CPU: as one would, also after one was killed.

The tests share two runs of a pair, in one folder: of the first, a process is killed
while the checkpoint of step 6 is written; the second goes on from that of step 3.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import watched_process
from helpers import assert_trees_bitwise_equal

from examples.flax_lm import checkpoints, data, report
from examples.flax_lm.command_line import parse
from examples.flax_lm.config import Config
from examples.flax_lm.program import Program

ROOT = Path(__file__).parents[1]
STEPS, SAVED, KILL_AT, ROWS = 8, 3, 6, 4
OPTIONS = [
    *("--d-model=16", "--n-layers=1", "--n-heads=4", "--n-kv-heads=2", "--d-mlp=24"),
    *("--rank=4", f"--steps={STEPS}", f"--batch-size={ROWS}", "--context=16"),
    *("--eval-every=4", "--eval-tokens=64", "--log-every=1", "--sample-tokens=8"),
    "--diagnostics-every=0",
    *(f"--checkpoint-every={SAVED}", "--no-progress"),
]


class Pair(NamedTuple):
    """A run of two processes that has ended, as far as it got."""

    config: Config
    codes: list[int | None]
    """Exit codes; None: had to be ended."""
    told: str
    notes: Path
    rows: list[dict[str, Any]]
    """Those of metrics.csv."""

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def run_pair(out: Path, notes: Path, options: list[str], kill_at: int = 0) -> Pair:
    notes.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [*OPTIONS, f"--out={out}", "--mesh=fsdp=2", *options]
    options += [f"--coordinator={address}", "--num-processes=2"]
    command = [sys.executable, watched_process.__file__, str(notes), str(kill_at)]
    logs = [notes / f"log.{number}" for number in (0, 1)]
    with contextlib.ExitStack() as stack:
        pair = []
        for number, log in enumerate(logs):
            process = subprocess.Popen(
                [*command, *options, f"--process-id={number}"],
                env=environment(address, out.parent / "compiled"),
                stdout=stack.enter_context(log.open("wb")),
                stderr=subprocess.STDOUT,
            )
            pair.append(stack.enter_context(process))
            stack.callback(process.kill)
        wait(any, pair, seconds=600)
        wait(all, pair, seconds=60)
        codes = [process.poll() for process in pair]
    told = "\n".join(log.read_text(errors="replace") for log in logs)
    rows = report.read_metrics(out / "metrics.csv")
    return Pair(parse(options), codes, told, notes, rows)


def environment(address: str, compiled: Path) -> dict[str, str]:
    """One CPU device in each process, nothing but loopback."""
    path = os.pathsep.join([*filter(None, [os.getenv("PYTHONPATH")]), str(ROOT)])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def wait(
    enough: Callable[[Iterable[bool]], bool],
    processes: list[subprocess.Popen],
    seconds: float,
) -> None:
    """Until enough of the processes have ended, or the time is over."""
    end = time.monotonic() + seconds
    while not enough(p.poll() is not None for p in processes):
        if time.monotonic() > end:
            return
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Process 1 is killed while it saves."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "text").mkdir()
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    random = np.random.default_rng(0)
    for i in range(40):
        text = " ".join(random.choice(words, size=60))
        (folder / "text" / f"{i:02}.txt").write_text(text + "\n")
    options = [f"--data={folder / 'text'}", "--heartbeat-timeout=15"]
    pair = run_pair(folder / "run", folder / "killed", options, KILL_AT)
    assert pair.codes[1] == -signal.SIGKILL, pair.told
    return pair


@pytest.fixture(scope="module")
def left(killed: Pair) -> Path:
    """A copy of what the killed run left."""
    folder = killed.config.folder.with_name("left")
    return shutil.copytree(killed.config.folder, folder)


@pytest.fixture(scope="module")
def resumed(killed: Pair, left: Path) -> Pair:
    """Both processes again, after `left` has its copy."""
    folder, options = killed.config.folder, [f"--data={killed.config.data.data}"]
    options += ["--resume", "--heartbeat-timeout=100"]
    pair = run_pair(folder, folder.with_name("resumed"), options)
    assert pair.codes == [0, 0], pair.told
    return pair


def alone(pair: Pair, *options: str) -> Config:
    """The pair's config for one process, on one device unless told otherwise."""
    options = (f"--data={pair.config.data.data}", "--mesh=data=1", *options)
    return parse([*OPTIONS, *options])


@pytest.fixture(scope="module")
def program(killed: Pair) -> Program:
    """The pair's program, on one device of this process."""
    program = Program(alone(killed))
    program.compile()
    return program


def corpus_of(config: Config) -> data.Corpus:
    return data.load_corpus(config.data.data, config.train.context)


def run_alone(program: Program, state: Any) -> tuple[list[float], list[float]]:
    """Training and validation losses from this state on, as `run_steps` has them."""
    corpus, losses, valid = corpus_of(program.config), [], []
    source = data.ByteData(corpus, program.batch_shape, program.rows)
    for step in range(int(state.step), STEPS):
        state, loss = program.train_step(state, program.batch(source, step))
        losses.append(float(loss))
        if (step + 1) % program.config.report.eval_every == 0:
            valid.append(program.validate(state.params, source)["valid_loss"])
    return losses, valid


def restored(config: Config) -> Any:
    same = checkpoints.identity(config, corpus_of(config).fingerprint)
    with checkpoints.Checkpoints(config.folder, same) as saved:
        return saved.restore(Program(config).abstract_state)[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_process_ends_the_other_and_the_run_goes_on(killed, left, resumed):
    """The other one ends with an error within the timeout (`wait` in `run_pair`)."""
    assert killed.codes[0] not in (0, None), killed.told
    assert killed.values("step") == list(range(1, KILL_AT + 1))
    whole, begun = names(left / "checkpoints")
    assert whole == str(SAVED)
    assert begun.startswith(f"{KILL_AT}.")

    assert f"Resumed after step {SAVED}" in resumed.told
    assert resumed.values("step") == list(range(1, STEPS + 1))
    assert names(killed.config.folder / "checkpoints") == [str(KILL_AT), str(STEPS)]
    twice = slice(SAVED, KILL_AT)
    a, b = (pair.values("train_loss")[twice] for pair in (killed, resumed))
    assert a == b


def test_two_processes_have_the_losses_of_one_and_share_the_reading(
    resumed, program, monkeypatch
):
    """Each step's rows are read once: the first half here, the second one there."""
    read, window = [], data.Text.window
    listed = lambda *args: read.append((len(args[0]), args[1])) or window(*args)
    monkeypatch.setattr(data.Text, "window", listed)
    losses, valid = run_alone(program, program.init())
    np.testing.assert_allclose(resumed.values("train_loss"), losses, rtol=1e-5)
    np.testing.assert_allclose(resumed.values("valid_loss"), valid, rtol=1e-5)

    size = len(corpus_of(program.config).train)
    rows = lambda reads: np.array([start for text, start in reads if text == size])
    noted = (watched_process.notes(resumed.notes, "read", p) for p in (0, 1))
    first, second = map(rows, noted)
    halves = [part.reshape(-1, ROWS // 2) for part in (first, second)]
    np.testing.assert_array_equal(
        np.concatenate(halves, axis=1), rows(read).reshape(-1, ROWS)[SAVED:]
    )
    assert not set(first) & set(second)


def test_their_checkpoint_is_restored_bit_for_bit_onto_other_meshes(
    killed, left, resumed, program
):
    """What process 0 and process 1 held, put together, is what one process reads."""
    meshes = ("data=1", "data=2,fsdp=2,tensor=2")
    one, eight = (
        restored(alone(killed, f"--out={left}", f"--mesh={mesh}")) for mesh in meshes
    )
    assert int(one.step) == SAVED
    for state, count in ((one, 1), (eight, 8)):
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {count}

    whole = jax.tree.map(lambda x: np.full(x.shape, -1, x.dtype), one)
    halved = 0
    held = [watched_process.notes(killed.notes, f"state{SAVED}", p)[0] for p in (0, 1)]
    for leaf, *processes in zip(jax.tree.leaves(whole), *held, strict=True):
        for index, part in (part for parts in processes for part in parts):
            leaf[index] = part
            halved += part.size * 2 == leaf.size
    assert halved > 20  # no process alone could have written them
    for state in (one, eight):
        assert_trees_bitwise_equal(state, whole)

    losses, _ = run_alone(program, one)
    np.testing.assert_allclose(losses, resumed.values("train_loss")[SAVED:], rtol=1e-5)
