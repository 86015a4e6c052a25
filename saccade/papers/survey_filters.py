"""Filters of a convolutional network compared: how they start, how large they are, how many there are.

A weight (O, I, h, w) has fan_in = I h w. What the survey collates, as three tables that one small network takes:
    INITIALISERS   how each layer starts: by variance (LeCun 1 / fan_in, He 2 / fan_in, Glorot 2 / (fan_in + fan_out)),
                   by structure (orthogonal, delta-orthogonal, Dirac, sparse), or by data (`lsuv`)
    SHAPES         what sees r x r pixels: one r x r, stacked 3x3, 1 x r and r x 1, dilated, depthwise and pointwise
    WIDTHS         how many in each stage: doubled, equal, pyramidal, halved
and FIRST_LAYERS, banks that nobody's labels made: principal components and k-means of patches, Gabor, cosines.

Hirani, Abdulla, "On filter design in deep convolutional neural network", 2024. Definitions: LeCun et al., "Efficient
BackProp", 1998; Glorot, Bengio, 2010; He et al., 2015; Saxe et al., 2014; Xiao et al., 2018 (delta-orthogonal);
Martens, 2010 (sparse); Mishkin, Matas, "All You Need is a Good Init", 2016 (LSUV); Coates, Ng, Lee, 2011 (k-means).

`python -m benchmarks.filters` trains them all on digits and writes the table. Biases start at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.optional import optional

cluster = optional("sklearn.cluster", extra="train")

CARD = Card(
    "On filter design in deep convolutional neural network",
    authors="Hirani, Abdulla",
    year=2024,
    systems=("survey_filters",),
    arxiv="2410.21644",
    read="abstract, fact sheet",
    keywords="survey, filter initialization, filter size, number of filters, LSUV, orthogonal, Gabor, k-means filters",
    kinds=("explain",),
    tests=("tests/papers/test_survey_filters.py",),
)


def _lecun(weight: Tensor) -> None:
    nn.init.normal_(weight, std=weight[0].numel() ** -0.5)


def _sparse(weight: Tensor, kept: int = 15) -> None:
    """`kept` entries of each filter, of the deviation that keeps the second moment under a ReLU."""
    rows = weight.flatten(1)
    kept = min(kept, rows.shape[1])
    places = torch.rand_like(rows).argsort(1)[:, :kept]
    rows.zero_().scatter_(1, places, torch.randn_like(rows[:, :kept]) * (2 / kept) ** 0.5)


def _delta_orthogonal(weight: Tensor) -> None:
    """Orthogonal at the centre tap, zero elsewhere."""
    centre = torch.empty_like(weight[:, :, 0, 0])
    nn.init.orthogonal_(centre, math.sqrt(2))
    weight.zero_()[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = centre


# What is written into a weight (O, I, h, w); with a ReLU after it, a gain of sqrt(2) keeps the second moment.
INITIALISERS: dict[str, Callable[[Tensor], object]] = {
    "he": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "glorot": nn.init.xavier_uniform_,
    "lecun": _lecun,
    "small_normal": partial(nn.init.normal_, std=0.01),
    "orthogonal": partial(nn.init.orthogonal_, gain=math.sqrt(2)),
    "delta_orthogonal": _delta_orthogonal,
    "dirac": nn.init.dirac_,
    "sparse": _sparse,
}


def initialise(model: nn.Module, name: str) -> None:
    """Start all convolutions of a model by one of `INITIALISERS`, their biases at 0."""
    if name not in INITIALISERS:
        raise SaccadeError(f"there is no initialiser {name!r}: choose one of {', '.join(INITIALISERS)}")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                INITIALISERS[name](module.weight)
                if module.bias is not None:
                    module.bias.zero_()


@torch.no_grad()
def lsuv(model: nn.Module, batch: Tensor, tolerance: float = 0.1, rounds: int = 10) -> None:
    """Orthogonal convolutions, each divided, from the first to the last, by the deviation that it gives `batch`.

    After it every convolution answers the batch with a deviation within 1 +- tolerance. Norms between would undo it.
    """
    initialise(model, "orthogonal")
    spread: list[float] = []
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        handle = module.register_forward_hook(lambda module, inputs, output: spread.append(float(output.std())))
        for _ in range(rounds):
            model(batch)
            if abs(spread[-1] - 1) < tolerance or spread[-1] == 0:
                break
            module.weight /= spread[-1]
        handle.remove()


def patches(images: Tensor, size: int) -> Tensor:
    """All patches (n, C size size) of images (B, C, H, W), each less its mean."""
    rows = F.unfold(images, size).mT.flatten(0, 1)
    return rows - rows.mean(1, keepdim=True)


def principal_filters(rows: Tensor, count: int) -> Tensor:
    """The eigenvectors (count, n) of the covariance of patches, of the largest eigenvalue first.

    Where there are fewer than `count`, they come again with the other sign. What is constant is left out.
    """
    values, vectors = torch.linalg.eigh(rows.double().T @ rows.double() / len(rows))
    basis = vectors.flip(1)[:, values.flip(0) > 1e-9 * values[-1]].T
    return torch.cat([basis, -basis] * -(-count // (2 * len(basis))))[:count].to(rows)


def kmeans_filters(rows: Tensor, count: int, seed: int = 0) -> Tensor:
    """k-means centroids (count, n) of patches of one contrast, whitened, each of length 1.

    Without whitening they would be blurs, all alike.
    """
    live = rows[rows.norm(dim=1) > 1e-3 * rows.norm(dim=1).max()].double()
    live = live / live.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(live.T @ live / len(live))
    white = vectors @ torch.diag((values.clamp_min(0) + 0.1 * values.mean()).rsqrt()) @ vectors.T
    found = cluster.MiniBatchKMeans(count, random_state=seed, n_init=1).fit((live @ white).numpy())
    return F.normalize(torch.from_numpy(found.cluster_centers_), dim=1).to(rows)


def gabor_filters(count: int, size: int, ratio: float = 0.5) -> Tensor:
    """exp(-(u^2 + ratio^2 v^2) / 2 s^2) cos(2 pi u / l + phase), (count, size, size), of mean 0 and length 1.

    u, v: the place, turned. Turns go evenly over pi, for two phases (even, odd); l is `size`, s half of it.
    """
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(place, place, indexing="ij")
    turns = max(1, -(-count // 2))
    found = []
    for phase in (0.0, math.pi / 2):
        for turn in range(turns):
            angle = math.pi * turn / turns
            u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
            wave = torch.exp(-(u**2 + (ratio * v) ** 2) / (size**2 / 2)) * torch.cos(2 * math.pi * u / size + phase)
            found.append(F.normalize((wave - wave.mean()).flatten(), dim=0).view(size, size))
    return torch.stack(found)[:count].float()


def cosine_filters(size: int) -> Tensor:
    """The orthonormal two-dimensional cosine (DCT-II) basis (size^2, size, size), slow waves first."""
    place = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * (2 / size) ** 0.5
    waves[0] /= math.sqrt(2)
    order = sorted(((i, j) for i in range(size) for j in range(size)), key=lambda ij: (sum(ij), ij))
    return torch.stack([torch.outer(waves[i], waves[j]) for i, j in order]).float()


# From images (B, C, H, W) without labels, how many filters and their size to a bank (count, C, size, size).
FIRST_LAYERS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "principal": lambda x, count, size: _bank(principal_filters(patches(x, size), count), x, size),
    "kmeans": lambda x, count, size: _bank(kmeans_filters(patches(x, size), count), x, size),
    "gabor": lambda x, count, size: _repeated(gabor_filters(count, size), x, count),
    "cosine": lambda x, count, size: _repeated(cosine_filters(size)[1:], x, count),
}


def _bank(rows: Tensor, images: Tensor, size: int) -> Tensor:
    return rows.view(len(rows), images.shape[1], size, size)


def _repeated(bank: Tensor, images: Tensor, count: int) -> Tensor:
    """One filter for all colours; where there are fewer than `count`, again with the other sign."""
    whole = torch.cat([bank, -bank] * -(-count // (2 * len(bank))))[:count]
    return whole[:, None].expand(-1, images.shape[1], -1, -1) / images.shape[1] ** 0.5


def _conv(dim: int, out: int, size: int | tuple[int, int], **options: Any) -> nn.Conv2d:
    return nn.Conv2d(dim, out, size, padding="same", **options)


# From channels in and out to what a block has for a convolution.
SHAPES: dict[str, Callable[[int, int], nn.Module]] = {
    "3x3": lambda dim, out: _conv(dim, out, 3),
    "5x5": lambda dim, out: _conv(dim, out, 5),
    "7x7": lambda dim, out: _conv(dim, out, 7),
    "3x3 twice": lambda dim, out: nn.Sequential(_conv(dim, out, 3), nn.ReLU(), _conv(out, out, 3)),
    "1x5, 5x1": lambda dim, out: nn.Sequential(_conv(dim, out, (1, 5)), _conv(out, out, (5, 1))),
    "3x3 dilated": lambda dim, out: _conv(dim, out, 3, dilation=2),
    "5x5 depthwise, 1x1": lambda dim, out: nn.Sequential(_conv(dim, dim, 5, groups=dim), _conv(dim, out, 1)),
    "1x1": lambda dim, out: _conv(dim, out, 1),
}

# Filters in each of three stages; all but "quarter", "half" and "twice" have about the parameters of "doubled".
WIDTHS: dict[str, tuple[int, int, int]] = {
    "doubled": (16, 32, 64), "equal": (36, 36, 36), "pyramidal": (24, 36, 48), "halved": (56, 34, 17),
    "quarter": (4, 8, 16), "half": (8, 16, 32), "twice": (32, 64, 128),
}


class FilterNet(nn.Module):
    """Three stages of `depth` times (shape, norm, ReLU), a 2x2 pooling between them, the mean, a linear layer."""

    def __init__(
        self, classes: int, shape: str = "3x3", width: str = "doubled", depth: int = 1, norm: bool = True,
        in_chans: int = 1,
    ) -> None:
        super().__init__()
        for name, table in ((shape, SHAPES), (width, WIDTHS)):
            if name not in table:
                raise SaccadeError(f"there is no {name!r}: choose one of {', '.join(table)}")
        layers: list[nn.Module] = []
        dim = in_chans
        for stage, out in enumerate(WIDTHS[width]):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(depth):
                layers += [SHAPES[shape](dim, out), *([nn.BatchNorm2d(out)] if norm else []), nn.ReLU()]
                dim = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(image).mean((2, 3)))
        return scores
