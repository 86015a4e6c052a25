"""Names: patterns that pick modules, and the closest names to an unknown one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from saccade.core.errors import SaccadeError

SIZES = {"t": "tiny", "s": "small", "b": "base", "l": "large"}
_OTHER = SIZES | {long: short for short, long in SIZES.items()}


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """The names that a shell pattern picks; `*` crosses dots."""
    return [name for name in names if fnmatchcase(name, pattern)]


def match_modules(model: nn.Module, pattern: str) -> list[str]:
    """Names of the sub-modules that `pattern` picks (`stages.2.*.mixer`); matching none is an error."""
    names = [name for name, _ in model.named_modules() if name]
    found = matching(names, pattern)
    if not found:
        kind = type(model).__name__
        raise SaccadeError(f"the pattern {pattern!r} matches no module of {kind}{closest(pattern, names)}")
    return found


def closest(name: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?`, or nothing where no known name comes near."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def spellings(name: str) -> list[str]:
    """A model name with its size written short and long: `swin_t` and `swin_tiny` are the same model."""
    parts = name.split("_")
    swapped = "_".join(_OTHER.get(part, part) for part in parts)
    return [name] if swapped == name else [name, swapped]
