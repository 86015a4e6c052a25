"""Vision Mamba's two directions, one after the other, token by token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.textbook.mamba import selected
from saccade.papers.vim import BidirectionalMamba


def bidirectional_mamba(mixer: BidirectionalMamba, x: Tensor) -> Tensor:
    """Each direction gated by its own z, then turned back."""
    tokens, gate = mixer.in_proj(x.flatten(1, -2)).chunk(2, -1)
    there = selected(mixer.forwards, tokens) * F.silu(gate)
    back = selected(mixer.backwards, tokens.flip(1)) * F.silu(gate.flip(1))
    return mixer.out_proj((there + back.flip(1)) / 2).view(x.shape)
