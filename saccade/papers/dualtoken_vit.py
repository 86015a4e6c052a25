"""DualToken-ViT: local tokens from convolutions, global tokens that know where they are, and both summed.

Every block has two branches. A ConvNeXt block makes local tokens, X_local = X + W_2 gelu(W_1 norm(depthwise_7(X))).
Beside it 7 x 7 global tokens G travel through the whole network, each for a place of the image, and meet a summary of
the local tokens of the same size, so that a weighted sum (no attention) enriches the one with the other:
    X_ga = attention(downsample(X_local)),   G' = MLP(alpha G + (1 - alpha) X_ga),
    out = X_local + softmax(Q(X_local) K(G')^T / sqrt(d)) V(G').
Stem, patch merging and the gates on the MLP's output (bi-dimensional attention) are LightViT's.

Chu, Chen, Chen, Wang, Wu, Huang, Qian, "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token
Fusion", 2023, sections 3.1-3.3; Huang et al., "LightViT", 2022, for the shared parts.

Any grid: convolutions pad with zeros, an odd side is halved upwards, and whatever is left is averaged to the size of G.
No code of the model is public. Its equations, the 7 x 7, LightViT's three stages, the accuracies and the multiply-adds
are the paper's. Ours, because its tables were not at hand: the widths, and depths that meet the multiply-adds and, with
`downsample` of depthwise 3x3 and 1x1 convolutions and 2x2 means, what stepwise downsampling costs (0.03 G, 0.1 M); a
learned alpha a block; an MLP of G of one layer over positions and one over channels ("mix") or two over channels
("normal"), beside a shortcut. Parameters are not known.
Quirks kept: the gates multiply what was not normed; merging pads an odd side with zeros, before its maximum too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import log2, prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.pooling import adaptive_mean
from saccade.ops.window import pad_to_multiple
from saccade.parts.attention import CrossAttention, check_heads
from saccade.parts.block import LAYER_NORM, Block, Scale
from saccade.parts.convolution import conv_norm, depthwise, grid_conv
from saccade.parts.mbconv import SamePool
from saccade.parts.merging import PatchMerging
from saccade.parts.mlp import Gelu, Mlp
from saccade.parts.pyramid import Pyramid, Stage
from saccade.parts.stem import ConvStem

CARD = Card(
    "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion",
    authors="Chu, Chen, Chen, Wang, Wu, Huang, Qian",
    year=2023,
    systems=("dualtoken_vit",),
    arxiv="2309.12424",
    read="paper (abstract and excerpts)",
    keywords="dual token fusion, position-aware global tokens, local and global tokens, LightViT, bi-dimensional gates",
    kinds=("backbone", "mixer"),
    mixers={"dual_token": "DualToken"},
    macs={"dualtoken_vit_t": 0.5e9, "dualtoken_vit_s": 1.0e9},
    top1={"dualtoken_vit_t": 75.4, "dualtoken_vit_s": 79.4},
    goldens=("op_lightvit_bi_dim_attention", "op_lightvit_merge_patch", "op_lightvit_stem"),
    tests=("tests/papers/test_dualtoken_vit.py",),
)


class MixMlp(nn.Module):
    """fc(gelu(mix(G))), mix a linear layer over the T positions, fc over the channels: (B, T, C) -> (B, T, C)."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(count, count)
        self.activation = Gelu()
        self.fc = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.activation(self.mix(tokens.transpose(1, 2))).transpose(1, 2))


