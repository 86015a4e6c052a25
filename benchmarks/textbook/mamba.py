"""The selective scan token by token, as the papers write it and as the authors' code computes it without a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.mamba import Mamba
from saccade.parts.ssm import Selection


def scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Decays and inputs of all tokens in memory, (B, L, E, n) each, then a loop over the tokens."""
    decay = torch.exp(dt[..., None] * a)
    taken_in = (dt * u)[..., None] * b[..., None, :]
    state, outputs = torch.zeros_like(taken_in[:, 0]), []
    for t in range(u.shape[1]):
        state = decay[:, t] * state + taken_in[:, t]
        outputs.append((state @ c[:, t, :, None]).squeeze(-1))
    return torch.stack(outputs, 1)


def selected(selection: Selection, x: Tensor) -> Tensor:
    """A selection on a sequence (B, L, E)."""
    u = F.silu(selection.conv(x))
    r, b, c = selection.x_proj(u).split(selection.split, -1)
    dt = F.softplus(selection.dt_proj(r))
    return scan(u, dt, -torch.exp(selection.A_log), b, c) + selection.D * u


def mamba(mixer: Mamba, x: Tensor) -> Tensor:
    """One selection, gated."""
    tokens, gate = mixer.in_proj(x.flatten(1, -2)).chunk(2, -1)
    return mixer.out_proj(selected(mixer.selection, tokens) * F.silu(gate)).view(x.shape)
