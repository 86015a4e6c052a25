"""ToMe: merge the tokens that are most alike, a few in every block, without training.

Between attention and MLP the tokens are split into two sets A and B, taken in turns. Each of A draws an edge to the
most alike of B (cosine of their keys, the mean over heads). The r strongest edges merge, into the mean of what they
join, weighted by the number s of patches that a token stands for. Such a token counts s times as a key,
    attention = softmax(q k^T / sqrt(d) + log s),
so that a merged token is looked at as much as its patches were. Prefix tokens are never merged.

Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, "Token Merging: Your ViT But Faster", 2023, section 3.

Any host of prefix and grid tokens, with or without a class token. At most half of the grid tokens go in a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.swap import Handle
from saccade.ops.attend import attend
from saccade.parts.host import HostBlock, gathered, open_blocks

CARD = Card(
    "Token Merging: Your ViT But Faster",
    authors="Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman",
    year=2023,
    arxiv="2210.09461",
    code="facebookresearch/ToMe",
    licence="CC-BY-NC-4.0",
    read="paper",
    keywords="token merging, bipartite soft matching, proportional attention, training-free",
    kinds=("token reduction",),
    methods={"token_merging": "token_merging"},
    tests=("tests/papers/test_token_merging.py",),
)


class MergingBlock(HostBlock):
    """A block that merges `merged` pairs of grid tokens; `kept.sizes` (B, N) holds how many patches each stands for."""

    def __init__(self, merged: int, **host: Any) -> None:
        super().__init__(**host)
        self.merged = merged

    def drops(self) -> bool:
        return self.merged > 0

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        self.start(tokens)
        q, k, v = self.queries_keys_values(tokens)
        sizes = self.kept.sizes
        bias = None if sizes is None else sizes.log()[:, None, None].to(q.dtype)
        tokens = self.add_mixed(tokens, attend(q, k, v, bias, where=self.kept.where))
        pairs = min(self.merged, (tokens.shape[1] - self.prefix) // 2)
        return self.add_mlp(self.merge(tokens, k.mean(1), pairs) if pairs > 0 else tokens)

    def merge(self, tokens: Tensor, keys: Tensor, pairs: int) -> Tensor:
        """(B, N, C) and the keys (B, N, d) that tell how alike tokens are -> (B, N - pairs, C)."""
        sizes = self.kept.sizes
        sizes = torch.ones_like(tokens[..., 0]) if sizes is None else sizes
        stay, go, to = self.match(keys, pairs)
        numbers = self.kept.numbers.expand(tokens.shape[0], -1)
        target = numbers.scatter(1, to, -1)  # a token made of several has no one place
        weighted = torch.cat([tokens * sizes[..., None], sizes[..., None]], -1)
        summed = weighted.scatter_add(1, to[..., None].expand(-1, -1, weighted.shape[-1]), gathered(weighted, go))
        summed = gathered(summed, stay)
        self.kept.sizes, self.kept.numbers = summed[..., -1], target.gather(1, stay)
        return summed[..., :-1] / summed[..., -1:]

    def match(self, keys: Tensor, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
        """Places of the tokens that stay (B, N - pairs), those that go (B, pairs), and where each of these goes."""
        keys = keys[:, self.prefix:] / keys[:, self.prefix:].norm(dim=-1, keepdim=True)
        alike, nearest = (keys[:, ::2] @ keys[:, 1::2].mT).max(-1)
        order = alike.argsort(dim=1, descending=True).narrow(1, 0, pairs)
        go, to = 2 * order + self.prefix, 2 * nearest.gather(1, order) + 1 + self.prefix
        count = keys.shape[1] + self.prefix
        places = torch.arange(count, device=keys.device).expand(keys.shape[0], -1)
        stay = places.scatter(1, go, count).sort(1).values.narrow(1, 0, count - pairs)
        return stay, go, to


def token_merging(model: nn.Module, r: int = 13) -> Handle:
    """Merge `r` pairs of tokens in every block; 0 merges none."""
    if r < 0:
        raise SaccadeError(f"token_merging: r={r}; give the number of pairs that merge in each block, 0 or more")
    return open_blocks(model, "token_merging", lambda number, **host: MergingBlock(r, **host))
