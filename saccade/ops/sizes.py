"""Arithmetic of sizes that export leaves free, in the forms that ONNX computes as Python does."""

from __future__ import annotations

import torch
from torch import Tensor


def ceil_div(size: int, part: int) -> int:
    """ceil(size / part). Not -(-size // part): ONNX rounds the quotients of negative numbers towards zero."""
    return (size + part - 1) // part


def modulo(number: Tensor, period: int) -> Tensor:
    """number mod period, for whole numbers from 0 on. Not number % period: ONNX takes no remainder by a free size."""
    return number - number // period * period


def larger(one: int, other: int) -> int:
    """max, without a guard on sizes left free. Of numbers Python's: torch 2.9 compiles no `torch.sym_max` of them."""
    known = isinstance(one, int) and isinstance(other, int)
    return max(one, other) if known else torch.sym_max(one, other)  # type: ignore[return-value]


def smaller(one: int, other: int) -> int:
    """min, as `larger`."""
    known = isinstance(one, int) and isinstance(other, int)
    return min(one, other) if known else torch.sym_min(one, other)  # type: ignore[return-value]
