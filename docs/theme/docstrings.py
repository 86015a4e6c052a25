"""How the reference reads docstrings: as those of the papers, formulas indented and signs as they are."""

from __future__ import annotations

from typing import Any

import griffe

from saccade.tools.website import prose


class Prose(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = prose(obj.docstring.value)
