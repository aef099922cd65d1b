"""Files that are there whole or not at all, however a run ends."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write to, and move the file there at the end."""
    beside = path.with_name(f"{path.name}.tmp")
    yield beside
    beside.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole."""
    with whole(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")
