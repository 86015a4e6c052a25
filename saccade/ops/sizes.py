"""Arithmetic of sizes that export leaves free, in the forms that ONNX computes as Python does."""

from __future__ import annotations

from torch import Tensor


def ceil_div(size: int, part: int) -> int:
    """ceil(size / part). Not -(-size // part): ONNX rounds the quotients of negative numbers towards zero."""
    return (size + part - 1) // part


def modulo(number: Tensor, period: int) -> Tensor:
    """number mod period, for whole numbers from 0 on. Not number % period: ONNX takes no remainder by a free size."""
    return number - number // period * period
