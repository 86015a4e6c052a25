"""URPE: relative positions after the softmax too, so that attention can count.

Rows of a softmax sum to one whatever the bias, so tokens that are all alike stay alike: no Transformer with relative
positions inside the softmax alone can tell where a token stands. URPE multiplies the weights by a learned Toeplitz
matrix once they are normalised,
    out_i = proj(sum_j softmax_j(q_i . k_j / sqrt(d) + b[j - i]) c[j - i] v_j),
with one entry of b and c a head and offset. Rows then sum to what the network wants, and it approximates any function
of sequences.

Luo, Li, Zheng, Liu, Wang, He, "Your Transformer May Not be as Powerful as You Expect", 2022, sections 3 and 4.

Any grid: an offset an axis; a smaller grid takes the offsets that it has (the authors' corner of the index table), and
offsets beyond the native grid take the entry of the farthest.
Quirks kept: buckets leave two rows of their tables unused, between those of negative offsets and that of 0; the layers
of the encoder share one b and one c.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import KeyMap, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import affinity, in_parts
from saccade.ops.tables import table
from saccade.ops.toeplitz import at_offsets, by_queries, toeplitz
from saccade.parts.attention import check_heads
from saccade.parts.mlp import Mlp
from saccade.parts.tokens import global_tokens

CARD = Card(
    "Your Transformer May Not be as Powerful as You Expect",
    authors="Luo, Li, Zheng, Liu, Wang, He",
    year=2022,
    systems=("urpe",),
    arxiv="2205.13401",
    code="lsj2408/URPE@47b711f",
    licence="MIT",
    read="paper, code",
    keywords="universal relative position attention, URPE, relative position bias, Toeplitz matrix, expressive power",
    kinds=("mixer",),
    mixers={"universal_relative_attention": "UniversalRelative"},
    goldens=("urpe_encoder_small", "op_urpe_attention"),
    tests=("tests/papers/test_urpe.py",),
)


@table
def bucket_rows(side: int, native: int, buckets: int, farthest: int, device: torch.device) -> Tensor:
    """(2 side - 1,) rows of a table of `buckets` + 1: near offsets one by one, far ones by their logarithm."""
    half, exact = buckets // 2, buckets // 4

    def bucket(distance: Tensor) -> Tensor:
        far = exact + (torch.log(distance.float() / exact) / log(farthest / exact) * (half - exact)).long()
        return torch.where(distance < exact, distance, far.clamp(max=half - 1))

    offset = torch.arange(1 - side, side, device=device).clamp(1 - native, native - 1)
    number, last = bucket(offset.abs().clamp(min=1)) * offset.sign(), bucket(torch.tensor(max(native - 1, 1)))
    return torch.where(offset < 0, number + last, number + last + 2)


class Offsets(nn.Module):
    """A learned entry a head and offset of two tokens, or a bucket of offsets: forward(grid) -> (heads, *(2 side - 1)).

    With `buckets` an axis has so many + 1 rows, of which offsets from `farthest` on share the last.
    """

    undecayed = ("table",)

    def __init__(
        self, heads: int, grid: tuple[int, ...], initial: float | None = None, buckets: int | None = None,
        farthest: int = 128,
    ) -> None:
        super().__init__()
        self.grid, self.buckets, self.farthest = grid, buckets, farthest
        self.table = nn.Parameter(torch.empty(heads, *(2 * side - 1 if buckets is None else buckets + 1
                                                       for side in grid)))
        if initial is None:
            nn.init.normal_(self.table, std=0.02)
        else:
            nn.init.constant_(self.table, initial)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        if self.buckets is None:
            return at_offsets(self.table, grid)
        entries: Tensor = self.table
        for axis, (side, native) in enumerate(zip(grid, self.grid, strict=True), start=1):
            entries = entries.index_select(axis, bucket_rows(side, native, self.buckets, self.farthest,
                                                             entries.device))
        return entries

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The table of another native grid: the entries of this one's offsets."""
        return value if self.buckets is not None or value.ndim != self.table.ndim else at_offsets(value, self.grid)


