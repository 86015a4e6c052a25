"""Packages that are needed only when something of theirs is used."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from saccade.core.errors import SaccadeError


class Optional(ModuleType):
    """Stands for a package until an attribute is touched: imports it then, or names the extra to install."""

    def __init__(self, name: str, extra: str) -> None:
        super().__init__(name)
        self.__dict__["_extra"] = extra

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # doctest, inspect and pickle look around; that is no use of the package
            raise AttributeError(attribute)
        name = self.__name__
        if find_spec(name.partition(".")[0]) is None:
            raise SaccadeError(f'{name} is not installed: pip install "saccade[{self._extra}]"')
        return getattr(import_module(name), attribute)


def optional(name: str, extra: str) -> Any:
    """The module `name`, imported at its first use; without it, an error that names the extra to install."""
    return Optional(name, extra)