class DualToken(nn.Module):
    """out = X_local + broadcast(G'): (B, *grid, C) -> (B, *grid, C), and with `tokens` G (1 or B, T, C) also G'.

    `side` is that of G, `steps` how often the map is halved before the rest is averaged (by default as the native grid
    has it), `mlp` "mix" or "normal". Without `carried` the mixer stands alone and has a G of its own.
    """

    ranks, weights = (1, 2, 3), True
    template = Template(
        "convolutions near; q k^T / sqrt(d) to global tokens",
        "softmax to the global tokens",
        "sum of v, added to the convolved map",
    )

    def __init__(
        self, site: Site, side: int = 7, mlp: str = "mix", steps: int | None = None, carried: bool = False
    ) -> None:
        super().__init__()
        check_heads(site)
        if mlp not in ("mix", "normal"):
            raise SaccadeError(f'mlp={mlp!r}: the MLP of the global tokens is "mix" or "normal"')
        dim, rank = site.dim, site.rank
        self.size = (side,) * rank
        count = side**rank
        self.steps = max(0, int(log2(min(site.grid) / side))) if steps is None else steps
        self.local = nn.Sequential(depthwise(rank, dim, 7), LAYER_NORM(dim), Mlp(dim), Scale(dim, 1e-6))
        self.downsample = nn.Sequential(*(
            layer for _ in range(self.steps) for layer in (depthwise(rank, dim, 3), nn.Linear(dim, dim), SamePool())))
        self.aggregate = CrossAttention(dim, site.heads)
        self.alpha = nn.Parameter(torch.zeros(()))  # through a sigmoid: starts at one half
        self.norm = LAYER_NORM(dim)
        self.mlp = MixMlp(count, dim) if mlp == "mix" else Mlp(dim, 1)
        self.broadcast = CrossAttention(dim, site.heads)
        self.tokens = None if carried else global_tokens(count, dim)
        self.undecayed = ("alpha",) if carried else ("alpha", "tokens")

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Any:
        x = x + self.local(x)
        before = self.tokens if tokens is None else tokens
        assert before is not None, "a mixer built with carried=True is given its tokens"
        after = self.enrich(before, self.summary(x))
        out = x + self.broadcast(x.flatten(1, -2), after).view(x.shape)
        return out if tokens is None else (out, after)

    def summary(self, local: Tensor) -> Tensor:
        """X_ga (B, T, C): the local tokens, brought to the size of G, attend to each other."""
        small = adaptive_mean(self.downsample(local), self.size).flatten(1, -2)
        return self.aggregate(small, small)

    def enrich(self, tokens: Tensor, summary: Tensor) -> Tensor:
        """G' of G and X_ga, position by position."""
        tokens = summary.lerp(tokens.expand_as(summary).to(summary.dtype), self.alpha.sigmoid().to(summary.dtype))
        return tokens + self.mlp(self.norm(tokens))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of N tokens and T global ones; linear in N."""
        dim, tokens, count = site.dim, prod(grid), prod(self.size)
        halves = [prod(-(-side // 2**step) for side in grid) for step in range(self.steps)]
        local = tokens * (7**site.rank + 8 * dim) + sum(halves) * (3**site.rank + dim)
        enriched = count * (count + dim if isinstance(self.mlp, MixMlp) else 2 * dim)
        aggregated = 4 * count * dim + 2 * count**2
        broadcast = 2 * (tokens + count) * dim + 2 * tokens * count
        return dim * (local + enriched + aggregated + broadcast)

    def reach(self, site: Site) -> None:
        """Every token reaches every other, by way of the global tokens."""
        return None


def global_tokens(count: int, dim: int) -> nn.Parameter:
    """The first G (1, T, C), which holds the positions."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, dim), std=0.02))


