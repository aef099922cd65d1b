"""Docstrings here are Sphinx's where griffe and Markdown have words of their own."""

import re
from collections.abc import Callable
from typing import Any

import griffe
from latex2mathml.converter import convert


def link(match: re.Match[str]) -> str:
    """A name as code, and as a link where the reference has it."""
    name = match[1]
    target = f'identifier="ldadam_optax.{name}"'
    return f"<autoref {target} optional><code>{name}</code></autoref>"


def formula(match: re.Match[str]) -> str:
    """A formula within a line."""
    return f"<span>{convert(match[1])}</span>"  # else a block at the start of a line


def equations(match: re.Match[str]) -> str:
    """Lines of their own, as they are aligned."""
    aligned = rf"\begin{{align*}}{match[1]}\end{{align*}}"
    return f"<p>{convert(aligned, display='block')}</p>"


#: Sphinx's markup, and what becomes of it.
RULES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"(?m)^(\s*)Example:$", r"\1Examples:"),  # rendered as code
    (r":(?:class|data|func):`([^`]+)`", link),
    (r":math:`([^`]+)`", formula),
    (r"(?m)^ *\.\. math::\s((?:.+\n)+)", equations),
]


class DocstringsExtension(griffe.Extension):
    """Apply the rules to every object that has a docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring before it is parsed."""
        if obj.docstring:
            for pattern, replacement in RULES:
                obj.docstring.value = re.sub(pattern, replacement, obj.docstring.value)
