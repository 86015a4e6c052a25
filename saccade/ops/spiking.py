"""Neurons that leak, integrate and fire, over steps of time."""

from __future__ import annotations

import torch
from torch import Tensor

TAU, STEEPNESS = 2.0, 4.0  # of the membrane; of the sigmoid whose slope stands for that of the step


def fire(current: Tensor, threshold: float = 1.0) -> Tensor:
    """Spikes, 0 or 1, of leaky neurons that integrate `current` (T, ...) from rest: (T, ...).

        h_t = v_{t-1} + (x_t - v_{t-1}) / tau,   s_t = [h_t >= threshold],   v_t = (1 - s_t) h_t.

    Backwards the step has the slope of a sigmoid, and the reset none at all. The membrane is kept in float32 at least.
    """
    precise = current.float() if current.dtype in (torch.float16, torch.bfloat16) else current
    membrane: Tensor | None = None
    spikes: list[Tensor] = []
    for x in precise.unbind(0):
        potential = x / TAU if membrane is None else membrane + (x - membrane) / TAU
        spike = (potential >= threshold).to(x.dtype)
        membrane = potential * (1 - spike)
        if potential.requires_grad:
            soft = torch.sigmoid(STEEPNESS * (potential - threshold))
            spike = spike + (soft - soft.detach())
        spikes.append(spike)
    return torch.stack(spikes).to(current.dtype)
