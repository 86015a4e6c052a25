"""Adventurer's mixer on Mamba-2 in its token by token form."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.textbook.mamba2 import mamba2
from saccade.papers.patch_scaling import CausalImage


def causal_image(mixer: CausalImage, x: Tensor) -> Tensor:
    """The mean, then the tokens."""
    tokens = x.flatten(1, -2).flip(1) if mixer.backwards else x.flatten(1, -2)
    out = mamba2(mixer.scan, torch.cat([tokens.mean(1, keepdim=True), tokens], 1))[:, 1:]
    return (out.flip(1) if mixer.backwards else out).view(x.shape)
