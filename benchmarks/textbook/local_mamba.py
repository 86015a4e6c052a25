"""LocalMamba's orders one after the other, token by token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.textbook.mamba import selected
from saccade.papers.local_mamba import LocalMamba


def local_mamba(mixer: LocalMamba, x: Tensor) -> Tensor:
    """A selection, its gate, the next."""
    grid, total = tuple(x.shape[1:-1]), 0
    for order, selection in zip(mixer.orders, mixer.selections, strict=True):
        tokens, gate = order.line(mixer.in_proj(x)).chunk(2, -1)
        y = order.back(selected(selection, tokens) * F.silu(gate), grid)
        total = total + y * mixer.gate(y.flatten(1, -2)).view(-1, 1, 1, y.shape[-1])
    return mixer.out_proj(total)
