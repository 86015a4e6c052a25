"""The least time a forward can take: its arithmetic at the rate of a matrix product, or its bytes at that of a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from saccade.tools.measure import without_data_or_real

_ROWS, _WIDTH, _FLOATS = 3136, 384, 2**24


class Rates(NamedTuple):
    """What this machine does in a second, with the threads that are set: float32 multiply-adds, bytes copied."""

    macs: float
    bytes: float


def yardsticks() -> dict[str, Callable[[], Any]]:
    """What to `race` beside models: a product of (3136, 384) and (384, 1536), and a copy of 64 MiB."""
    x, weight, block = torch.randn(_ROWS, _WIDTH), torch.randn(_WIDTH, 4 * _WIDTH), torch.empty(_FLOATS)
    return {"product": partial(torch.mm, x, weight), "copy": block.clone}


def rates(seconds: Mapping[str, Sequence[float]]) -> Rates:
    """The machine's rates in the rounds of a race with `yardsticks`; a copied byte is read and written."""
    return Rates(4 * _ROWS * _WIDTH**2 / median(seconds["product"]), 8 * _FLOATS / median(seconds["copy"]))


def moved_bytes(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Bytes that the layers with weights read and write: their inputs, weights and outputs, each once.

    What stands between them (attention, gates, activations) is taken for fused, so that this is a lower bound.
    """
    return without_data_or_real(_moved, model, inputs)


def _moved(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    total = 0

    def count(module: nn.Module, given: Any, output: Any) -> None:
        nonlocal total
        tensors = [*tree_leaves(given), *tree_leaves(output), *module.parameters(recurse=False)]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None and next(module.children(), None) is None:
            module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(*inputs)
    return total


def floor(macs: int, moved: int, at: Rates) -> float:
    """Seconds: the longer of the arithmetic's and the bytes'."""
    return max(macs / at.macs, moved / at.bytes)
