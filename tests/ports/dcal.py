"""Global-local and pair-wise cross-attention, in the layout of a re-implementation by others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade import Site
from saccade.ops.attend import affinity
from saccade.papers.dcal import GlobalLocalAttention, PairwiseAttention, rollout, telling
from saccade.parts.host import gathered
from tests.ports.port import Port, key_map


class GlobalLocal(GlobalLocalAttention):
    """What the golden holds, of tokens and scores of earlier layers: what is told, else zero; weights; rollout."""

    def __init__(self, dim: int, heads: int, share: float, layers: int) -> None:
        super().__init__(dim, heads)
        self.share, self.layers = share, layers

    def forward(self, x: Tensor, *layers: Tensor) -> Any:  # type: ignore[override]
        seen = rollout([scores.softmax(-1) for scores in layers])
        places = telling(seen, self.share)
        told = super().forward(x, places)
        q, k = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in (self.q(gathered(x, places)), self.kv(x).chunk(2, -1)[0]))
        out = torch.zeros_like(x).scatter(1, places[..., None].expand_as(told), told)
        return {"out": out, "attn": affinity(q, k), "rollout": seen[:, 1:]}

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """What the golden counted: rollouts by products of whole matrices, of all layers, twice."""
        tokens, C = grid[0], site.dim
        asking = 1 + int(self.share * (tokens - 1))
        return 2 * (asking + tokens) * C**2 + 2 * asking * tokens * C + 2 * self.layers * tokens**3


class Pairwise(PairwiseAttention):
    """With the weights (B, heads, N, 2 N)."""

    def forward(self, x: Tensor, other: Tensor) -> Any:  # type: ignore[override]
        q, k, _ = self.qkv(torch.cat([x, other], 1)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return {"out": super().forward(x, context=other), "attn": affinity(q[:, :, : x.shape[1]], k)}

    @staticmethod
    def cost(site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Queries, keys and values of both pictures, which the second's queries are not needed for."""
        tokens, C = grid[0], site.dim
        return 7 * tokens * C**2 + 4 * tokens**2 * C


LOCAL = ((r"g\.q_proj\.(.*)", r"q.\1"), (r"g\.k_proj\.(.*)", r"kv.\1#0"), (r"g\.v_proj\.(.*)", r"kv.\1#1"),
         (r"g\.proj\.(.*)", r"proj.\1"))


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    if golden["source"]["object"] == "GlobalLocalCrossAttention":
        return Port(GlobalLocal(args["embed_dim"], args["num_heads"], args["top_k_ratio"],
                                len(golden["inputs"]) - 1), key_map(LOCAL))
    return Port(Pairwise(Site(args["embed_dim"], args["num_heads"])), key_map(((r"sa_attention\.(.*)", r"\1"),)))
