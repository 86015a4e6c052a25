"""TokenFormer's attention with all its weights, to tokens and to parameters, written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.papers.tokenformer import Pattention, TokenformerAttention


def pattention(layer: Pattention, x: Tensor) -> Tensor:
    """gelu(sqrt(n) s / |s|) V, s = x K^T."""
    scores = x @ layer.keys.T
    return F.gelu(scores / torch.sqrt((scores**2).sum(-1, keepdim=True)) * layer.pairs**0.5) @ layer.values


def tokenformer_attention(mixer: TokenformerAttention, x: Tensor) -> Tensor:
    tokens = x.flatten(1, -2)
    q, k, v = (pattention(layer, tokens).unflatten(-1, (mixer.heads, -1)).transpose(1, 2)
               for layer in (mixer.query, mixer.key, mixer.value))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return pattention(mixer.proj, (weights @ v).transpose(1, 2).flatten(2)).view(x.shape)
