"""One process of a run of `examples.flax_lm.train`, under observation.

    python tests/watched_process.py NOTES KILL_AT [options of the run]

Into the folder NOTES it writes where it read which text, and its part of the state at
each checkpoint. With `--process-id 1` it dies while step KILL_AT is being saved.
"""

import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.flax_lm.checkpoints import Checkpoints
from examples.flax_lm.data import Text
from examples.flax_lm.train import main


def note(folder: Path, name: str, what: Any) -> None:
    with (folder / f"{name}.{jax.process_index()}").open("ab") as file:
        pickle.dump(what, file)


def notes(folder: Path, name: str, process: int) -> list[Any]:
    """What a process noted under a name, in order."""
    found = []
    with (folder / f"{name}.{process}").open("rb") as file:
        while file.peek(1):
            found.append(pickle.load(file))
    return found


def parts(leaf: jax.Array) -> list[tuple[Any, np.ndarray]]:
    """What this process holds of an array, and where in it."""
    return [(shard.index, np.asarray(shard.data)) for shard in leaf.addressable_shards]


def watch(folder: Path, kill_at: int) -> None:
    window, save = Text.window, Checkpoints.save

    def noted_window(self: Text, start: int, length: int) -> np.ndarray:
        note(folder, "read", (len(self), start))
        return window(self, start, length)

    def noted_save(self: Checkpoints, step: int, state: Any, seconds: float) -> None:
        note(folder, f"state{step}", [parts(leaf) for leaf in jax.tree.leaves(state)])
        if step == kill_at and jax.process_index() == 1:
            die_while_writing(self.folder, step)
        save(self, step, state, seconds)

    Text.window, Checkpoints.save = noted_window, noted_save


def die_while_writing(folder: Path, step: int) -> None:
    """As `kill -9` does, where the processes meet once the checkpoint is begun."""
    meet = multihost_utils.sync_global_devices

    def meet_or_die(name: str) -> None:
        if any(folder.glob(f"{step}.*")):  # Orbax renames the folder when it is whole
            os.kill(os.getpid(), signal.SIGKILL)
        meet(name)

    multihost_utils.sync_global_devices = meet_or_die


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]))
    main(sys.argv[3:])
