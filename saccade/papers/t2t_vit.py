"""T2T-ViT: neighbouring tokens become one token, in steps, before a deep and narrow ViT.

Instead of cutting the image into patches at once, each step re-structures the tokens by a small transformer, lays them
out as a map again and joins every overlapping k x k neighbourhood into one token (the soft split),
    t = T(split(x)),    T(u) = y + mlp(norm(y)),    y = v + proj(attention(q, k, v)),    q, k, v = linear(norm(u)).
The first maps are large, so T may replace the softmax by positive random features (Performer), linear in the tokens:
    attention_i = phi(q_i) (sum_j phi(k_j)^T v_j) / phi(q_i) (sum_j phi(k_j)), phi(x) = exp(w x - |x|^2 / 2) / sqrt(m).

Yuan, Chen, Wang, Yu, Shi, Jiang, Tay, Feng, Yan, "Tokens-to-Token ViT: Training Vision Transformers from Scratch on
ImageNet", 2021, section 3; the random features are those of Choromanski et al., "Rethinking Attention with Performers".

Any grid: the image is zero-padded at its end to a multiple of 16; the fixed sinusoidal positions, counted along the
tokens of the native grid, are resampled (bicubic), as the authors' loading code does.
Quirks kept: the shortcut of the first branch is v, for the width changes there; 1e-8 is added to the Performer's
normaliser; softmax scores are scaled by the width of the joined neighbourhood, not of the head; random features and
positions are not trained, and stand in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, within, without_first_axis
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.parts.attention import Attention
from saccade.parts.convolution import grid_conv
from saccade.parts.mlp import Mlp
from saccade.parts.plain import Plain, TokenBlock, initialise
from saccade.parts.stem import pad_image
from saccade.parts.tokens import global_tokens, join, split

_ADDRESS = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main/"
_PUBLISHED = {  # parameters, multiply-adds, top-1, file
    "t2t_vit_7": (4.3e6, 1.1e9, 71.7, "71.7_T2T_ViT_7"),
    "t2t_vit_10": (5.9e6, 1.5e9, 75.2, "75.2_T2T_ViT_10"),
    "t2t_vit_12": (6.9e6, 1.8e9, 76.5, "76.5_T2T_ViT_12"),
    "t2t_vit_14": (21.5e6, 4.8e9, 81.5, "81.5_T2T_ViT_14"),
    "t2t_vit_19": (39.2e6, 8.5e9, 81.9, "81.9_T2T_ViT_19"),
    "t2t_vit_24": (64.1e6, 13.8e9, 82.3, "82.3_T2T_ViT_24"),
    "t2t_vit_t_14": (21.5e6, 6.1e9, 81.7, "81.7_T2T_ViTt_14"),
    "t2t_vit_t_19": (39.2e6, 9.8e9, 82.4, "82.4_T2T_ViTt_19"),
    "t2t_vit_t_24": (64.1e6, 15e9, 82.6, "82.6_T2T_ViTt_24"),
}

CARD = Card(
    "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet",
    authors="Yuan, Chen, Wang, Yu, Shi, Jiang, Tay, Feng, Yan",
    year=2021,
    systems=("t2t_vit",),
    arxiv="2101.11986",
    code="yitu-opensource/T2T-ViT@0f63dc9",
    licence="BSD-3-Clause-Clear",
    read="paper, code",
    keywords="tokens-to-token, soft split, performer, positive random features, linear attention, deep-narrow ViT",
    kinds=("backbone", "mixer"),
    mixers={"token_performer": "TokenPerformer"},
    params={name: row[0] for name, row in _PUBLISHED.items()} | {"t2t_vit_14_384": 21.7e6},
    macs={name: row[1] for name, row in _PUBLISHED.items()},
    top1={name: row[2] for name, row in _PUBLISHED.items()} | {"t2t_vit_14_384": 83.3},
    weights={
        **{name: Weights(f"{_ADDRESS}{row[3]}.pth.tar") for name, row in _PUBLISHED.items()},
        "t2t_vit_14_384": Weights(f"{_ADDRESS}83.3_T2T_ViT_14.pth.tar"),
    },
    goldens=("t2t_vit_7", "op_t2t_module", "op_t2t_token_performer", "op_t2t_token_transformer"),
    tests=("tests/papers/test_t2t_vit.py",),
)


class TokenAttention(nn.Module):
    """out = v + proj(softmax(q k^T / sqrt(C)) v), one head: (B, *grid, C) -> (B, *grid, width).

    (Yuan et al., T2T-ViT, 2021, section 3.1.)
    """

    ranks, prefix, weights = (1, 2, 3), True, True

    def __init__(
        self, site: Site, width: int | None = None, qkv_bias: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        width = site.dim if width is None else width
        self.scale = site.dim**-0.5
        self.qkv = nn.Linear(site.dim, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = self.qkv(join(x, prefix)).chunk(3, -1)
        return split(v + self.dropout(self.proj(self.mixed(q, k, v))), x, prefix)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention itself, on tokens (B, N, width)."""
        heads = (one[:, None] for one in (q, k, v))
        return attend(*heads, scale=self.scale, where=lambda: global_tokens(q.shape[1], q.device))[:, 0]

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: N D (3 C + D) for the projections, 2 N^2 D for the products, D the width of the output."""
        tokens, width = prod(grid) + prefix, self.proj.in_features
        return tokens * width * (3 * site.dim + width) + 2 * tokens**2 * width

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


class TokenPerformer(TokenAttention):
    """The same with positive random features in place of the softmax: linear in the number of tokens.

    The features w, `ratio` times as many as channels, are drawn orthogonal and stay as they are. (Yuan et al., T2T-ViT,
    2021, section 3.1; Choromanski et al., "Rethinking Attention with Performers", 2021, lemma 1.)
    """

    weights = False
    projections = ("qkv", "proj")
    template = Template("phi(q) phi(k)^T, phi positive random features", "divided by its sum", "sum of v")

    def __init__(
        self, site: Site, width: int | None = None, ratio: float = 0.5, qkv_bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__(site, width, qkv_bias, dropout)
        width = self.proj.in_features
        count = max(int(width * ratio), 1)
        self.features: Tensor
        self.register_buffer("features", nn.init.orthogonal_(torch.empty(count, width)) * count**0.5)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention itself, on tokens (B, N, width)."""
        query, key = self.positive(q), self.positive(k)
        total = query @ key.sum(1)[..., None]
        # x / (total + 1e-8); so written, because ONNX's optimizer takes an addition of 1e-8 for none.
        return (1e8 * query @ (key.mT @ v.to(key.dtype)) / (1e8 * total + 1)).to(v.dtype)

    def positive(self, x: Tensor) -> Tensor:
        """phi(x), whose products have exp(x . y) for their mean over the draw of w: (B, N, width) -> (B, N, m)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        features = self.features.to(x.dtype)
        return (x @ features.mT - x.square().sum(-1, keepdim=True) / 2).exp() * features.shape[0] ** -0.5

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: N D (3 C + D) for the projections, N m (4 D + 1) for m random features."""
        tokens, (count, width) = prod(grid) + prefix, self.features.shape
        return tokens * (width * (3 * site.dim + width) + count * (4 * width + 1))


