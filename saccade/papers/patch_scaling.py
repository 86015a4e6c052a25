"""Adventurer down to pixels: an image is worth 50,176 tokens.

A causal image model reads the tokens of an image in one direction with Mamba-2, so that cost grows with their number
alone, and patches can shrink to single pixels: 16, 8, 4, 2, 1 a side. What a causal scan lacks, two tricks make up for:
the mean of all tokens stands before the first of them, so that the first too knows of all; and some blocks read the
sequence from its end. The class token comes last and has seen everything. A block is
    x += mixer([mean(norm(x)), norm(x)] without its first),    x += w3(silu(w1 norm(x)) w2 norm(x)).
The other half of the study, ViT on small patches, is `create_model("deit_base_patch16_224", patch=...)`.

Wang et al., "Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More", 2025; the backbone:
Wang et al., "Causal Image Modeling for Efficient Visual Understanding", 2024 (Adventurer).

Any grid: the position table is resampled (bicubic); images that are no multiple of the patch are zero-padded at their
end.
Quirks kept: only blocks 2 and 3 read from the end, though every second pair was meant to; the class token stays last.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import create_mixer
from saccade.core.card import Card, Weights
from saccade.core.index import paper_module
from saccade.core.keymap import KeyMap, within, without_first_axis
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.plain import Plain, TokenBlock
from saccade.parts.ssm import RMSNorm

_PATCHES = (16, 8, 4, 2, 1)

CARD = Card(
    "Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More",
    authors="Wang, Yu, Wei, Shao, Zhou, Yuille, Xie",
    year=2025,
    systems=("patch_scaling",),
    arxiv="2502.03738, 2410.07599",
    code="wangf3014/Patch_Scaling@fb8cce8",
    read="paper",
    keywords="pixel tokens, patch size scaling, Adventurer, Mamba-2, causal image model, mean token",
    kinds=("backbone", "mixer"),
    mixers={"causal_image": "CausalImage"},
    params={"adventurer_tiny_patch16": 12e6, "adventurer_small_patch16": 44e6, "adventurer_base_patch16": 99e6,
            "adventurer_large_patch16": 346e6},
    top1={"adventurer_base_patch1": 84.6},
    weights={
        f"adventurer_{size}_patch1": Weights(f"hf:Wangf3014/Patch_Scaling/adventurer_{size}_patch1_224.pth", crop=1.0,
                                             top1=top1)
        for size, top1 in (("tiny", 81.9), ("small", 83.8), ("base", 84.6))
    },
    goldens=("adventurer_tiny_patch16",),
    tests=("tests/papers/test_patch_scaling.py",),
)


class CausalImage(nn.Module):
    """Mamba-2 on [mean of all, grid tokens, prefix tokens]: (B, *grid, C) -> (B, *grid, C), the mean left out again.

    With `backwards` (blocks 2 and 3 unless given) the grid tokens are read from their end; prefix tokens stay last.
    """

    ranks, prefix = (1, 2, 3), True
    projections = ("scan.in_proj", "scan.out_proj")
    template = Template("state space dual: C_i B_j^T a_(i..j), j <= i", "decays a in (0, 1)", "sum of x, gated, normed")

    def __init__(self, site: Site, backwards: bool | None = None, **options: Any) -> None:
        super().__init__()
        self.backwards = site.index // 2 == 1 if backwards is None else backwards
        self.scan = create_mixer("mamba2", site, **options)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        grid, tokens = tuple(x.shape[1:-1]), x.flatten(1, -2)
        count = tokens.shape[1]
        tokens = tokens.flip(1) if self.backwards else tokens
        tokens = tokens if prefix is None else torch.cat([tokens, prefix], 1)
        mixed = self.scan(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))[:, 1:]
        out = mixed[:, :count].flip(1) if self.backwards else mixed[:, :count]
        out = out.unflatten(1, grid).contiguous()
        return out if prefix is None else (out, mixed[:, count:])

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds of Mamba-2 on one token more."""
        return self.scan.cost(site, (torch.Size(grid).numel() + prefix + 1,))  # type: ignore[operator]

    def reach(self, site: Site) -> None:
        """A token reaches every later one, and by the mean every other."""
        return None


class SwiGlu(nn.Module):
    """w3(silu(w1 x) * w2 x), hidden width `ratio` C. (Shazeer, "GLU Variants Improve Transformer", 2020.)"""

    def __init__(self, dim: int, ratio: float = 2.5) -> None:
        super().__init__()
        hidden = int(ratio * dim)
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LastBlock(TokenBlock):
    """A block on grid tokens and, behind them, prefix tokens: (B, N + P, C)."""

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        normed = self.norm1(tokens)
        end = tokens.shape[1] - count
        x, prefix = self.mixer(normed[:, :end].unflatten(1, grid), prefix=normed[:, end:])
        tokens = tokens + self.scale1(torch.cat([x.flatten(1, -2), prefix], 1))
        return tokens + self.scale2(self.mlp(self.norm2(tokens)))


class Adventurer(Plain):
    """A Plain whose class token comes last: (B, N + 1, C)."""

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The sequence (B, N + 1, C) that enters the first block, and the grid of its N tokens."""
        tokens, grid = super().tokens(image)
        return tokens.roll(-1, 1), grid

    def features(self, image: Tensor) -> list[Tensor]:
        """The map of grid tokens after each block, (B, C, *grid), channels-last in memory."""
        tokens, grid = self.tokens(image)
        maps = []
        for block in self.blocks:
            tokens = block(tokens, 1, grid)
            maps.append(tokens[:, : tokens.shape[1] - 1].unflatten(1, grid).movedim(-1, 1))
        return maps

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Class scores from the class token (or the mean of the grid tokens)."""
        return super().forward_head(tokens.roll(1, 1))


SIZES: dict[str, dict[str, Any]] = {
    f"adventurer_{size}_patch{patch}": dict(dim=dim, depth=depth, patch=patch)
    for size, dim, depth in (("tiny", 256, 12), ("small", 512, 12), ("base", 768, 12), ("large", 1024, 24))
    for patch in _PATCHES
} | {"adventurer_nano": dict(dim=64, depth=4, patch=4, img_size=32)}


def patch_scaling(dim: int, depth: int, patch: int = 16, mixer: Any = None, **common: Any) -> Adventurer:
    """An Adventurer of a size on patches of a side."""

    def block(site: Site, mixer: nn.Module, **options: Any) -> LastBlock:
        return LastBlock(site, mixer, mlp=SwiGlu, **options)

    return Adventurer(dim, depth, dim // 64, patch=patch, mixer=CausalImage, block=block, norm=RMSNorm, replace=mixer,
                      **common)


def last_first(table: Tensor) -> Tensor:
    """A position table (1, N + 1, C) whose class token comes last, with it first."""
    return table.roll(1, 1)


AUTHORS: KeyMap = (
    ("cls_token", "prefix", without_first_axis),
    ("pos_embed", "position", last_first),
    (r"patch_embed\.(.*)", r"stem.\1"),
    *within((*paper_module("mamba2").AUTHORS, (r"(.*)", r"\1")), r"layers\.(\d+)\.mixer\.", r"blocks.\1.mixer.scan."),
    (r"layers\.(\d+)\.norm\.(.*)", r"blocks.\1.norm1.\2"),
    (r"layers\.(\d+)\.norm_mlp\.(.*)", r"blocks.\1.norm2.\2"),
    (r"layers\.(\d+)\.(.*)", r"blocks.\1.\2"),
    (r"norm_f\.(.*)", r"norm.\1"),
)
TAPS = {r"layer(\d+)": r"blocks.\1"}
