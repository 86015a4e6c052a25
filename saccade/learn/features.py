"""What a model hands to its classifier, and how much of its room it uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError


def features(model: nn.Module, images: Any) -> Tensor:
    """(B, C, *size), or {modality: tensor} -> (B, D): model(images) where num_classes is 0, else forward_features.

    Maps and tokens are averaged. Raises SaccadeError where a model has neither.
    """
    if getattr(model, "num_classes", None) == 0:
        return pooled(model(images))
    if not hasattr(model, "forward_features"):
        raise SaccadeError(f"{type(model).__name__} has no features to probe: build it with num_classes=0")
    return pooled(model.forward_features(images))  # type: ignore[operator]


def pooled(found: Tensor) -> Tensor:
    """(B, D), tokens (B, N, D) or a map (B, D, *grid) -> (B, D)."""
    return found if found.ndim == 2 else found.mean(1) if found.ndim == 3 else found.flatten(2).mean(2)


def spread(found: Tensor) -> dict[str, float]:
    """Of features (N, D): `feature_std`, over pictures and averaged over channels, and `effective_rank`.

    Both fall, to 0 and to 1, where features collapse to one point or one line. The rank is exp of the entropy of the
    singular values of the centred features, over their sum (Roy, Vetterli, "The Effective Rank", 2007).
    """
    values = torch.linalg.svdvals((found - found.mean(0)).double())
    shares = values / values.sum().clamp(min=1e-12)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return {"feature_std": float(found.std(0).mean()), "effective_rank": float(entropy.exp())}
