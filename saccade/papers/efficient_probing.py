"""Efficient probing: many queries, each with its own slice of the values, read a frozen encoder.

What a linear layer on the mean of the tokens reads of an encoder that was trained on masked pictures is little, since
nothing gathered there; attentive probes read more, with heavy heads. Here M learned queries look at the tokens
themselves, without projections of queries, keys or outputs, and the m-th pools the m-th slice of the values alone,
    out = [a_1 V_1, ..., a_M V_M],   a_m = softmax(q_m X^T / sqrt(D)),   V = X W_v,   V_m its m-th D / M columns.

Psomas, Christopoulos, Baltzi, Kakogeorgiou, Aravanis, Komodakis, Karantzalos, Avrithis, Tolias, "Attention, Please!
Revisiting Attentive Probing for Masked Image Modeling", 2025, section 3; SimPool: Psomas et al., "Keep It SimPool: Who
Said Supervised Transformers Suffer from Attention Deficit?", 2023, section 3.

Beside it the poolings that it is compared with. Quirk kept: SimPool's powers are taken above the least value of the
whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.ops.attend import attend

CARD = Card(
    "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling",
    authors="Psomas, Christopoulos, Baltzi, Kakogeorgiou, Aravanis, Komodakis, Karantzalos, Avrithis, Tolias",
    year=2025,
    systems=("efficient_probing",),
    arxiv="2506.10178",
    code="billpsomas/efficient-probing@b8f4fb8",
    licence="unknown",
    read="paper",
    keywords="attentive probing, multi-query attention pooling, frozen features, masked image modeling, SimPool",
    kinds=("pretraining",),
    goldens=("ep_vit_tiny", "op_efficient_probing", "op_simpool", "op_simpool_gamma", "op_simpool_nolinears"),
    tests=("tests/papers/test_efficient_probing.py",),
)


class EfficientProbing(nn.Module):
    """Tokens (B, N, C) -> (B, C / shrink), pooled by `queries` learned queries."""

    def __init__(self, dim: int, queries: int = 32, shrink: int = 1) -> None:
        super().__init__()
        if dim % shrink or dim // shrink % queries:
            raise SaccadeError(f"efficient probing: {queries} queries do not divide {dim} / {shrink} channels")
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.v = nn.Linear(dim, dim // shrink, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = (self.queries * tokens.shape[-1] ** -0.5 @ tokens.mT).softmax(-1)  # (B, M, N)
        values = self.v(tokens).unflatten(-1, (len(self.queries), -1))  # (B, N, M, C / M)
        return torch.einsum("bmn,bnmc->bmc", weights, values).flatten(1)


class SimPool(nn.Module):
    """The mean of the tokens looks at all: (B, N, C) -> (B, C), keys and values normalised, queries and keys projected.

    With `gamma` it is a generalised mean, (sum_j a_j (v_j - min v)^gamma)^(1/gamma).
    """

    def __init__(self, dim: int, gamma: float | None = None) -> None:
        super().__init__()
        self.gamma = gamma
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(tokens)
        query, key = self.q(tokens.mean(1, keepdim=True))[:, None], self.k(normed)[:, None]  # one head
        if self.gamma is None:
            return attend(query, key, normed[:, None])[:, 0, 0]
        positive = normed - normed.amin() + 1e-6
        return attend(query, key, (positive**self.gamma)[:, None])[:, 0, 0] ** (1 / self.gamma)


class MeanQuery(nn.Module):
    """SimPool without weights: heads of the mean look at the tokens, both normalised, and pool them as they are."""

    def __init__(self, dim: int, heads: int = 12) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.norm(tokens.mean(1, keepdim=True)), self.norm(tokens), tokens))
        return attend(q, k, v).flatten(1)


class GatedPooling(nn.Module):
    """A learned score a token, softmax over them: (B, N, C) -> (B, C).

    (Ilse et al., "Attention-based Deep Multiple Instance Learning", 2018, equation 9.)
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.look, self.gate, self.score = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.score(self.look(tokens).tanh() * self.gate(tokens).sigmoid())
        return (scores.softmax(1).mT @ tokens)[:, 0]


