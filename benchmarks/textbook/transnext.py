"""TransNeXt's attentions with windows copied and weights written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.parts.aggregated import AggregatedAttention, CosineAttention


def cosine_heads(mixer: CosineAttention, x: Tensor) -> Tensor:
    """What each head gives each token, (B, N, h, d): all N x N weights in memory."""
    B, H, W, C = x.shape
    q, k, v = mixer.qkv(x).view(B, H * W, 3, mixer.heads, -1).permute(2, 0, 3, 1, 4)
    q = F.normalize(q, dim=-1) + mixer.query_embedding
    q = q * F.softplus(mixer.temperature) * torch.tensor(H * W, dtype=x.dtype).log()
    weights = (q @ F.normalize(k, dim=-1).transpose(-2, -1) + mixer.bias((H, W), (H, W))).softmax(-1)
    return (weights @ v).transpose(1, 2)


def cosine_attention(mixer: CosineAttention, x: Tensor) -> Tensor:
    """The heads, projected."""
    return mixer.proj(cosine_heads(mixer, x).reshape(x.shape))


def aggregated_heads(mixer: AggregatedAttention, x: Tensor) -> Tensor:
    """Likewise, with unfolded keys and values: a copy of the map for each place of the window."""
    B, H, W, C = x.shape
    N, h, size = H * W, mixer.heads, mixer.window
    cells = tuple(max(side // mixer.ratio, 1) for side in (H, W))
    unit = F.normalize(mixer.q(x).view(B, N, h, -1).transpose(1, 2), dim=-1)
    seen = F.unfold(x.new_ones(1, 1, H, W), size, padding=size // 2)[0].T > 0
    length = (seen.sum(-1) + cells[0] * cells[1]).to(x.dtype).log()[:, None]
    q = (unit + mixer.query_embedding) * F.softplus(mixer.temperature) * length

    def unfolded(part: Tensor) -> Tensor:
        columns = F.unfold(part.flatten(3).permute(0, 3, 1, 2), size, padding=size // 2)
        return columns.view(B, h, C // h, size**2, N).permute(0, 1, 4, 3, 2)

    k, v = mixer.kv(x).view(B, H, W, 2, h, -1).unbind(3)
    k, v = unfolded(F.normalize(k, dim=-1)), unfolded(v)
    near = ((k @ q[..., None]).squeeze(-1) + mixer.local_bias[:, None]).masked_fill(~seen, -torch.inf)
    pooled = F.adaptive_avg_pool2d(F.gelu(mixer.reduce(x)).permute(0, 3, 1, 2), cells).flatten(2).transpose(1, 2)
    k_far, v_far = mixer.kv(mixer.norm(pooled)).view(B, -1, 2, h, C // h).permute(2, 0, 3, 1, 4)
    far = q @ F.normalize(k_far, dim=-1).transpose(-2, -1) + mixer.bias((H, W), cells)
    weights = torch.cat([near, far], -1).softmax(-1)
    near, far = weights[..., : size**2], weights[..., size**2:]
    near = near + unit @ mixer.tokens + mixer.token_bias
    return ((near[..., None, :] @ v).squeeze(-2) + far @ v_far).transpose(1, 2)


def aggregated_attention(mixer: AggregatedAttention, x: Tensor) -> Tensor:
    """The heads, projected."""
    return mixer.proj(aggregated_heads(mixer, x).reshape(x.shape))
