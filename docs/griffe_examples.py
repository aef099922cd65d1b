"""Docstrings here say ``Example:``; griffe's parser knows ``Examples:``."""

import re
from typing import Any

import griffe


class ExamplesExtension(griffe.Extension):
    """Rename the section, so that its doctests are rendered as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename it in every object that has a docstring."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", text)
