"""Token mixers in their plain textbook form, one file a paper.

A function has the name of the mixer and takes the mixer itself: `form(mixer, x)` computes `mixer(x)` with the mixer's
own parameters the way one writes it from the paper (unfolded windows, materialised softmax, full masks): for readers,
for `tests/test_textbook.py`, which compares the two, and for `benchmarks/mixers.py`, which measures them side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from saccade import list_mixers


@cache
def forms() -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """The textbook form of each mixer that has one."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    modules = [import_module(f"{__name__}.{file.stem}") for file in files]
    return {name: getattr(module, name) for module in modules for name in list_mixers() if hasattr(module, name)}
