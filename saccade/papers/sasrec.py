"""SASRec: the next thing somebody will want, by attention of each thing they took to those before it.

A history s_1 ... s_T of item numbers is a sentence; a causal Transformer over item embeddings M and positions P,
    x_t = sqrt(C) M_{s_t} + P_t,   x = x + attention(x),   x = x + relu(x W1) W2,
says at each place what comes next by the products of its feature with all item embeddings, r_{t,i} = f_t . M_i, the
very ones it reads. Where data are dense it looks far back, as a recurrent network; where they are sparse, at the last
few items, as a Markov chain.

Kang, McAuley, "Self-Attentive Sequential Recommendation", 2018.

Any length: histories are filled with 0 on the left, and of one longer than `length` the last items count.
Quirks kept: places of padding, whose embedding is 0, can be attended to; norms stand after the sums, unless
`norm_first`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import KeyMap, pointwise
from saccade.core.site import Site
from saccade.ops.attend import attend
from saccade.parts.attention import check_heads
from saccade.parts.tokens import causal, global_tokens

CARD = Card(
    "Self-Attentive Sequential Recommendation",
    authors="Kang, McAuley",
    year=2018,
    systems=("sasrec",),
    arxiv="1808.09781",
    code="pmixer/SASRec.pytorch@fde8a9c (a port; the authors' is for TensorFlow)",
    licence="Apache-2.0",
    read="abstract, code",
    keywords="sequential recommendation, next item, causal self-attention, shared item embedding, negative sampling",
    kinds=("sequence",),
    goldens=("sasrec_default",),
    tests=("tests/papers/test_sasrec.py",),
)


class CausalAttention(nn.Module):
    """proj(softmax(q k^T / sqrt(d)) v) of each token to itself and those before it, (B, N, C) -> the same."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        check_heads(site)
        self.heads = site.heads
        self.qkv = nn.Linear(site.dim, 3 * site.dim)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        count = x.shape[1]
        out = attend(q, k, v, causal(count, x.device, q.dtype), where=lambda: global_tokens(count, x.device))
        return self.proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """x = norm(x + attention(x)), x = norm(x + mlp(x)); with `norm_first` x += f(norm(x)) for both."""

    def __init__(self, site: Site, dropout: float, norm_first: bool) -> None:
        super().__init__()
        self.norm_first, dim = norm_first, site.dim
        self.mixer = CausalAttention(site)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-8), nn.LayerNorm(dim, eps=1e-8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.mixer(self.norm1(x)))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.mixer(x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class SASRec(nn.Module):
    """History (B, T), numbers 1 ... `items` and 0 for padding -> scores of what comes next.

    `forward(history, candidates)` scores the candidates (B, I), without them all items, (B, items + 1), of which the
    first is padding. `loss` trains every place of the history at once.
    """

    def __init__(
        self, items: int, length: int = 200, dim: int = 50, depth: int = 2, heads: int = 1, dropout: float = 0.2,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        self.length = length
        self.items = nn.Embedding(items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(length + 1, dim, padding_idx=0)
        site = Site(dim, heads, grid=(length,))
        self.layers = nn.ModuleList(Layer(site, dropout, norm_first) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-8)
        self.dropout = nn.Dropout(dropout)
        for table in (self.items, self.positions):
            nn.init.xavier_normal_(table.weight)
            nn.init.zeros_(table.weight[0])

    def forward(self, history: Tensor, candidates: Tensor | None = None) -> Tensor:
        last = self.features(history)[:, -1]
        if candidates is None:
            return last @ self.items.weight.mT
        return (self.items(candidates) @ last[..., None])[..., 0]

    def features(self, history: Tensor) -> Tensor:
        """What is known at each place of what comes after it, (B, T, C); T is at most `length`."""
        history = history[:, -self.length:]
        places = torch.arange(1, history.shape[1] + 1, device=history.device)
        x = self.items(history) * self.items.embedding_dim**0.5 + self.positions(places * (history != 0))
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def loss(self, history: Tensor, following: Tensor, others: Tensor) -> Tensor:
        """-mean(log sigmoid(r of what follows) + log(1 - sigmoid(r of another))) over the places that are followed.

        history, following, others (B, T): the item after each place (0: none) and one that the user never took, such as
        `untaken` draws. (Kang, McAuley, 2018, section 3.)
        """
        known, following, others = self.features(history), following[:, -self.length:], others[:, -self.length:]
        right, wrong = ((known * self.items(one)).sum(-1)[following != 0] for one in (following, others))
        return F.softplus(-right).mean() + F.softplus(wrong).mean()


def untaken(taken: Tensor, items: int, generator: torch.Generator | None = None) -> Tensor:
    """As many items as `taken` (B, T) has, drawn of those, 1 ... `items`, that are not in its row; 0 is padding."""
    free = torch.ones(len(taken), items + 1, device=taken.device).scatter_(1, taken, 0)
    free[:, 0] = 0
    return free.multinomial(taken.shape[1], replacement=True, generator=generator)


AUTHORS: KeyMap = (
    (r"item_emb\.(.*)", r"items.\1"),
    (r"pos_emb\.(.*)", r"positions.\1"),
    (r"attention_layernorms\.(\d+)\.(.*)", r"layers.\1.norm1.\2"),
    (r"forward_layernorms\.(\d+)\.(.*)", r"layers.\1.norm2.\2"),
    (r"attention_layers\.(\d+)\.in_proj_(.*)", r"layers.\1.mixer.qkv.\2"),
    (r"attention_layers\.(\d+)\.out_proj\.(.*)", r"layers.\1.mixer.proj.\2"),
    (r"forward_layers\.(\d+)\.conv1\.(.*)", r"layers.\1.mlp.0.\2", pointwise),
    (r"forward_layers\.(\d+)\.conv2\.(.*)", r"layers.\1.mlp.2.\2", pointwise),
    (r"last_layernorm\.(.*)", r"norm.\1"),
)
