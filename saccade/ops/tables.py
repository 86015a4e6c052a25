"""Tables that depend on sizes alone (masks, index tables, coordinates): built once per grid, outside module state."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

P = ParamSpec("P")
T = TypeVar("T")


def table(build: Callable[P, T]) -> Callable[P, T]:
    """Cache a parameter-free table by its (hashable) arguments, which include the device and the type of its numbers.

    While compiling, exporting, or under any dispatch mode (fake tensors), sizes are symbols and tensors are not real:
    the table is then built in place and nothing is kept. Tables are never inference tensors, so that one built during
    evaluation can be used in training.
    """

    @lru_cache(maxsize=256)
    def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return build(*args, **kwargs)

    @wraps(build)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return build(*args, **kwargs)
        return kept(*args, **kwargs)  # type: ignore[arg-type]

    return get
