"""LocalMamba's orders one after the other, token by token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.textbook.mamba import scan, selected
from saccade.papers.local_mamba import LocalCrossScan, LocalMamba


def local_mamba(mixer: LocalMamba, x: Tensor) -> Tensor:
    """A selection, its gate, the next."""
    grid, total = tuple(x.shape[1:-1]), 0
    for order, selection in zip(mixer.orders, mixer.selections, strict=True):
        tokens, gate = order.line(mixer.in_proj(x)).chunk(2, -1)
        y = order.back(selected(selection, tokens) * F.silu(gate), grid)
        total = total + y * mixer.gate(y.flatten(1, -2)).view(-1, 1, 1, y.shape[-1])
    return mixer.out_proj(total)


def local_cross_scan(mixer: LocalCrossScan, x: Tensor) -> Tensor:
    """An order with projections of its own, its gate, the next."""
    grid, total = tuple(x.shape[1:-1]), 0
    inner, z = mixer.in_proj(x).chunk(2, -1)
    u = F.silu(mixer.conv(inner))
    split = (mixer.ways, -1)
    for order, weight, step, bias, rates, skip in zip(
        mixer.orders, mixer.x_proj.weight.unflatten(0, split), mixer.dt_weight, mixer.dt_bias.unflatten(0, split),
        mixer.A_log.unflatten(0, split), mixer.D.unflatten(0, split), strict=True,
    ):
        line = order.line(u)
        r, b, c = (line @ weight.T).split(mixer.split, -1)
        y = order.back(scan(line, F.softplus(r @ step.T + bias), -rates.exp(), b, c) + skip * line, grid)
        total = total + y * mixer.select(y.flatten(1, -2)).view(-1, 1, 1, y.shape[-1])
    return mixer.out_proj(mixer.norm(total) * F.silu(z))
