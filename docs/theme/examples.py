"""An extension of Griffe: the doctests that our docstrings have under ``Example:`` are shown as code."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section to the one that Griffe knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring as it is shown."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^( *)Example::$", r"\1For example:", text, flags=re.MULTILINE)
