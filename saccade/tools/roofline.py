"""The least time a forward can take: its arithmetic, or its bytes at the rate of a copy.

Multiply-adds go at the rate of a matrix product, the states of selective scans, which no product can make, at that of
an exponential and a multiply-add of numbers in the cache. Not counted, so that the time is a lower bound: Fourier
transforms, sorting, softmax, norms, activations, and the decays that the matrices of `ops.scan.ssd` hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from saccade.ops.scan import counted_states
from saccade.tools.measure import without_data_or_real

_ROWS, _WIDTH, _FLOATS, _CACHED, _TOKENS = 3136, 384, 2**24, 2**15, 32


class Rates(NamedTuple):
    """What this machine does in a second, with the threads that are set, in float32: multiply-adds of a product, bytes
    copied, states of a scan.
    """

    macs: float
    bytes: float
    states: float


def yardsticks() -> dict[str, Callable[[], Any]]:
    """What to `race` beside models: a product of (3136, 384) and (384, 1536), a copy of 64 MiB, and 2^15 states of a
    scan, state <- 2^x state + input, for 32 tokens.
    """
    x, weight, block = torch.randn(_ROWS, _WIDTH), torch.randn(_WIDTH, 4 * _WIDTH), torch.empty(_FLOATS)
    exponents, inputs = -torch.rand(_CACHED), torch.randn(_CACHED)

    def scan() -> Tensor:
        state, decay = torch.zeros(_CACHED), torch.empty(_CACHED)
        for _ in range(_TOKENS):
            torch.exp2(exponents, out=decay)
            torch.addcmul(inputs, decay, state, out=state)
        return state

    return {"product": partial(torch.mm, x, weight), "copy": block.clone, "scan": scan}


def rates(seconds: Mapping[str, Sequence[float]]) -> Rates:
    """The machine's rates in the rounds of a race with `yardsticks`; a copied byte is read and written."""
    return Rates(4 * _ROWS * _WIDTH**2 / median(seconds["product"]), 8 * _FLOATS / median(seconds["copy"]),
                 _TOKENS * _CACHED / median(seconds["scan"]))


def scan_states(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """States that the selective scans of a forward take through their tokens: tokens x channels x numbers a channel."""
    return without_data_or_real(_scanned, model, inputs)


def _scanned(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    with torch.no_grad(), counted_states() as states:
        model.eval()(*inputs)
    return sum(states)


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


def floor(macs: int, moved: int, at: Rates, states: int = 0) -> float:
    """Seconds: the longer of the arithmetic's (products', then scans') and the bytes'."""
    return max(macs / at.macs + states / at.states, moved / at.bytes)
