"""What heads do: which matter, how far they look, and which patterns they know.

Importance (L, H): a head of a layer is put out (what it gives, A V, times 0: here its weights A times 0), and seen is
    drop    by how much the class's probability falls,  p_y(x) - p_y(x; out),
    moved   how far the answer moves,                   JS(p(x), p(x; out)), natural logarithm, 0 to ln 2,
    turned  how the vector that is classified turns,    1 - cos(z(x), z(x; out)),
    alone   what it keeps of the class by itself:       p_y(x; all other heads of its layer out).
Distance: rings around a patch, k = max(rows apart, columns apart), and the attention that falls into each,
    S[h, k] = mean over patches i of the sum over j in ring k of A[h][i, j].
Patterns: the maps A of all heads as small pictures, an autoencoder's code of each, and groups of codes.

Li, Wang, Dai, Wang, Yeh, Zheng, Zhang, Ma, "How Does Attention Work in Vision Transformers? A Visual Analytics
Attempt", 2023.

From the abstract and a summary: the metrics, the ring's distance, the autoencoder's sizes and k-means are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.evaluation import evaluation
from saccade.core.record import record
from saccade.parts.scores import scores

CARD = Card(
    "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
    authors="Li, Wang, Dai, Wang, Yeh, Zheng, Zhang, Ma",
    year=2023,
    systems=("vit_analytics",),
    arxiv="2303.13731",
    read="fact sheet",
    keywords="head importance, pruning heads, attention strength by distance, attention patterns, autoencoder",
    kinds=("explain",),
    tests=("tests/papers/test_vit_analytics.py",),
)

METRICS = ("drop", "moved", "turned", "alone")
SIDE, CODE, CHANNELS = 32, 16, (16, 32, 64)  # of a map as the autoencoder sees it, of its code, of its layers


@torch.no_grad()
def importance(
    model: nn.Module, image: Tensor, target: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, dict[str, Tensor]]:
    """{metric of METRICS: {layer: (heads,)}}, means over the pictures (B, C, H, W) and their classes `target` (B,).

    Works for every model whose attention `record` sees and whose output comes of it. Raises SaccadeError for others.
    """
    with evaluation(model), record(model) as found:
        whole, read = _answer(model, image)
        sizes = {name: affinity.parts[0].weights.shape[1] for name, affinity in found.affinities.items()
                 if all(part.weights.ndim == 4 for part in affinity.parts)}
        if not sizes:
            raise SaccadeError("no attention weights were computed: heads need a network with softmax attention")
    before = whole.gather(1, target[:, None])[:, 0]
    result = {metric: {name: torch.zeros(heads) for name, heads in sizes.items()} for metric in METRICS}
    total, done, changed = 2 * sum(sizes.values()), 0, False
    for name, heads in sizes.items():
        for head in range(heads):
            for alone in (False, True):
                keep = torch.arange(heads, device=image.device) != head
                keep = (~keep if alone else keep)[:, None, None]

                def change(at: str, weights: Tensor, name: str = name, keep: Tensor = keep) -> Tensor:
                    return weights * keep if at == name else weights

                with evaluation(model), record(model, change=change):
                    chances, vector = _answer(model, image)
                changed |= not torch.equal(chances, whole)
                after = chances.gather(1, target[:, None])[:, 0]
                if alone:
                    result["alone"][name][head] = after.mean()
                else:
                    result["drop"][name][head] = (before - after).mean()
                    result["moved"][name][head] = divergence(whole, chances).mean()
                    result["turned"][name][head] = (1 - F.cosine_similarity(read, vector, dim=1)).clamp(min=0).mean()
                done += 1
                progress(done, total)
    if not changed:
        raise SaccadeError(f"the scores of {type(model).__name__} do not come of the weights that are seen: its heads "
                           "cannot be put out")
    return result


def _answer(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (B, classes), and the vectors (B, C) that the last linear layer reads."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].ndim == 2:
            seen.append(inputs[0])

    handles = [module.register_forward_pre_hook(keep) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        chances = scores(model, image).softmax(1)
    finally:
        for handle in handles:
            handle.remove()
    return chances, seen[-1] if seen else chances


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of rows (B, classes): (B,), 0 to ln 2."""
    middle = (p + q) / 2
    return 0.5 * sum(torch.special.xlogy(one, one / middle.clamp(min=1e-38)).sum(1) for one in (p, q))


