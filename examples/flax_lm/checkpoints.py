"""Checkpoints by Orbax: written whole or not at all, and refused unless they fit.

A checkpoint holds the training state and what the run was fixed by (the sections
of `config.FIXED_SECTIONS` and the fingerprint of the data). It goes on only under
the same, save that a run may be given more steps, and with them another length of its
schedule; where it does not, the error names the difference and the way out, and nothing
is written.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from .config import FIXED_SECTIONS, Config


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or not be written."""


def identity(config: Config, fingerprint: str) -> dict[str, Any]:
    """What a run is fixed by, as JSON; the text by its fingerprint, not its place."""
    saved = config.to_dict()
    fixed = {name: saved[name] for name in FIXED_SECTIONS}
    fixed["train"]["decay_steps"] = config.train.schedule
    fixed["data"]["data"] = fingerprint
    return fixed


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: The run's folder.
        identity: What the run is fixed by, as JSON.
        keep: How many are kept.
        position: A `grain` iterator that is saved and restored with the state.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        keep: int = 2,
        position: Any = None,
    ):
        self.folder = folder / "checkpoints"
        self.identity, self.position = identity, position
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False
        )
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "run", "data")
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
        items = {"state": ocp.args.StandardSave(state), "run": ocp.args.JsonSave(run)}
        if self.position is not None:
            items["data"] = _grain().CheckpointSave(self.position)
        args = ocp.args.Composite(**items)
        try:
            self._save(step, args)
        except Exception as error:  # Orbax raises what its storage layers raise
            whole = [s for s in self.manager.all_steps() if s != step]
            last = f"that of step {max(whole)} is whole" if whole else "there is none"
            raise CheckpointError(
                f"The checkpoint {self.folder / str(step)} cannot be written: "
                f"{_first_line(error)}. Of the earlier ones {last}. Make room there, "
                f"and go on with --resume --out {self.folder.parent}."
            ) from error

    def _save(self, step: int, args: Any) -> None:
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
        if self.position is not None:
            self._read(step, "data", _grain().CheckpointRestore(self.position))
        return state, run["seconds"]

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            args = ocp.args.Composite(**{item: how})
            return self.manager.restore(step, args=args)[item]
        except Exception as error:  # Orbax raises what its storage layers raise
            raise CheckpointError(
                f"The checkpoint {self.folder / str(step)} cannot be read: "
                f"{_first_line(error)}. {self._way_out(step)}"
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
        differences = list(_differences(*_without_growth(saved, self.identity)))
        if differences:
            raise CheckpointError(
                f"The checkpoint {self.folder / str(step)} belongs to another run: "
                f"{'; '.join(differences)}. Resume with the options it was made with "
                f"(see config.json there), or start a new run with --out."
            )


def _grain() -> Any:
    """Grain's part for Orbax, which only runs that read by it need."""
    import grain.checkpoint

    return grain.checkpoint


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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:400]}"


def _without_growth(saved: Any, wanted: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Both identities, those of a run and of the same with more steps made equal."""
    trains = [x.get("train") if isinstance(x, dict) else None for x in (saved, wanted)]
    before, now = (x if isinstance(x, dict) else {} for x in trains)
    if "decay_steps" in now and before.get("steps", now["steps"]) < now["steps"]:
        length = {name: now[name] for name in ("steps", "decay_steps")}
        saved = {**saved, "train": {**before, **length}}
    return saved, wanted


def _differences(saved: Any, wanted: Any, path: str = "") -> Any:
    """Say where two JSON trees differ, one line for each leaf."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in sorted(saved.keys() | wanted.keys()):
            below = f"{path}.{key}".lstrip(".")
            yield from _differences(saved.get(key), wanted.get(key), below)
    elif saved != wanted:
        yield f"{path} was {saved!r} and is now {wanted!r}"
