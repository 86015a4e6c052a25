"""Attention of a class token alone: what networks put after their last block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.core.site import Site
from saccade.ops.attend import attend
from saccade.parts.attention import check_heads
from saccade.parts.block import LAYER_NORM, Norm
from saccade.parts.mlp import Mlp
from saccade.parts.tokens import token_numbers


class ClassAttention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d)) v), q of the first token, k and v of all: (B, N, C) -> (B, 1, C).

    (Touvron et al., "Going deeper with Image Transformers", 2021, section 3.)
    """

    weights = True

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(Site(dim, heads))
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        q = self.q(tokens[:, :1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

        def where() -> tuple[Tensor, Tensor]:
            return token_numbers(1, tokens.device), token_numbers(tokens.shape[1], tokens.device)

        return self.proj(attend(q, k, v, where=where).transpose(1, 2).flatten(2))


class ClassBlock(nn.Module):
    """t += attention(norm(t, x)); t += mlp(norm(t)) for the first token t; the others, x, pass: (B, N, C) -> same."""

    def __init__(
        self, dim: int, heads: int, ratio: float = 4.0, qkv_bias: bool = True, norm: Norm = LAYER_NORM
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attention = ClassAttention(dim, heads, qkv_bias)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, ratio)

    def forward(self, tokens: Tensor) -> Tensor:
        first = tokens[:, :1] + self.attention(self.norm1(tokens))
        first = first + self.mlp(self.norm2(first))
        return torch.cat([first, tokens[:, 1:]], 1)
