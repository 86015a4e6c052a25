"""Dynamic position bias: what a table of offsets would hold, computed from the offset."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.keymap import KeyMap
from saccade.ops.tables import table
from saccade.ops.window import relative_position_index


class DynamicBias(nn.Module):
    """A bias a head and offset, from an MLP of the offset in tokens: () -> (heads, N, N) for groups of N tokens.

    (Wang et al., "CrossFormer", 2021, section 3.3.)
    """

    def __init__(self, group: tuple[int, ...], heads: int, hidden: int) -> None:
        super().__init__()
        self.group = group
        layers: list[nn.Module] = [nn.Linear(len(group), hidden)]
        for width in (hidden, hidden, heads):
            layers += [nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, width)]
        self.mlp = nn.Sequential(*layers)

    def forward(self) -> Tensor:
        first: Any = self.mlp[0]
        biases = self.mlp(offsets(self.group, first.weight.dtype, first.weight.device))
        return biases[relative_position_index(self.group, biases.device)].permute(2, 0, 1)

    def cost(self) -> int:
        """Multiply-adds: the MLP's weights once for each of the prod(2 G - 1) offsets."""
        weights = sum(layer.weight.numel() for layer in self.mlp if isinstance(layer, nn.Linear))
        return prod(2 * side - 1 for side in self.group) * weights


@table
def offsets(group: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(M, rank) all M offsets between two tokens of a group, in the order of `relative_position_index`."""
    steps = [torch.arange(1 - side, side, dtype=dtype, device=device) for side in group]
    return torch.stack(torch.meshgrid(steps, indexing="ij"), -1).flatten(0, -2)


# The names of its layers in CrossFormer's code and in what was built on that.
DYNAMIC_BIAS: KeyMap = (
    (r"pos_proj\.(.*)", r"mlp.0.\1"),
    *((rf"pos{step}\.{layer}\.(.*)", rf"mlp.{3 * step - 2 + layer}.\1") for step in (1, 2, 3) for layer in (0, 2)),
)
