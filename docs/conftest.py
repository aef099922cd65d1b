"""``pytest docs`` runs each block of these pages, on eight simulated devices.

A block that is skipped says why, in a comment above it: ``<!-- skip: next "..." -->``.
"""

from typing import Any

import jax
import sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_cpu_enable_async_dispatch", False)  # few cores, 8 devices

sessions = PythonCodeBlockParser()
sessions.codeblock_parser.language = "pycon"
pytest_collect_file = sybil.Sybil(
    [PythonCodeBlockParser(), sessions, SkipParser()], pattern="*.md"
).pytest()


def pytest_configure(config: Any) -> None:
    """Keep a page's blocks, which build on each other, in one process of xdist."""
    if getattr(config.option, "dist", "no") != "no":
        config.option.dist = "loadfile"
