"""Large depthwise kernels that train beside dilated small ones and merge with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.parts.convolution import depthwise
from saccade.parts.norm import BatchNorm
from saccade.parts.reparameterize import affine_of


class DilatedBranches(nn.Module):
    """bn(conv_k(x)) + the sum of dilated branches, each with its bn: (B, *grid, C) -> (B, *grid, C).

    `branches` are (kernel, dilation) pairs that reach no farther than `kernel`. `deployed()` is the one depthwise
    convolution that this equals in evaluation. (Ding et al., UniRepLKNet, 2024, section 3.1.)
    """

    ranks = (1, 2, 3)

    def __init__(self, site: Site, kernel: int, branches: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.kernel, self.rank = kernel, site.rank
        self.shapes = {"origin": (kernel, 1)} | {f"k{side}_{dilation}": (side, dilation) for side, dilation in branches}
        self.branches = nn.ModuleDict({
            name: nn.Sequential(depthwise(site.rank, site.dim, *shape, bias=False), BatchNorm(site.dim))
            for name, shape in self.shapes.items()
        })

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches.values()
        out = first(x)
        for branch in others:
            out = out + branch(x)
        return out

    @torch.no_grad()
    def deployed(self) -> nn.Module:
        branches: Any = self.branches
        kernel = torch.zeros_like(branches.origin[0].weight)
        bias = torch.zeros_like(branches.origin[1].bias)
        for name, (side, dilation) in self.shapes.items():
            branch = branches[name]
            scale, shift = affine_of(branch[1])
            edge = (self.kernel - (side - 1) * dilation - 1) // 2
            places: Any = (..., *[slice(edge, self.kernel - edge, dilation)] * self.rank)
            kernel[places] += branch[0].weight * scale.view(-1, *[1] * (self.rank + 1))
            bias += shift
        conv = depthwise(self.rank, len(bias), self.kernel)
        conv.weight, conv.bias = nn.Parameter(kernel), nn.Parameter(bias)
        return conv

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of the form that trains: N C (the sum of all kernels^rank); deployed, the largest alone."""
        return torch.Size(grid).numel() * site.dim * sum(side**site.rank for side, _ in self.shapes.values())

    def reach(self, site: Site) -> tuple[int, ...]:
        return (self.kernel // 2,) * site.rank


DILATED: KeyMap = (
    (r"lk_origin\.(.*)", r"branches.origin.0.\1"),
    (r"origin_bn\.(.*)", r"branches.origin.1.\1"),
    (r"dil_conv_(k\d+_\d+)\.(.*)", r"branches.\1.0.\2"),
    (r"dil_bn_(k\d+_\d+)\.(.*)", r"branches.\1.1.\2"),
)  # the names of UniRepLKNet's code