class BiDimensionalGate(nn.Module):
    """x * channels * places, both gates from norm(x): (B, *grid, C) -> (B, *grid, C).

    channels = sigmoid(W_c g), g = gelu(W_g mean(norm(x))); places = sigmoid(W_s [gelu(W_l norm(x)), g]).
    (Huang et al., LightViT, 2022, section 3.3.)
    """

    def __init__(self, dim: int, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.norm = nn.LayerNorm(dim)
        self.whole = nn.Linear(dim, hidden)
        self.each = nn.Linear(dim, hidden)
        self.activation = Gelu()
        self.channels = nn.Linear(hidden, dim)
        self.places = nn.Linear(2 * hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        around = (x.shape[0], *[1] * (x.ndim - 2), -1)
        whole = self.activation(self.whole(normed.flatten(1, -2).mean(1))).view(around)
        # W_s on the joined halves, without joining them: what all places share is added once.
        weight_each, weight_whole = self.places.weight.chunk(2, -1)
        shared = nn.functional.linear(whole, weight_whole, self.places.bias)
        places = (nn.functional.linear(self.activation(self.each(normed)), weight_each) + shared).sigmoid()
        return x * self.channels(whole).sigmoid() * places

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds, W_s counted on both halves at every place."""
        hidden = self.each.out_features
        return hidden * (site.dim * (2 + prod(grid)) + 2 * prod(grid))


class DualTokenBlock(Block):
    """x += tail(mixer(norm(x), G)); x += tail(gate(mlp(norm(x)))); only a carried DualToken changes G."""

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        normed = self.norm1(x)
        if isinstance(self.mixer, DualToken) and self.mixer.tokens is None:
            mixed, tokens = self.mixer(normed, tokens)
        else:
            mixed = self.mixer(normed)
        x = x + self.scale1(mixed)
        return x + self.scale2(self.mlp(self.norm2(x))), tokens


class ResidualMerging(nn.Module):
    """Patch merging beside a projected maximum, and G projected: (B, *grid, C), (B, T, C) -> half the grid, both wider.

    (Huang et al., LightViT, 2022, section 3.4.)
    """

    def __init__(self, rank: int, dim: int, out_dim: int) -> None:
        super().__init__()
        self.merge = PatchMerging(rank, dim, out_dim)
        self.shortcut = nn.Linear(dim, out_dim, bias=False)
        self.tokens = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, out_dim, bias=False))

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        padded = pad_to_multiple(x, (2,) * (x.ndim - 2))
        for axis in range(1, x.ndim - 1):
            padded = padded.unflatten(axis, (-1, 2)).amax(axis + 1)
        return self.merge(x) + self.shortcut(padded), self.tokens(tokens)


class DualTokenStage(Stage):
    """A stage that carries G along: (B, *grid, C), (B, T, C) -> (B, *grid', C'), (B, T, C')."""

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if isinstance(self.downsample, ResidualMerging):
            x, tokens = self.downsample(x, tokens)
        for block in self.blocks:
            x, tokens = block(x, tokens)
        return x, tokens


class DualTokenViT(Pyramid):
    """A pyramid beside which the global tokens travel, from a learned G at the first stage."""

    undecayed = ("tokens",)

    def __init__(self, dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], *, side: int,
                 **common: Any) -> None:
        super().__init__(dims, depths, heads, **common)
        for number, stage in enumerate(self.stages):
            plain: Any = stage
            self.stages[number] = DualTokenStage(plain.downsample, [*plain.blocks])
        rank = len(plain.blocks[0].site.grid)
        self.tokens = global_tokens(side**rank, dims[0])

    def _stages(self, image: Tensor) -> Any:
        x = self.stem(image)
        tokens: Tensor = self.tokens
        for stage in self.stages:
            x, tokens = stage(x, tokens)
            yield x

    def features(self, image: Tensor) -> list[Tensor]:
        return [x.movedim(-1, 1) for x in self._stages(image)]

    def forward_features(self, image: Tensor) -> Tensor:
        """The last map after the final norm, (B, C, *grid)."""
        for x in self._stages(image):
            last = x
        return self.norm(last).movedim(-1, 1)


def stem(rank: int, in_chans: int, dim: int, stride: int = 8) -> ConvStem:
    """LightViT's: a 3x3 convolution to half the width, three depthwise ones, a last one; the ends and the third halve.

    A `stride` of 4 or 2 leaves out the first halvings.
    """
    half = dim // 2
    strides = [2 if stride >= least else 1 for least in (8, 4, 2)]
    layers = [*conv_norm(rank, in_chans, half, stride=strides[0]), Gelu()]
    for step in (1, 1, strides[1]):
        layers += [*conv_norm(rank, half, half, stride=step, groups=half), Gelu()]
    return ConvStem(*layers, grid_conv(rank, half, dim, 3, stride=strides[2], padding=1), nn.LayerNorm(dim))


SIZES: dict[str, dict[str, Any]] = {
    "dualtoken_vit_t": dict(dims=(48, 96, 192), depths=(2, 4, 4), heads=(2, 4, 8)),
    "dualtoken_vit_s": dict(dims=(64, 128, 256), depths=(2, 6, 4), heads=(2, 4, 8)),
    "dualtoken_vit_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), heads=(1, 2, 4), side=4, patch=2, img_size=32),
}


def dualtoken_vit(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    ratios: Sequence[float] = (8, 4, 4),
    side: int = 7,
    mlp: str = "mix",
    patch: int = 8,
    mixer: Any = None,
    **common: Any,
) -> DualTokenViT:
    """A DualToken-ViT of a size: `side` x `side` global tokens with the MLP `mlp`, "mix" or "normal"."""

    def own(site: Site) -> DualToken:
        return DualToken(site, side, mlp, steps=len(depths) - 1 - site.stage, carried=True)

    def block(site: Site, mixer: nn.Module, drop_path: float) -> DualTokenBlock:
        def gated(dim: int) -> nn.Sequential:
            return nn.Sequential(Mlp(dim, ratios[site.stage]), BiDimensionalGate(dim))

        return DualTokenBlock(site, mixer, drop_path=drop_path, mlp=gated)

    return DualTokenViT(
        dims, depths, heads, side=side, stem=partial(stem, stride=patch), stride=patch, downsample=ResidualMerging,
        block=block, mixer=own, norm=LAYER_NORM, replace=mixer, **common,
    )


# LightViT's names of the shared parts.
GATE: KeyMap = (
    (r"global_reduce\.(.*)", r"whole.\1"),
    (r"local_reduce\.(.*)", r"each.\1"),
    (r"channel_select\.(.*)", r"channels.\1"),
    (r"spatial_select\.(.*)", r"places.\1"),
)
MERGING: KeyMap = (
    (r"norm\.(.*)", r"merge.norm.\1"),
    (r"reduction\.(.*)", r"merge.reduction.\1"),
    (r"res_proj\.(.*)", r"shortcut.\1"),
    (r"norm2\.(.*)", r"tokens.0.\1"),
    (r"proj\.(.*)", r"tokens.1.\1"),
)
STEM: KeyMap = ((r"stem\.(\d.*)", r"\1"), (r"proj\.(.*)", r"12.\1"), (r"norm\.(.*)", r"13.\1"))
