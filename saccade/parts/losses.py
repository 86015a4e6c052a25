"""Losses that several papers train with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.errors import SaccadeError


def supervised_contrastive(z: Tensor, labels: Tensor, temperature: float = 0.5) -> Tensor:
    """mean_i (log sum_{j != i} e^s_ij - mean of s_ij over the others of i's label), s the cosine / temperature.

    z (N, d), labels (N,), at least two of each that counts: an example without a partner is left out. With one label a
    picture, for its views, this is the self-supervised loss. (Khosla et al., "Supervised Contrastive Learning", 2020.)
    """
    z = F.normalize(z, dim=-1)
    similar, itself = z @ z.mT / temperature, torch.eye(len(z), dtype=torch.bool, device=z.device)
    partners = (labels[:, None] == labels) & ~itself
    paired = partners.any(1)
    if not bool(paired.any()):
        raise SaccadeError("no example has another of its label: give two views of each picture, or labels that repeat")
    spread = similar.masked_fill(itself, -torch.inf).logsumexp(1)
    pull = (similar * partners).sum(1) / partners.sum(1).clamp(min=1)
    return (spread - pull)[paired].mean()