class TokenTransformer(nn.Module):
    """y = attention(norm(x)); y + mlp(norm(y)): (B, *grid, C) -> (B, *grid, width)."""

    def __init__(self, site: Site, attention: TokenAttention, ratio: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        width = attention.proj.in_features
        self.norm1 = nn.LayerNorm(site.dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(Mlp(width, ratio), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


TRANSFORMERS: dict[str, Callable[..., TokenAttention]] = {"performer": TokenPerformer, "transformer": TokenAttention}


class TokensToToken(nn.Module):
    """image (B, C, *size) -> tokens (B, *grid, dim), in as many steps as `splits` has pairs (kernel, stride).

    A token transformer (of `width` channels) follows every split but the last, which is projected: a convolution.
    """

    def __init__(
        self,
        rank: int,
        in_chans: int,
        dim: int,
        *,
        width: int = 64,
        tokens: str = "performer",
        splits: Sequence[tuple[int, int]] = ((7, 4), (3, 2), (3, 2)),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if tokens not in TRANSFORMERS:
            raise SaccadeError(f"tokens={tokens!r}: choose one of {sorted(TRANSFORMERS)}")
        *self.splits, (kernel, stride) = splits
        self.stride = prod(step for _, step in splits)
        blocks, channels = [], in_chans
        for side, _ in self.splits:
            site = Site(channels * side**rank, grid=(1,) * rank)
            blocks.append(TokenTransformer(site, TRANSFORMERS[tokens](site, width, dropout=dropout), dropout=dropout))
            channels = width
        self.blocks = nn.ModuleList(blocks)
        self.project = grid_conv(rank, channels, dim, kernel, stride=stride, padding=_border(kernel, stride))

    def forward(self, image: Tensor) -> Tensor:
        x = pad_image(image, self.stride).movedim(1, -1)
        for block, (kernel, stride) in zip(self.blocks, self.splits, strict=True):
            x = block(soft_split(x, kernel, stride))
        return self.project(x)


def _border(kernel: int, stride: int) -> int:
    """Zeros around a map, so that it shrinks by the stride alone."""
    return (kernel - stride + 1) // 2


def soft_split(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Every `stride`-th neighbourhood of kernel^n tokens as one token: (B, *grid, C) -> (B, *grid', C kernel^n)."""
    rank = x.ndim - 2
    x = F.pad(x, [0, 0, *[_border(kernel, stride)] * (2 * rank)])
    for axis in range(1, rank + 1):
        x = x.unfold(axis, kernel, stride)
    return x.flatten(rank + 1)


def sinusoid(count: int, dim: int) -> Tensor:
    """(count, dim): sine and cosine of i / 10000^(j / dim) in channels j and j + 1, j even, at place i."""
    pairs = -(-dim // 2)
    angle = torch.arange(count)[:, None] * 10000.0 ** -(2 * torch.arange(pairs, dtype=torch.float64) / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim].float()


class T2TViT(Plain):
    """A Plain with a tokens-to-token stem and fixed positions."""

    undecayed = ("prefix",)

    def __init__(
        self, dim: int, *args: Any, stem: Callable[[int, int, int], TokensToToken], in_chans: int = 3, **options: Any
    ) -> None:
        super().__init__(dim, *args, in_chans=in_chans, **options)
        self.stem = stem(len(self.grid), in_chans, dim)  # type: ignore[assignment]
        self.stem.apply(partial(initialise, spread=0.02))
        count = self.position.shape[1]
        del self.position
        self.register_buffer("position", sinusoid(count, dim)[None])


def _sizes() -> dict[str, dict[str, Any]]:
    shapes: dict[int, dict[str, Any]] = {
        **{depth: dict(dim=256, depth=depth, heads=4, mlp_ratio=2.0) for depth in (7, 10, 12)},
        **{depth: dict(dim=64 * heads, depth=depth, heads=heads) for depth, heads in ((14, 6), (19, 7), (24, 8))},
    }
    table = {f"t2t_vit_{depth}": shape for depth, shape in shapes.items()}
    table |= {f"t2t_vit_t_{depth}": shapes[depth] | dict(tokens="transformer", dropout=0.0) for depth in (14, 19, 24)}
    return table | {
        "t2t_vit_14_384": shapes[14] | dict(img_size=384),
        "t2t_vit_14_resnext": shapes[14] | dict(heads=32),
        "t2t_vit_14_wide": dict(dim=768, depth=4, heads=12),
        "t2t_vit_nano": dict(dim=64, depth=4, heads=2, width=16, splits=((3, 2), (3, 2), (3, 1)), img_size=32),
    }


SIZES = _sizes()


def t2t_vit(
    dim: int,
    depth: int,
    heads: int,
    mlp_ratio: float = 3.0,
    tokens: str = "performer",
    width: int = 64,
    splits: Sequence[tuple[int, int]] = ((7, 4), (3, 2), (3, 2)),
    qkv_bias: bool = False,
    dropout: float = 0.1,
    mixer: Any = None,
    **common: Any,
) -> T2TViT:
    """A T2T-ViT of a size; `tokens` are restructured by a "performer" or a "transformer", with `dropout`."""
    return T2TViT(
        dim, depth, heads, patch=prod(step for _, step in splits),
        stem=partial(TokensToToken, width=width, tokens=tokens, splits=splits, dropout=dropout),
        mixer=partial(Attention, qkv_bias=qkv_bias), block=partial(TokenBlock, mlp=partial(Mlp, ratio=mlp_ratio)),
        norm=nn.LayerNorm, replace=mixer, **common,
    )


def _query_first(kqv: Tensor) -> Tensor:
    k, q, v = kqv.chunk(3)
    return torch.cat([q, k, v])


def _convolution(weight: Tensor) -> Tensor:
    """The matrix on joined 3x3 neighbourhoods as the convolution that it is."""
    return weight.unflatten(1, (-1, 3, 3))


TOKEN_TRANSFORMER: KeyMap = (
    ("w", "attention.features"),
    (r"kqv\.(.*)", r"attention.qkv.\1", _query_first),
    (r"attn\.(.*)", r"attention.\1"),
    (r"proj\.(.*)", r"attention.proj.\1"),
    (r"mlp\.(?:0|fc1)\.(.*)", r"mlp.0.fc1.\1"),
    (r"mlp\.(?:2|fc2)\.(.*)", r"mlp.0.fc2.\1"),
    (r"(norm\d\..*)", r"\1"),
)
STEM: KeyMap = (
    *within(TOKEN_TRANSFORMER, r"attention1\.", "blocks.0."),
    *within(TOKEN_TRANSFORMER, r"attention2\.", "blocks.1."),
    (r"project\.weight", "project.weight", _convolution),
    (r"project\.bias", "project.bias"),
)
AUTHORS: KeyMap = (
    *within(STEM, r"tokens_to_token\.", "stem."),
    (r"cls_token", "prefix", without_first_axis),
    (r"pos_embed", "position"),
    (r"blocks\.(\d+)\.attn\.(.*)", r"blocks.\1.mixer.\2"),
)


def TAPS(name: str) -> dict[str, str]:
    """Where inner outputs of the authors' model are."""
    return {"t2t": "stem", "block_last": f"blocks.{SIZES[name]['depth'] - 1}", r"block(\d+)": r"blocks.\1"}
