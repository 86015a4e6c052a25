"""Why features before the projection head are the better ones, and a fixed head that does its work.

Contrastive learning acts on g(f(x)) and throws the head g away. Each layer weighs features more unequally than the one
before it: in a balanced linear network the singular values after the head are the squares of those before it, so what
augmentations disrupt is faint before the head and gone behind it. A head without parameters does as well,
    g(h)_i = h_i / kappa^i,   i = 0, 1, ...

Xue, Gan, Ni, Joshi, Mirzasoleiman, "Investigating the Benefits of Projection Head for Representation Learning", 2024,
sections 4 and 6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError

CARD = Card(
    "Investigating the Benefits of Projection Head for Representation Learning",
    authors="Xue, Gan, Ni, Joshi, Mirzasoleiman",
    year=2024,
    systems=("projection_head",),
    arxiv="2403.11391",
    code="jiayini1119/projection-head-experiments@a145e06",
    licence="unknown",
    read="paper",
    keywords="projection head, contrastive learning, feature reweighting, supervised contrastive loss, effective rank",
    kinds=("pretraining",),
    goldens=("op_projection_reweight",),
    tests=("tests/papers/test_projection_head.py",),
)


class ReweightingHead(nn.Module):
    """h_i / kappa^i on the last axis: nothing to learn."""

    weights: Tensor

    def __init__(self, dim: int, kappa: float = 1.05) -> None:
        super().__init__()
        if kappa < 1:
            raise SaccadeError(f"kappa={kappa} would weigh later features more: give 1 (no weighing) or more")
        self.register_buffer("weights", kappa ** -torch.arange(dim, dtype=torch.float64))
        self.weights = self.weights.float()

    def forward(self, h: Tensor) -> Tensor:
        return h * self.weights


class SymmetricRelu(nn.Module):
    """relu(x - b) - relu(-x - b), b learned: zero in between; the identity at b = 0."""

    def __init__(self, initial: float = 0.0) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(initial))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - self.b) - F.relu(-x - self.b)


def identity_head(dim: int) -> nn.Sequential:
    """A learned head that begins as the identity: linear, symmetric ReLU, linear."""
    head = nn.Sequential(nn.Linear(dim, dim), SymmetricRelu(), nn.Linear(dim, dim))
    for layer in (head[0], head[2]):
        nn.init.eye_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return head


def mlp_head(dim: int, out_dim: int = 128, hidden: int = 2048, layers: int = 1) -> nn.Sequential:
    """The usual head: `layers` hidden layers with ReLU."""
    widths = [dim, *[hidden] * layers]
    body = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*body, nn.Linear(widths[-1], out_dim))


def spectral_contrastive(z: Tensor, other: Tensor) -> Tensor:
    """-2 E[z . z'] + E[(z . z'_j)^2] over other pictures j: views z, z' (N, d). (HaoChen et al., 2021; section 4.1.)"""
    alike = z @ other.mT
    apart = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return -2 * alike.diagonal().mean() + alike[apart].square().mean()


def feature_weights(features: Tensor, directions: Tensor) -> Tensor:
    """How strongly representations (N, d) hold known features: |covariance v| for unit directions v (K, d)."""
    centred = features - features.mean(0)
    covariance = centred.mT @ centred / len(features)
    return (covariance @ F.normalize(directions, dim=-1).mT).norm(dim=0)


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the covariance's normalised eigenvalues: from 1 (collapsed) to d. features (N, d)."""
    values = torch.linalg.svdvals(features - features.mean(0)).square()
    share = values / values.sum()
    return torch.special.entr(share).sum().exp()
