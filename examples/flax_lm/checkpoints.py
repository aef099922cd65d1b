"""Checkpoints by Orbax: written whole or not at all, and refused unless they fit.

A checkpoint holds the training state and what the run was fixed by (the sections
of `config.FIXED_SECTIONS` and the fingerprint of the data). It goes on only under
the same; where it does not, the error names the difference and the way out, and
nothing is written.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from .config import FIXED_SECTIONS, Config


class CheckpointError(RuntimeError):
    """A run's folder or checkpoint that cannot be used."""


def identity(config: Config, fingerprint: str) -> dict[str, Any]:
    """What a run is fixed by, as JSON."""
    saved = config.to_dict()
    return {"data": fingerprint, **{name: saved[name] for name in FIXED_SECTIONS}}


def prepare_folder(config: Config) -> None:
    """Make the run's folder and save the config there.

    Raises:
        CheckpointError: If the folder holds another run, or none to resume.
    """
    _require_fitting_folder(config)
    multihost_utils.sync_global_devices("every process has looked")
    if jax.process_index() == 0 and not config.run.resume:
        if config.folder.exists():
            shutil.rmtree(config.folder)
        config.folder.mkdir(parents=True)
        config.save(config.folder / "config.json")
    multihost_utils.sync_global_devices("the folder is made")


def _require_fitting_folder(config: Config) -> None:
    folder = config.folder
    is_run = (folder / "config.json").exists()
    if config.run.resume:
        if not is_run:
            raise CheckpointError(
                f"{folder} holds no run to resume. Leave out --resume to start one, "
                f"or name the run's folder with --out."
            )
    elif is_run and not config.run.overwrite:
        raise CheckpointError(
            f"{folder} already holds a run. Give --resume to go on with it, "
            f"--overwrite to delete it and start again, or another folder with --out."
        )
    elif not is_run and folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds files but no run (no config.json), and is left alone. "
            f"Give another folder with --out."
        )


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 2):
        self.folder = folder / "checkpoints"
        self.identity = identity
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False
        )
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "run")
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()

    def save(self, step: int, state: Any, seconds: float) -> None:
        """Write a checkpoint; it counts as one only when it is whole."""
        if step == self.manager.latest_step():
            return
        run = {
            "identity": self.identity,
            "seconds": seconds,
            "checksums": checksums(state),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)
        )
        self.manager.save(step, args=args)

    def restore(self, abstract_state: Any) -> tuple[Any, float]:
        """Read the last checkpoint.

        Args:
            abstract_state: Shapes, dtypes and shardings that the state shall have;
                the mesh may differ from the one it was saved on.

        Returns:
            The state, and the seconds of training behind it.

        Raises:
            CheckpointError: If there is none, or it is broken, or another run's.
        """
        step = self.manager.latest_step()
        if step is None:
            raise CheckpointError(
                f"{self.folder} holds no whole checkpoint: the run was stopped before "
                f"its first. Start it again with --overwrite."
            )
        run = self._read(step, "run", ocp.args.JsonRestore())
        self._require_same_run(step, run.get("identity"))
        state = self._read(step, "state", ocp.args.StandardRestore(abstract_state))
        self._require_whole(step, run["checksums"], checksums(state))
        return state, run["seconds"]

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            args = ocp.args.Composite(**{item: how})
            return self.manager.restore(step, args=args)[item]
        except Exception as error:  # Orbax raises what its storage layers raise
            raise CheckpointError(
                f"The checkpoint {self.folder / str(step)} cannot be read: "
                f"{type(error).__name__}: {str(error)[:400]}. {self._way_out(step)}"
            ) from error

    def _require_whole(self, step: int, saved: Any, read: dict[str, int]) -> None:
        damaged = [name for name, value in read.items() if saved.get(name) != value]
        if damaged:
            raise CheckpointError(
                f"The checkpoint {self.folder / str(step)} is damaged: {damaged[0]} "
                f"(and {len(damaged) - 1} more arrays) are not what was saved. "
                f"{self._way_out(step)}"
            )

    def _way_out(self, step: int) -> str:
        earlier = [s for s in self.manager.all_steps() if s < step]
        if earlier:
            return f"Delete that folder to go on from step {max(earlier)}."
        return "There is no earlier one: start again with --overwrite or --out."

    def _require_same_run(self, step: int, saved: dict[str, Any]) -> None:
        differences = list(_differences(saved, self.identity))
        if differences:
            raise CheckpointError(
                f"The checkpoint {self.folder / str(step)} belongs to another run: "
                f"{'; '.join(differences)}. Resume with the options it was made with "
                f"(see config.json there), or start a new run with --out."
            )


def checksums(tree: Any) -> dict[str, int]:
    """A sum of each array's bits, weighted by position: no storage layer checks them.

    Sums of integers wrap around, so that they do not depend on the mesh.
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
    sums = jax.device_get(_checksums(jax.tree.leaves(tree)))
    return {path: int(value) for path, value in zip(paths, sums, strict=True)}


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bits, weight = x.astype(jnp.uint32), jnp.ones(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        odd = np.uint32(0x9E3779B1 * (2 * axis + 1) % 2**32)
        weight = weight * (2 * place + odd)  # odd: no bit is lost
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def _differences(saved: Any, wanted: Any, path: str = "") -> Any:
    """Say where two JSON trees differ, one line for each leaf."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in sorted(saved.keys() | wanted.keys()):
            below = f"{path}.{key}".lstrip(".")
            yield from _differences(saved.get(key), wanted.get(key), below)
    elif saved != wanted:
        yield f"{path} was {saved!r} and is now {wanted!r}"
