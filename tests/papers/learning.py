"""What tests of pre-training learn from, and how."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ramps(count: int, side: int = 32) -> Tensor:
    """(count, 3, S, S): gray pictures that brighten evenly, each in a direction and at a rate of its own."""
    ramp = torch.linspace(-1, 1, side)
    return torch.stack([(ramp[:, None] * a + ramp * b).expand(3, -1, -1) for a, b in torch.randn(count, 2)])


def losses(method: nn.Module, images: Tensor, steps: int, rate: float = 3e-3) -> list[float]:
    """The loss of an objective at each step of AdamW on these images."""
    optimizer = torch.optim.AdamW(method.parameters(), rate)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = method(images)["loss"]
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found
