"""Mamba-2's recurrence token by token, one decay a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.mamba2 import Mamba2


def mamba2(mixer: Mamba2, x: Tensor) -> Tensor:
    """A loop over the tokens, whose state is (B, heads, channels, n)."""
    inner, convolved, heads = mixer.split
    gate, inputs, steps = mixer.in_proj(x.flatten(1, -2)).split(mixer.split, -1)
    tokens, b, c = F.silu(mixer.conv(inputs)).split((inner, (convolved - inner) // 2, (convolved - inner) // 2), -1)
    tokens = tokens.unflatten(-1, (heads, -1))
    b, c = (value.unflatten(-1, (mixer.groups, -1)).repeat_interleave(heads // mixer.groups, 2) for value in (b, c))
    dt = F.softplus(steps + mixer.dt_bias)
    decay = torch.exp(-dt * mixer.A_log.exp())
    state, outputs = 0, []
    for t in range(tokens.shape[1]):
        taken_in = (dt[:, t, :, None] * tokens[:, t])[..., None] * b[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + taken_in
        outputs.append((state @ c[:, t, :, :, None]).squeeze(-1))
    y = torch.stack(outputs, 1) + mixer.D[:, None] * tokens
    return mixer.out_proj(mixer.norm(y.flatten(2) * F.silu(gate))).view(x.shape)
