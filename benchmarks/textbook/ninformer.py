"""NiNformer's gate with tokens moved to the last axis and back, as in MLP-Mixer's code."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saccade.papers.ninformer import MixerGating


def mixer_gating(mixer: MixerGating, x: Tensor) -> Tensor:
    """(x W) * Mixer(x), on the native grid."""
    tokens, mlp = x.flatten(1, -2), mixer.tokens
    lines = mixer.norm1(tokens).transpose(1, 2).contiguous()
    hidden = F.gelu(F.linear(lines, mlp.reads.T, mlp.read_bias[:, 0]))
    gate = tokens + F.linear(hidden, mlp.writes, mlp.write_bias[:, 0]).transpose(1, 2)
    inner = F.gelu(mixer.channels.fc1(mixer.norm2(gate)))
    return (mixer.proj(tokens) * (gate + mixer.channels.fc2(inner))).view_as(x)
