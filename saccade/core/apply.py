"""Methods that make a trained model compute less, by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from saccade.core.errors import SaccadeError
from saccade.core.index import method, method_with
from saccade.core.swap import Handle

KIND = "token reduction"


def apply(model: nn.Module, name: str, **options: Any) -> Handle:
    """Turn a model, ours or timm's, into one that computes less: `handle = apply(model, "evit", keep=0.7)`.

    The model is changed in place and keeps the names of its parameters (a method may add its own); `handle.undo()` puts
    the very same modules back. Raises SaccadeError for an unknown method or option, and for a host that the method
    does not understand.
    """
    handle: Handle = method_with(name, KIND, options)(model, **options)
    return handle


def parse_method(text: str, kind: str = KIND) -> tuple[str, dict[str, Any]]:
    """`NAME:key=value,key=value` as a method of a kind and its options: "evit:keep=0.7,layers=(3,6)" -> "evit", {...}.

    Values are numbers, truth values, lists in brackets, or words. Raises SaccadeError for what is not so written, and
    for an unknown method.
    """
    name, _, rest = text.strip().partition(":")
    method(name, kind)
    options: dict[str, Any] = {}
    for part in _parts(rest):
        key, mark, value = (piece.strip() for piece in part.partition("="))
        if not (key.isidentifier() and mark and value) or key in options:
            raise SaccadeError(f"method {text!r}: {part.strip()!r} is no option; write {name}:key=value,key=value")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            if not re.fullmatch(r"[\w./-]+", value):  # a list without commas, options with colons between
                raise SaccadeError(f"method {text!r}: {value!r} is no value; write a number, a word or a list as in "
                                   f"{name}:layers=(3,6),keep=0.7") from None
            options[key] = value
    return name, options


def split_methods(text: str) -> tuple[str, ...]:
    """Methods with commas between, as on a command line: "evit:keep=0.7,layers=(3,6),token_merging:r=8" is two."""
    found: list[str] = []
    for part in _parts(text):
        if found and "=" in part.partition(":")[0]:  # an option of the method before it
            found[-1] += f",{part.strip()}"
        else:
            found.append(part.strip())
    return tuple(found)


def _parts(text: str) -> Iterator[str]:
    """Pieces between commas that stand in no bracket."""
    depth, start = 0, 0
    for place, letter in enumerate(f"{text},"):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth <= 0:
            if text[start:place].strip():
                yield text[start:place]
            start = place + 1
    if start <= len(text) and text[start:].strip():  # a bracket that nobody closed
        yield text[start:]
