"""Kolmogorov-Arnold layers: a learned function on each edge from an input to an output, instead of a weight.

    out_o = sum over inputs i of f_oi(x_i),   f_oi = a weighted sum of basis functions on a grid of knots.
(Liu et al., "KAN: Kolmogorov-Arnold Networks", 2024, section 2.) A network is an `nn.Sequential` of layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.parts.mlp import WHOLE


class SplineKanLayer(nn.Module):
    """out_o = sum_i (w_oi silu(x_i) + s_oi sum_k c_oik B_k(x_i)): (..., I) -> (..., O), B_k splines of a degree.

    The knots cut [low, high] into `cells` and go on for `degree` cells on either side; `grid` (I, knots) holds them for
    each input, as those adapted to data differ. Beyond the outermost knots every B_k is 0. `scaled=False` leaves the
    s_oi out. Raises SaccadeError for an empty range. (Liu et al., 2024, equations 2.10-2.11; the scales as in
    Blealtan's efficient-kan, https://github.com/Blealtan/efficient-kan, MIT.)
    """

    grid: Tensor

    def __init__(
        self, dim: int, out_dim: int, cells: int = 5, degree: int = 3, low: float = -1.0, high: float = 1.0,
        scaled: bool = True,
    ) -> None:
        super().__init__()
        if cells < 1 or degree < 0 or low >= high:
            raise SaccadeError(f"{cells} cells of degree {degree} from {low} to {high}: give at least one cell, a "
                               "degree of at least 0, and a range that grows")
        self.degree = degree
        knots = torch.arange(-degree, cells + degree + 1) * ((high - low) / cells) + low
        self.register_buffer("grid", knots.expand(dim, -1).contiguous())
        self.base_weight = nn.Parameter(torch.empty(out_dim, dim))
        self.spline_weight = nn.Parameter(torch.empty(out_dim, dim, cells + degree))
        self.spline_scaler = nn.Parameter(torch.ones(out_dim, dim)) if scaled else None
        nn.init.xavier_normal_(self.base_weight)
        nn.init.normal_(self.spline_weight, std=0.1)  # functions near 0, as the paper's start

    def forward(self, x: Tensor) -> Tensor:
        splines: Tensor = self.spline_weight
        if self.spline_scaler is not None:
            splines = splines * self.spline_scaler[..., None]
        base = F.linear(F.silu(x), self.base_weight)
        return base + F.linear(b_splines(x, self.grid, self.degree).flatten(-2), splines.flatten(1))


def b_splines(x: Tensor, knots: Tensor, degree: int) -> Tensor:
    """(..., I) and knots (I, K) -> (..., I, K - 1 - degree), every B-spline of the degree at x (Cox and de Boor).

        B_k^0 = 1 where t_k <= x < t_(k+1), else 0
        B_k^p = (x - t_k) / (t_(k+p) - t_k) B_k^(p-1) + (t_(k+p+1) - x) / (t_(k+p+1) - t_(k+1)) B_(k+1)^(p-1)
    """
    x = x[..., None]
    basis = ((x >= knots[:, :-1]) & (x < knots[:, 1:])).to(x.dtype)
    for power in range(1, degree + 1):
        rising = (x - knots[:, : -power - 1]) / (knots[:, power:-1] - knots[:, : -power - 1])
        falling = (knots[:, power + 1:] - x) / (knots[:, power + 1:] - knots[:, 1:-power])
        basis = rising * basis[..., :-1] + falling * basis[..., 1:]
    return basis


class KanLayer(nn.Module):
    """W b(norm(x)), b the bumps 1 - tanh^2((x_i - g) / width) of each input at each knot g: (..., I) -> (..., O).

    (Delis, FasterKAN, 2024: the reflectional switch functions.)
    """

    grid: Tensor

    def __init__(
        self, dim: int, out_dim: int, low: float = -2.0, high: float = 2.0, knots: int = 8, width: float = 0.33
    ) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("grid", torch.linspace(low, high, knots))
        self.linear = nn.Linear(dim * knots, out_dim, bias=False)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        free = not all(isinstance(side, int) for side in x.shape)  # sizes that export leaves open cannot choose
        if free or torch.is_grad_enabled() or torch.compiler.is_compiling():
            bumps = 1 - ((x[..., None] - self.grid) / self.width).tanh().square()
            return self.linear(bumps.flatten(-2))
        # Bumps are as many times wider than the map as there are knots: take them in pieces that stay in the cache.
        pieces = x.flatten(0, -2).split(max(WHOLE // self.linear.in_features, 1))
        return torch.cat([self.linear(self._bumps(piece)) for piece in pieces]).view(*x.shape[:-1], -1)

    def _bumps(self, x: Tensor) -> Tensor:
        switch = ((x / self.width)[..., None] - self.grid / self.width).tanh_()
        return torch.addcmul(switch.new_ones(()), switch, switch, value=-1, out=switch).flatten(-2)