class UniversalAttention(nn.Module):
    """proj((softmax(q k^T / sqrt(d) + b) c) v) with tables of b and c that others hold."""

    def __init__(self, site: Site, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(site)
        self.heads = site.heads
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)

    def mix(self, x: Tensor, bias: Tensor, factor: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, C) -> the same; bias and factor (heads, *(2 side - 1)), valid (B, *grid) where tokens are."""
        grid = tuple(x.shape[1:-1])
        q, k, v = self.qkv(x).flatten(1, -2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if valid is not None or not in_parts(*q.shape, *grid):
            inside, after = toeplitz(bias, grid), toeplitz(factor, grid)
            if valid is not None:
                keep = valid.flatten(1)[:, None, None]
                inside, after = inside.masked_fill(~keep, -torch.inf), after * keep
            weights = affinity(q, k, inside, where=lambda: global_tokens(q.shape[-2], x.device))
            out = (weights * after) @ v
        else:
            out = in_pieces(q * q.shape[-1] ** -0.5, k, v, bias, factor, grid)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class UniversalRelative(UniversalAttention):
    """Attention to all tokens, weighed by a factor a head and offset after its softmax: (B, *grid, C) -> the same.

    A factor that starts at `initial` 1 is relative attention; None draws it as the bias. (Luo et al., 2022, section 4.)
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d) + offset", "softmax, then a factor an offset", "sum of v")

    def __init__(
        self, site: Site, initial: float | None = 1.0, buckets: int | None = None, farthest: int = 128,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(site, qkv_bias)
        self.bias = Offsets(site.heads, site.grid, buckets=buckets, farthest=farthest)
        self.factor = Offsets(site.heads, site.grid, initial, buckets, farthest)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        return self.mix(x, self.bias(grid), self.factor(grid))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 for the projections, 2 N^2 C for the products."""
        tokens = torch.Size(grid).numel()
        return 4 * tokens * site.dim**2 + 2 * tokens**2 * site.dim

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


def in_pieces(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, factor: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(softmax(q k^T + b) c) v of (B, heads, N, d), some queries at a time, so that their weights stay in the cache."""
    heads = []
    for head in range(q.shape[1]):
        pieces = []
        for queries, part in by_queries(grid, q.shape[0]):
            inside, after = (toeplitz(offsets[head:head + 1, part], grid) for offsets in (bias, factor))
            weights = torch.baddbmm(inside, q[:, head, queries], k[:, head].mT).softmax(-1).mul_(after)
            pieces.append(weights @ v[:, head])
        heads.append(torch.cat(pieces, 1))
    return torch.stack(heads, 1)


class EncoderLayer(nn.Module):
    """x = norm(x + attention(x)), x = norm(x + mlp(x))."""

    def __init__(self, site: Site, hidden: int) -> None:
        super().__init__()
        self.attention = UniversalAttention(site)
        self.norm1 = nn.LayerNorm(site.dim)
        self.mlp = Mlp(site.dim, hidden / site.dim)
        self.norm2 = nn.LayerNorm(site.dim)

    def forward(self, x: Tensor, bias: Tensor, factor: Tensor, valid: Tensor) -> Tensor:
        x = self.norm1(x + self.attention.mix(x, bias, factor, valid))
        return self.norm2(x + self.mlp(x))


class UniversalEncoder(nn.Module):
    """Token numbers (B, N) -> (B, N, C): an embedding and its norm, then layers that share one bias and one factor.

    The encoder of the paper's synthetic tasks, which has no position but those tables. `padding` is the number of the
    padding token.
    """

    def __init__(
        self, vocabulary: int, dim: int, depth: int, heads: int, hidden: int, length: int, padding: int = 1,
        initial: float | None = None, buckets: tuple[int | None, int | None] = (64, 64), farthest: int = 128,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=padding)
        self.norm = nn.LayerNorm(dim)
        site = Site(dim, heads, grid=(length,))
        self.layers = nn.ModuleList(EncoderLayer(site, hidden) for _ in range(depth))
        self.bias = Offsets(heads, site.grid, None, buckets[0], farthest)
        self.factor = Offsets(heads, site.grid, initial, buckets[1], farthest)

    def forward(self, tokens: Tensor) -> Tensor:
        valid = tokens != self.padding
        x = self.norm(self.embedding(tokens)) * valid[..., None]
        bias, factor = self.bias(tuple(tokens.shape[1:])), self.factor(tuple(tokens.shape[1:]))
        for layer in self.layers:
            x = layer(x, bias, factor, valid)
        return x


def across_heads(rows: Tensor) -> Tensor:
    """The authors' (rows, heads) as (heads, rows)."""
    return rows.T


MIXER: KeyMap = (
    (r"(?:attn\.)?q_proj\.(.*)", r"qkv.\1#0"),
    (r"(?:attn\.)?k_proj\.(.*)", r"qkv.\1#1"),
    (r"(?:attn\.)?v_proj\.(.*)", r"qkv.\1#2"),
    (r"(?:attn\.)?out_proj\.(.*)", r"proj.\1"),
    (r"(?:encoder\.)?ur_rp_bias\.weight", "factor.table", across_heads),
    (r"(?:encoder\.)?rp_bias\.weight", "bias.table", across_heads),
)
AUTHORS: KeyMap = (
    *MIXER[4:],
    *within(MIXER[:4], r"encoder\.layers\.(\d+)\.self_attn\.", r"layers.\1.attention."),
    (r"encoder\.embed_tokens\.weight", "embedding.weight"),
    (r"encoder\.emb_layer_norm\.(.*)", r"norm.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(.*)", r"layers.\1.norm1.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(.*)", r"layers.\1.norm2.\2"),
    (r"encoder\.layers\.(\d+)\.(fc[12].*)", r"layers.\1.mlp.\2"),
)
