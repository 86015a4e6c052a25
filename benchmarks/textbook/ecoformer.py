"""Kernelized hashing attention with all differences to the anchors and all similarities of codes in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.papers.ecoformer import KernelizedHashing


def kernelized_hashing(mixer: KernelizedHashing, x: Tensor) -> Tensor:
    """(S S^T + b + 1) / (its row sums) v, but the shift on the diagonal alone above the line; S the codes, N x b."""
    B, *_, C = x.shape
    qk, v = (layer(x).view(B, -1, mixer.heads, C // mixer.heads).transpose(1, 2) for layer in (mixer.qk, mixer.v))
    unit = qk / qk.norm(dim=-1, keepdim=True)
    distance = (unit[..., None, :] - mixer.hash.anchors[:, None]).square().sum(-1)
    kernel = torch.exp(-distance / (2 * distance.mean((-2, -1), keepdim=True)))
    projected = (kernel - mixer.hash.mean) @ mixer.hash.weight.transpose(-2, -1)
    hard = projected.clamp(-1, 1)
    codes = projected.sign().detach() + hard - hard.detach()  # the gradient passes the sign
    similarity, shift = codes @ codes.transpose(-2, -1), codes.shape[-1] + 1
    own = shift * torch.eye(similarity.shape[-1], dtype=x.dtype)
    out = (similarity + own) / (similarity + shift).sum(-1, keepdim=True) @ v
    return mixer.proj(out.transpose(1, 2).reshape(x.shape))