class QueryPooling(nn.Module):
    """One learned query in several heads, keys and values projected: (B, N, C) -> (B, C).

    (El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image Models", 2024, section 3: AIM's probe.)
    """

    def __init__(self, dim: int, heads: int = 12) -> None:
        super().__init__()
        if dim % heads:
            raise SaccadeError(f"{heads} heads do not divide {dim} channels; choose a divisor")
        self.heads, self.query = heads, nn.Parameter(torch.randn(dim) * 0.02)
        self.k, self.v = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.k(tokens), self.v(tokens)))
        q = self.query.view(self.heads, 1, -1).expand(len(tokens), -1, -1, -1)
        return attend(q, k, v).flatten(1)


class MultiHeadPooling(nn.Module):
    """One learned query in several heads, with projections of query, keys, values and output: (B, N, C) -> (B, C).

    (Lee et al., "Set Transformer", 2019, section 3.2, the attention of its pooling, with one seed.)
    """

    def __init__(self, dim: int, heads: int = 12) -> None:
        super().__init__()
        if dim % heads:
            raise SaccadeError(f"{heads} heads do not divide {dim} channels; choose a divisor")
        self.heads, self.query = heads, nn.Parameter(torch.randn(dim) * 0.02)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.look(self.query.expand(len(tokens), 1, -1), tokens, tokens)

    def look(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B, 1, C), (B, N, C), (B, N, C) -> (B, C)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.q(query), self.k(keys), self.v(values)))
        return self.proj(attend(q, k, v).flatten(1))


class CrossAttentionPooling(MultiHeadPooling):
    """The same with the query, the keys and the values each normalised first: (B, N, C) -> (B, C).

    (Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", 2022: CAE's attentive probe.)
    """

    def __init__(self, dim: int, heads: int = 12) -> None:
        super().__init__(dim, heads)
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.norm_q(self.query).expand(len(tokens), 1, -1)
        return self.look(query, self.norm_k(tokens), self.norm_v(tokens))


class MeanTokens(nn.Module):
    """The mean over tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


POOLINGS: dict[str, Callable[..., nn.Module]] = {
    "linear": MeanTokens,
    "efficient": EfficientProbing,
    "simpool": SimPool,
    "mean_query": MeanQuery,
    "abmilp": GatedPooling,
    "aim": QueryPooling,
    "multi_head": MultiHeadPooling,
    "cae": CrossAttentionPooling,
}


class Probe(nn.Module):
    """linear(batch norm(pooling(tokens of a frozen encoder))): image -> class scores; the head alone learns.

    `encoder` gives tokens (B, N, C), of which the first `prefix` are left out. `pooling` is one of POOLINGS, options go
    to it.
    """

    def __init__(
        self, encoder: nn.Module, dim: int, num_classes: int, pooling: str = "efficient", prefix: int = 1,
        **options: object,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise SaccadeError(f"there is no pooling {pooling!r}; choose from {', '.join(POOLINGS)}")
        self.encoder, self.prefix = encoder.requires_grad_(False), prefix
        pool = POOLINGS[pooling](dim, **options)
        width = dim // options["shrink"] if "shrink" in options else dim  # type: ignore[operator]
        self.head = nn.Sequential(pool, nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, num_classes))

    def train(self, mode: bool = True) -> Probe:
        """The encoder stays in evaluation."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = self.encoder(image)[:, self.prefix:]
        scores: Tensor = self.head(tokens)
        return scores


EFFICIENT: KeyMap = ((r"cls_token", "queries", lambda value: value[0]), (r"v\.weight", "v.weight"))
SIMPOOL: KeyMap = ((r"norm_patches\.(.*)", r"norm.\1"), (r"w([qk])\.weight", r"\1.weight"))
