"""CNN Filter DB: what the 3x3 filters of a trained network look like, and how far two sets of them are apart.

Rows F (n, 9) are the n = out x in filters of a layer. With the singular values s of F, centred by column,
    v_i = s_i^2 / sum s^2,   entropy H = -sum v_i log10 v_i,   threshold T(n) = L / (1 + exp(-k (log2 n - x0))) + b;
H / T(n) >= 1 is what random filters have, a low H means that all are alike. A filter is dead where all its entries are
within 1 % of the layer's largest. Two sets are compared on one basis: D = sum_i v_i (KL(P_i, Q_i) + KL(Q_i, P_i)).

Gavrikov, Keuper, "CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters", 2022, sections 4-5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError

CARD = Card(
    "CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters",
    authors="Gavrikov, Keuper",
    year=2022,
    systems=("filter_db",),
    arxiv="2203.15331",
    code="paulgavrikov/torchconvquality@e820fdb",
    read="paper",
    keywords="3x3 filter statistics, sparsity, variance entropy, orthogonality, distribution shift, degenerate filters",
    kinds=("explain",),
    goldens=("op_filter_quality",),
    tests=("tests/papers/test_filter_db.py",),
)

DEAD = 0.01  # of the layer's largest entry
_L, _X0, _K, _B = 1.2618047, 2.30436435, 0.88767525, -0.31050834


@dataclass(frozen=True)
class Quality:
    """One layer: how many filters, share of dead ones, entropies (of the live ones too), orthogonality, norms.

    `normalised_*` is the entropy over its threshold for random filters; `standardised_*` are norms of the weight after
    its mean and (unbiased) deviation were taken out.
    """

    filters: int
    sparsity: float
    entropy: float
    normalised_entropy: float
    live_entropy: float
    normalised_live_entropy: float
    orthogonality: float
    standardised_l2: float
    standardised_l1: float
    l2: float
    l1: float


def filter_quality(weight: Tensor) -> Quality:
    """The statistics of one layer's weight (out, in, 3, 3). Raises SaccadeError for another shape."""
    rows = _rows(weight)
    live = rows.abs().amax(1) >= DEAD * rows.abs().max() if bool(rows.any()) else torch.zeros(len(rows)).bool()
    whole, alive = variance_entropy(rows), variance_entropy(rows[live])
    flat = weight.detach().double().flatten()
    standard = (flat - flat.mean()) / flat.std()
    return Quality(
        len(rows), 1 - float(live.double().mean()), whole, whole / random_entropy(len(rows)), alive,
        alive / random_entropy(int(live.sum())) if live.any() else 0.0, orthogonality(weight),
        float(standard.norm()), float(standard.abs().sum()), float(flat.norm()), float(flat.abs().sum()),
    )


def model_quality(model: nn.Module) -> dict[str, Quality]:
    """`filter_quality` of every 3x3 convolution, by its name. Raises SaccadeError where there is none."""
    found = {name: filter_quality(module.weight) for name, module in model.named_modules()
             if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)}
    if not found:
        raise SaccadeError("the model has no 3x3 convolution: filter statistics are made of these alone")
    return found


def variance_entropy(rows: Tensor) -> float:
    """-sum v_i log10 v_i of rows (n, 9): 0 where all vary along one pattern, log10 9 where along all alike."""
    if len(rows) < 2:
        return 0.0
    variance = torch.linalg.svdvals(rows - rows.mean(0)).square()
    if float(variance.sum()) == 0:
        return 0.0
    share = variance / variance.sum()
    return float(-torch.special.xlogy(share, share).sum() / math.log(10))


def random_entropy(count: int) -> float:
    """T(n), the entropy from which n filters cannot be told from random ones."""
    return _L / (1 + math.exp(-_K * (math.log2(count) - _X0))) + _B


def orthogonality(weight: Tensor) -> float:
    """1 - mean |cosine| between the filters (in, 3, 3) of two output channels."""
    rows = nn.functional.normalize(weight.detach().double().flatten(1), dim=1)
    count = len(rows)
    if count < 2:
        return 1.0
    return 1 - float((rows @ rows.T - torch.eye(count, dtype=rows.dtype)).abs().sum()) / (count * (count - 1))


def filter_shift(first: Tensor, second: Tensor, bins: int = 70, least: float = 1e-6) -> float:
    """D between two sets of filters (out, in, 3, 3), each divided by its largest entry: 0 for equal sets, symmetric.

    The basis is that of both sets together; the coefficients stand in `bins` bins over their common range, and `least`
    is added to each bin, so that an empty one stays finite.
    """
    scaled = [_rows(weight) / _rows(weight).abs().max().clamp_min(1e-12) for weight in (first, second)]
    # Both sets weigh the same, however many filters each has.
    mean = (scaled[0].mean(0) + scaled[1].mean(0)) / 2
    spread = sum((rows - mean).T @ (rows - mean) / len(rows) for rows in scaled)
    assert isinstance(spread, Tensor)
    variance, basis = torch.linalg.eigh(spread)
    share = variance.clamp_min(0) / variance.clamp_min(0).sum().clamp_min(1e-12)
    total = 0.0
    for part, axis in zip(share.tolist(), basis.T, strict=True):
        places = [(rows - mean) @ axis for rows in scaled]
        low, high = float(torch.cat(places).min()), float(torch.cat(places).max())
        p, q = (torch.histc(place, bins, low, high) / len(place) + least for place in places)
        p, q = p / p.sum(), q / q.sum()
        total += part * float(((p - q) * (p / q).log()).sum())
    return total


def _rows(weight: Tensor) -> Tensor:
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise SaccadeError(f"the weight has the shape {tuple(weight.shape)}: give a 3x3 convolution's, (out, in, 3, 3)")
    return weight.detach().double().reshape(-1, 9)
