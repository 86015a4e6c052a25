"""GridPG, DiFull, DiPart: settings in which it is known where an attribution cannot be.

n x n pictures stand in one grid. A head of scores for cell k sees
    GridPG:  g(pool(f(grid))), the whole grid;
    DiFull:  g(pool(f(cell_k))), that cell alone: all else has provably no influence;
    DiPart:  g(pool(F_k)), the block k of F = f(grid): influence leaks over borders only.
All methods are asked at the same layers (ML-Att); L_k = positive attribution in cell k / that in the grid, 1 / n^2 by
chance. AggAtt shows a whole data set: maps sorted by L, averaged in bins. Smoothing repairs maps of the input.

Rao, Böhle, Schiele, "Better Understanding Differences in Attribution Methods via Systematic Evaluations", 2024.

Cells are of one size. Quirks kept: pooled weights of Grad-CAM are means over the activation of the whole grid; negative
attribution is cut off after the map was enlarged, so that it takes from its neighbours first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.parts.pyramid import Pyramid

CARD = Card(
    "Better Understanding Differences in Attribution Methods via Systematic Evaluations",
    authors="Rao, Böhle, Schiele",
    year=2024,
    systems=("attribution_evaluation",),
    arxiv="2205.10435, 2303.11884",
    code="sukrutrao/Attribution-Evaluation@15f9118",
    read="paper",
    keywords="localization, grid pointing game, GridPG, DiFull, DiPart, ML-Att, AggAtt, Grad-CAM++, LayerCAM",
    kinds=("explain",),
    goldens=("attribution_grid_resnet18_difull", "attribution_grid_resnet18_gridpg", "op_gridpg_localization"),
    tests=("tests/papers/test_attribution_evaluation.py",),
)

SETTINGS = ("gridpg", "difull", "dipart")
BINS = (0, 0.02, 0.05, 0.5, 0.95, 0.98, 1)


def cells(x: Tensor, n: int) -> Tensor:
    """(B, C, nH, nW) as its cells (n n, B, C, H, W), row by row. Raises SaccadeError where a side is no multiple."""
    if n < 1 or x.shape[2] % n or x.shape[3] % n:
        raise SaccadeError(f"a grid of {n} x {n} cells does not divide {tuple(x.shape[2:])}: make it of equal pictures")
    return x.unflatten(2, (n, -1)).unflatten(4, (n, -1)).permute(2, 4, 0, 1, 3, 5).flatten(0, 1)


def stitch(parts: Tensor, n: int) -> Tensor:
    """The inverse of `cells`."""
    return parts.unflatten(0, (n, n)).permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)


class GridSetting(nn.Module):
    """A pyramid of ours in one of the settings, split at a layer.

    `layer` 0 is the input, i the map after stage i.
    Raises SaccadeError for another setting, or a model without such stages.
    """

    def __init__(self, model: Pyramid, setting: str = "gridpg", n: int = 2) -> None:
        super().__init__()
        if setting not in SETTINGS:
            raise SaccadeError(f"setting={setting!r}: choose one of {', '.join(SETTINGS)}")
        if not isinstance(model, Pyramid):
            raise SaccadeError(f"{type(model).__name__} has no stages one after the other: take a pyramid (resnet18)")
        self.model, self.setting, self.n = model, setting, n

    def activation(self, grid: Tensor, layer: int) -> Tensor:
        """The map (B, C, h, w) after `layer`; in DiFull, cells run apart and are stitched."""
        if self.setting == "difull":
            return stitch(torch.stack([self._run(cell, 0, layer) for cell in cells(grid, self.n)]), self.n)
        return self._run(grid, 0, layer)

    def scores(self, activation: Tensor, layer: int, cell: int) -> Tensor:
        """The scores (B, classes) of the head of `cell`, from the map after `layer`."""
        last = len(self.model.stages)
        if self.setting == "difull":
            return self._classify(self._run(cells(activation, self.n)[cell], layer, last))
        whole = self._run(activation, layer, last)
        return self._classify(cells(whole, self.n)[cell] if self.setting == "dipart" else whole)

    def forward(self, grid: Tensor, cell: int = 0) -> Tensor:
        return self.scores(grid, 0, cell)

    def attribute(self, grid: Tensor, target: Tensor, cell: int, layer: int, method: str) -> Tensor:
        """The map (B, h, w) of one of `LAYER_METHODS` for class `target` (B,) of the head of `cell`, at `layer`."""
        if method not in LAYER_METHODS:
            raise SaccadeError(f"method={method!r}: choose one of {', '.join(LAYER_METHODS)}")
        with torch.enable_grad():
            activation = self.activation(grid, layer).detach().requires_grad_()
            score = self.scores(activation, layer, cell).gather(1, target[:, None])[:, 0]
            (gradient,) = torch.autograd.grad(score.sum(), activation)
        return LAYER_METHODS[method](activation.detach(), gradient, score.detach())

    def _run(self, x: Tensor, start: int, end: int) -> Tensor:
        if start == 0 and end > 0:
            x = self.model.stem(x)
        elif start < end:
            x = x.permute(0, 2, 3, 1)
        for stage in self.model.stages[start:end]:
            x = stage(x)
        return x.permute(0, 3, 1, 2) if start < end else x

    def _classify(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.model.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def _gradcam(a: Tensor, g: Tensor, score: Tensor) -> Tensor:
    return (g.mean((2, 3), keepdim=True) * a).sum(1).relu()


def _gradcam_plus_plus(a: Tensor, g: Tensor, score: Tensor) -> Tensor:
    below = 2 * g.square() + g.pow(3) * a.sum((2, 3), keepdim=True)
    alpha = g.square() / torch.where(below == 0, 1, below)
    weight = (alpha * (score.exp()[:, None, None, None] * g).relu()).sum((2, 3), keepdim=True)
    return (weight * a).sum(1).relu()


# From the activation a (B, C, h, w), its slope g and the score (B,) to a map (B, h, w).
LAYER_METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gradient": lambda a, g, score: g.abs().sum(1),
    "gradient_x_input": lambda a, g, score: (a * g).sum(1),
    "gradcam": _gradcam,
    "gradcam_plus_plus": _gradcam_plus_plus,
    "layercam": lambda a, g, score: (g.relu() * a).sum(1).relu(),
}


def positive(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w), enlarged to `size` bilinearly, then without its negative part."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0].relu()


def localization(maps: Tensor, cell: int, n: int, size: tuple[int, int]) -> Tensor:
    """L (B,): the share of positive attribution (B, h, w) inside `cell` of an n x n grid of `size`; 0 if there is none.

    Raises SaccadeError where the cells do not divide `size` or there is no such cell.
    """
    if not 0 <= cell < n * n:
        raise SaccadeError(f"cell is {cell}: a grid of {n} x {n} has the cells 0 to {n * n - 1}")
    grown = positive(maps, size)
    inside, total = cells(grown[:, None], n)[cell].sum((1, 2, 3)), grown.sum((1, 2))
    return torch.where(total > 1e-7, inside / total.clamp_min(1e-7), 0)


def aggregate(maps: Tensor, cell: int, n: int, size: tuple[int, int], bins: Sequence[float] = BINS) -> Tensor:
    """AggAtt (bins, H, W): means of the positive maps (B, h, w), best localised first, cut at the shares `bins`.

    Sorted by L, then by the attribution inside. All bins share one colour scale, up to `colour_limit` of them.
    """
    grown = positive(maps, size)
    inside = cells(grown[:, None], n)[cell].sum((1, 2, 3)).tolist()
    share = localization(maps, cell, n, size).tolist()
    order = sorted(range(len(maps)), key=lambda one: (share[one], inside[one]), reverse=True)
    cuts = [round(part * len(maps)) for part in bins]
    if any(low >= high for low, high in zip(cuts, cuts[1:], strict=False)):
        raise SaccadeError(f"{len(maps)} maps leave a bin of {tuple(bins)} empty: give more maps, or fewer bins")
    return torch.stack([grown[order[low:high]].mean(0) for low, high in zip(cuts, cuts[1:], strict=False)])


def colour_limit(aggregated: Tensor) -> float:
    """The 99.5th percentile of all bins, where their common colour scale ends."""
    return float(torch.quantile(aggregated.flatten().double(), 0.995))


def smooth(maps: Tensor, kernel: int) -> Tensor:
    """(B, H, W) under a Gaussian of `kernel` (odd) pixels with the deviation kernel / 4, zeros around."""
    if kernel < 1 or kernel % 2 == 0:
        raise SaccadeError(f"kernel is {kernel}: give an odd number of pixels")
    place = torch.arange(kernel, dtype=maps.dtype, device=maps.device) - kernel // 2
    weights = torch.softmax(-place.square() / (2 * (kernel / 4) ** 2), 0)
    x = F.conv2d(maps[:, None], weights.view(1, 1, 1, -1), padding=(0, kernel // 2))
    return F.conv2d(x, weights.view(1, 1, -1, 1), padding=(kernel // 2, 0))[:, 0]
