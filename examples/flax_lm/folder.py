"""A run's folder: made, gone on with, or deleted, and never one that is not a run's.

A run marks its folder by a file of its own. `--overwrite` deletes nothing without it,
and then file by file, those alone whose names a run gives; one file of any other name
and nothing at all is deleted.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from .config import Config

MARKER = "flax_lm.run"
_MARK = (
    "A run of examples.flax_lm.train. --overwrite deletes the files it has written.\n"
)

# What a run writes, by path in its folder; Orbax names what is below a checkpoint.
_ORBAX = r"(\.orbax-checkpoint-tmp(-\d+)?)?"
_WRITTEN = re.compile(
    "|".join(
        (
            r"(config|result|tokenizer)\.json(\.tmp)?|metrics\.csv|memory\.txt",
            r"loss\.png|sample\.txt|diagnostics\.(csv|png)",
            r"tensorboard/events\.out\.tfevents\.[^/]+",
            rf"checkpoints/\d+{_ORBAX}/(_CHECKPOINT_METADATA|commit_success\.txt)",
            rf"checkpoints/\d+{_ORBAX}/(run|data){_ORBAX}/[^/]+",
            rf"checkpoints/\d+{_ORBAX}/state{_ORBAX}/(_METADATA|_sharding|manifest\.ocdbt"
            r"|commit_success\.txt|array_metadatas/process_\d+"
            r"|(ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]+))",
        )
    )
)


class FolderError(RuntimeError):
    """A folder that a run cannot use, or cannot write to."""


def prepare_folder(config: Config) -> None:
    """Make the run's folder and save the config there.

    Raises:
        FolderError: If it holds another run, or files of others, or none to resume.
    """
    old = _require_fitting_folder(config)
    multihost_utils.sync_global_devices("every process has looked")
    if jax.process_index() == 0 and not config.run.resume:
        _delete(config.folder, old)
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / MARKER).write_text(_MARK)
        config.save(config.folder / "config.json")
    multihost_utils.sync_global_devices("the folder is made")


def is_run(folder: Path) -> bool:
    """Whether a run has marked the folder as its own."""
    marker = folder / MARKER
    return marker.is_file() and marker.read_bytes() == _MARK.encode()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into a FolderError that tells the way out."""
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"The run cannot go on: {error}. If the disk of {folder} is full, make "
            f"room and go on with --resume from the last checkpoint; or give another "
            f"folder with --out."
        ) from error


def refuse_file(folder: Path) -> None:
    """Raise a FolderError where a file is in the way of the folder."""
    if taken := next((p for p in (folder, *folder.parents) if p.is_file()), None):
        raise FolderError(
            f"--out must be a folder: {taken} is a file. Give another with --out."
        )


def _require_fitting_folder(config: Config) -> list[Path]:
    """What has to be deleted first: files and folders, the deepest last."""
    folder, run = config.folder, config.run
    refuse_file(folder)
    if run.resume:
        if not is_run(folder):
            raise FolderError(
                f"{folder} holds no run to resume. Leave out --resume to start one, "
                f"or name the run's folder with --out."
            )
        return []
    if is_run(folder) and not run.overwrite:
        raise FolderError(
            f"{folder} already holds a run. Give --resume to go on with it, "
            f"--overwrite to delete it and start again, or another folder with --out."
        )
    found = sorted(folder.rglob("*"))
    if found and not is_run(folder):
        raise FolderError(
            f"{folder} holds files but no run (no {MARKER}), and is left alone. "
            f"Give another folder with --out."
        )
    for path in found:
        if not _is_of_a_run(folder, path):
            raise FolderError(
                f"{path} was not written by a run: nothing is deleted. Move it away, "
                f"or give another folder with --out."
            )
    return found


def _is_of_a_run(folder: Path, path: Path) -> bool:
    if path.is_symlink():
        return False
    name = path.relative_to(folder).as_posix()
    return path.is_dir() or name == MARKER or bool(_WRITTEN.fullmatch(name))


def _delete(folder: Path, found: list[Path]) -> None:
    """The marker last: what is left by an interruption is still known as a run's."""
    marker = folder / MARKER
    for path in reversed(found):  # what is in a folder before the folder
        if path.is_dir():
            path.rmdir()
        elif path != marker:
            path.unlink()
    marker.unlink(missing_ok=True)
