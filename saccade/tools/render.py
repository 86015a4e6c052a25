"""Pages of HTML and Markdown from the templates beside this file."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from saccade.tools.report_figures import percent


def render(template: str, **values: Any) -> str:
    """The template with its values; text is escaped, but in Markdown; an unknown name is an error."""
    environment = Environment(loader=FunctionLoader(_source), autoescape=not template.endswith(".md.jinja"),
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "breakable": _breakable}
    return environment.get_template(template).render(**values)


def _source(name: str) -> str:
    return files("saccade.tools").joinpath(name).read_text(encoding="utf-8")


def _breakable(text: str) -> Markup:
    """Long names may break after a joint, not in the middle of a word."""
    return Markup("").join(escape(part) + Markup("<wbr>") * (part in "_-/.") for part in re.split(r"([_/.-])", text))