@dataclass(frozen=True)
class Reach:
    """By head: `rings` (heads, K), each the attention there; `even`, that for each patch of the ring; the `prefix`'s.

    The sum of rings and prefix is 1. `distance` (heads,) is the expected k of what is not the prefix's.
    """

    rings: Tensor
    even: Tensor
    prefix: Tensor

    @property
    def distance(self) -> Tensor:
        k = torch.arange(self.rings.shape[1], device=self.rings.device)
        return (self.rings * k).sum(1) / self.rings.sum(1).clamp(min=1e-12)


def reach(weights: Tensor, prefix: int, grid: tuple[int, int]) -> Reach:
    """How far the patches' heads look: weights (B, heads, P + N, P + N), rows that ask, prefix first, N of the grid."""
    places = torch.cartesian_prod(*(torch.arange(side, device=weights.device) for side in grid))
    ring = (places[:, None] - places).abs().amax(-1)
    asks = weights[:, :, prefix:].mean(0)
    inside = asks[..., prefix:]
    sums = inside.new_zeros(*inside.shape[:2], max(grid)).scatter_add_(2, ring.expand_as(inside), inside)
    count = torch.zeros(len(ring), max(grid), device=ring.device).scatter_add_(1, ring, torch.ones_like(ring).float())
    there = (count > 0).sum(0).clamp(min=1)
    even = (sums / count.clamp(min=1)).sum(1) / there
    return Reach(sums.mean(1), even, asks[..., :prefix].sum(-1).mean(1))


class Autoencoder(nn.Module):
    """Maps (n, 1, 32, 32) -> codes (n, 16) -> maps."""

    def __init__(self) -> None:
        super().__init__()
        small, widths = SIDE // 2 ** len(CHANNELS), (1, *CHANNELS)
        self.encoder = nn.Sequential(
            *(layer for a, b in zip(widths, CHANNELS, strict=False) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())),
            nn.Flatten(), nn.Linear(CHANNELS[-1] * small * small, CODE))
        self.decoder = nn.Sequential(
            nn.Linear(CODE, CHANNELS[-1] * small * small), nn.Unflatten(1, (CHANNELS[-1], small, small)),
            *(layer for a, b in zip(widths[::-1], widths[-2::-1], strict=False)
              for layer in (nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, 1))))

    def forward(self, maps: Tensor) -> Tensor:
        return self.decoder(self.encoder(maps))


@dataclass(frozen=True)
class Patterns:
    """Of each map its code (n, 16), place in the plane (n, 2) and group (n,); the part that is left unexplained."""

    codes: Tensor
    plane: Tensor
    group: Tensor
    error: float


def patterns(maps: Sequence[Tensor], groups: int = 6, steps: int = 300, seed: int = 0) -> Patterns:
    """Groups of attention maps (N, N), of any N each, by the codes of an autoencoder trained on them.

    Maps are averaged down to 32 x 32 and spread to [0, 1]. The plane is that of the codes' two main components. Random
    state is left as found. Raises SaccadeError for fewer maps than groups.
    """
    if not 1 <= groups <= len(maps):
        raise SaccadeError(f"{groups} groups of {len(maps)} maps: give at least as many maps as groups")
    x = torch.stack([F.adaptive_avg_pool2d(one.detach().float().cpu()[None], SIDE) for one in maps])
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    x = (x - low) / (high - low).clamp(min=1e-12)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Autoencoder()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(steps):
            batch = x[torch.randint(len(x), (min(64, len(x)),))]
            loss = F.mse_loss(model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        codes = model.encoder(x)
        error = F.mse_loss(model(x), x) / (x - x.mean(0)).square().mean().clamp(min=1e-12)
    centred = codes - codes.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    return Patterns(codes, centred @ axes.T, _grouped(codes, groups), float(error))


def _grouped(codes: Tensor, groups: int) -> Tensor:
    """k-means from the farthest points on: groups (n,), the largest first."""
    centres = codes.mean(0, keepdim=True)
    for number in range(groups):
        farthest = codes[torch.cdist(codes, centres).amin(1).argmax()][None]
        centres = farthest if number == 0 else torch.cat([centres, farthest])
    for _ in range(50):
        group = torch.cdist(codes, centres).argmin(1)
        centres = torch.stack([codes[group == one].mean(0) if (group == one).any() else centres[one]
                               for one in range(groups)])
    group = torch.cdist(codes, centres).argmin(1)
    order = torch.bincount(group, minlength=groups).argsort(descending=True, stable=True)
    return order.argsort()[group]
