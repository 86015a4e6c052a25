"""What our ports share beside `saccade.tools.port`: layouts of tokens and maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saccade.tools.port import Port, State, errors, key_map, only_input, unused

__all__ = ["Function", "Port", "State", "as_grid", "as_tokens", "channels_first", "channels_last", "errors", "key_map",
           "only_input", "unused"]


class Function(nn.Module):
    """A function without parameters as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def as_grid(grid: tuple[int, ...] | list[int]) -> Callable[[State], tuple[Tensor, ...]]:
    """The authors' tokens (B, N, C) as our grid (B, *grid, C)."""
    return lambda inputs: tuple(value.unflatten(1, tuple(grid)) for value in inputs.values())


def as_tokens(result: Tensor) -> State:
    """Our grid (B, *grid, C) as the authors' tokens (B, N, C)."""
    return {"out": result.flatten(1, -2)}


def channels_last(inputs: State) -> tuple[Tensor, ...]:
    """The authors' (B, C, *grid) as our (B, *grid, C)."""
    return tuple(value.movedim(1, -1).contiguous() for value in inputs.values())


def channels_first(result: Tensor) -> State:
    """Our (B, *grid, C) as the authors' (B, C, *grid)."""
    return {"out": result.movedim(-1, 1)}
