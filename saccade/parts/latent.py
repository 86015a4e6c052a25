"""The layer of a latent branch: latents read a map, a map reads latents, or latents read each other.

(Jaegle et al., "Perceiver IO: A General Architecture for Structured Inputs & Outputs", 2022, appendix E.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.ops.attend import attend
from saccade.parts.mlp import Gelu, Mlp


class LatentLayer(nn.Module):
    """x += proj(Attend(q(norm(x)), k(norm(y)) [+ position], v(norm(y)))); x += mlp(norm(x)): x (B, N, C), y (B, M, C').

    Without `other` y is x. `width` channels are compared, in `heads`; `keys` is the number of y's that have positions.
    """

    undecayed: tuple[str, ...] = ()

    def __init__(
        self, dim: int, other: int | None = None, width: int | None = None, heads: int = 1, ratio: int = 1,
        keys: int = 0,
    ) -> None:
        super().__init__()
        width = width or dim
        if width % heads:
            raise SaccadeError(f"{heads} heads do not divide {width} channels; choose a divisor")
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm_other = None if other is None else nn.LayerNorm(other)
        self.q = nn.Linear(dim, width, bias=False)
        self.k, self.v = (nn.Linear(other or dim, width, bias=False) for _ in range(2))
        self.proj = nn.Linear(width, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, ratio, Gelu)
        self.position = nn.Parameter(torch.zeros(1, keys, width)) if keys else None
        if keys:
            self.undecayed = ("position",)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        queries = self.norm1(x)
        read = queries if self.norm_other is None else self.norm_other(y)
        k = self.k(read) if self.position is None else self.k(read) + self.position
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q(queries), k, self.v(read)))
        x = x + self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


# The names that implementations of Perceiver IO give to the parts of a layer.
LATENT_NAMES: KeyMap = (
    (r"(?:self|cross)_attn\.(?:q_)?norm\.(.*)", r"norm1.\1"),
    (r"cross_attn\.kv_norm\.(.*)", r"norm_other.\1"),
    (r"(?:self|cross)_attn\.attention\.relative_position_bias", "position"),
    (r"(?:self|cross)_attn\.attention\.([qkv])_proj\.(.*)", r"\1.\2"),
    (r"(?:self|cross)_attn\.attention\.o_proj\.(.*)", r"proj.\1"),
    (r"mlp\.layernorm\.(.*)", r"norm2.\1"),
    (r"mlp\.(fc[12]\..*)", r"mlp.\1"),
)
