"""NiNformer: a small MLP-Mixer inside each block makes the gate of its tokens.

MLP-Mixer adds what it mixes, with weights that no content changes. Here a whole Mixer block computes, from the normed
tokens, a gate for each entry of a linear map of the same tokens:
    y = x + MLP_tokens(norm(x));   y += MLP_channels(norm(y));   out = (x W) * y.
The result of token mixing thus multiplies content, as attention's weights do, at linear cost in the tokens for a fixed
hidden width.

Abdullah and Aydin, "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function", 2024,
section 3.

Any grid: the token MLP has weights for the tokens of the native grid; they are resampled (bicubic) to another, and what
reads is scaled so that the sum over tokens keeps its size. The authors' code runs on the native grid alone.
Quirks kept: one norm (the same parameters) before the gating unit and before the feed-forward network; no position, no
final norm, the mean is classified.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import KeyMap, within
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.isotropic import Isotropic, OneNormBlock
from saccade.parts.mlp import Mlp
from saccade.parts.position import is_native, resample

CARD = Card(
    "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
    authors="Abdullah, Aydin",
    year=2024,
    systems=("ninformer",),
    arxiv="2403.02411",
    code="Abdullah-88/NiNformer@0ec85d4",
    licence="BSD-3-Clause",
    read="paper, code",
    keywords="MLP-Mixer, token mixing, gating, network in network, attention-free",
    kinds=("backbone", "mixer"),
    mixers={"mixer_gating": "MixerGating"},
    goldens=("ninformer_cifar10", "op_ninformer_mixer_gating_unit"),
    tests=("tests/papers/test_ninformer.py",),
)


class TokenMlp(nn.Module):
    """W2 gelu(W1^T x + b1) + b2 along the tokens, each channel alone: (B, *grid, C) -> (B, N, C).

    W1, W2 (N, hidden) and b2 (N, 1) have a row a token of the native grid.
    """

    def __init__(self, grid: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.grid, tokens = grid, prod(grid)
        self.reads = nn.Parameter(torch.empty(tokens, hidden))
        self.read_bias = nn.Parameter(torch.zeros(hidden, 1))
        self.writes = nn.Parameter(torch.empty(tokens, hidden))
        self.write_bias = nn.Parameter(torch.zeros(tokens, 1))
        for weight in (self.reads, self.writes):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        reads: Tensor = self.reads
        writes: Tensor = self.writes
        bias: Tensor = self.write_bias
        if not is_native(grid, self.grid):
            reads = tokens_at(reads, self.grid, grid) * (prod(self.grid) / prod(grid))
            writes, bias = tokens_at(writes, self.grid, grid), tokens_at(bias, self.grid, grid)
        hidden = F.gelu(reads.T @ x.flatten(1, -2) + self.read_bias)  # (B, hidden, C)
        return writes @ hidden + bias

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The rows of a square grid of another side, for this grid."""
        side = round(value.shape[0] ** (1 / len(self.grid)))
        if parameter == "read_bias" or side ** len(self.grid) != value.shape[0]:
            return value
        moved = tokens_at(value, (side,) * len(self.grid), self.grid)
        return moved * (value.shape[0] / prod(self.grid)) if parameter == "reads" else moved


def tokens_at(rows: Tensor, native: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Weights with a row a token of the grid `native`, resampled: (N, K) -> (N', K)."""
    return resample(rows.unflatten(0, native)[None], grid)[0].flatten(0, -2)


class MixerGating(nn.Module):
    """out = (x W) * y, the gate y a Mixer block of x: (B, *grid, C) -> (B, *grid, C).

    Both MLPs have hidden widths in multiples of C.
    """

    ranks = (1, 2, 3)
    template = Template("w[i, j] of the place, in a Mixer block", "none", "gate of sums of x, times x W")

    def __init__(self, site: Site, token_ratio: float = 2.0, channel_ratio: float = 2.0) -> None:
        super().__init__()
        self.proj = nn.Linear(site.dim, site.dim)
        self.norm1 = nn.LayerNorm(site.dim)
        self.tokens = TokenMlp(site.grid, int(site.dim * token_ratio))
        self.norm2 = nn.LayerNorm(site.dim)
        self.channels = Mlp(site.dim, channel_ratio)

    def forward(self, x: Tensor) -> Tensor:
        gate = x + self.tokens(self.norm1(x)).view_as(x)
        gate = gate + self.channels(self.norm2(gate))
        if recording():
            note(gate.flatten(1, -2).transpose(1, 2).unsqueeze(-1))  # (B, C, N, 1)
        return self.proj(x) * gate

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of N tokens, hidden widths t and c: N C (C + 2 t + 2 c)."""
        hidden = self.tokens.reads.shape[1] + self.channels.fc1.out_features
        return prod(grid) * site.dim * (site.dim + 2 * hidden)

    def reach(self, site: Site) -> None:
        """Every token has a part in every gate."""
        return None


SIZES: dict[str, dict[str, Any]] = {
    "ninformer_cifar10": dict(dim=256, depth=4, patch=4, img_size=32, num_classes=10),
    "ninformer_nano": dict(dim=64, depth=2, patch=4, img_size=32),
}


def ninformer(dim: int, depth: int, patch: int, ratio: float = 2.0, mixer: Any = None, **common: Any) -> Isotropic:
    """A NiNformer; `ratio` is that of all its MLPs."""

    def block(site: Site, built: nn.Module, drop_path: float, **_: Any) -> OneNormBlock:
        return OneNormBlock(site, built, drop_path=drop_path, mlp=partial(Mlp, ratio=ratio))

    own = partial(MixerGating, token_ratio=ratio, channel_ratio=ratio)
    return Isotropic(dim, depth, max(dim // 32, 1), patch=patch, mixer=own, block=block, norm=nn.Identity,
                     replace=mixer, **common)


def _column(bias: Tensor) -> Tensor:
    return bias.unsqueeze(-1)


MIXER: KeyMap = (
    (r"Mixer\.token_mix\.0\.(.*)", r"norm1.\1"),
    (r"Mixer\.token_mix\.2\.net\.0\.weight", "tokens.reads", torch.t),
    (r"Mixer\.token_mix\.2\.net\.0\.bias", "tokens.read_bias", _column),
    (r"Mixer\.token_mix\.2\.net\.3\.weight", "tokens.writes"),
    (r"Mixer\.token_mix\.2\.net\.3\.bias", "tokens.write_bias", _column),
    (r"Mixer\.channel_mix\.0\.(.*)", r"norm2.\1"),
    (r"Mixer\.channel_mix\.1\.net\.0\.(.*)", r"channels.fc1.\1"),
    (r"Mixer\.channel_mix\.1\.net\.3\.(.*)", r"channels.fc2.\1"),
    (r"proj\.(.*)", r"proj.\1"),
)
AUTHORS: KeyMap = (
    *within(MIXER, r"model\.(\d+)\.mgu\.", r"blocks.\1.mixer."),
    (r"model\.(\d+)\.ffn\.net\.0\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"model\.(\d+)\.ffn\.net\.3\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"model\.(\d+)\.(.*)", r"blocks.\1.\2"),
    (r"patcher\.(.*)", r"stem.proj.\1"),
    (r"classifier\.(.*)", r"head.\1"),
)
TAPS = {r"block(\d+)": r"blocks.\1"}
