"""SpaRTAN: near and far convolutions for tokens, waves for channels.

Spatial mixing halves the channels, stresses what differs from the mean of the map, and looks at it twice, near (3x3)
and far (two 3x3 of dilation 2); each view is weighed channel by channel:
    u = W_1 x,   u += gamma (u - mean u),   out = W_2 [se(conv_near u), se(conv_far u)].
Channel mixing takes every token for a wave. Amplitude W_a x and phase gelu(W_p x) are multiplied, so are both at the
channel where the token is largest, m = argmax x; pairs of channels are complex numbers, turned by learned ones c:
    z = c (W_a x * gelu(W_p x) + (W_a x)_m gelu(W_p x)_m),   out = W_o se(gelu(bn(conv_3 z))).

Pay, Baskaran, Loo, Wong, See, "SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition",
2025.

Any grid: convolutions pad with zeros; between stages a last odd row or column is left out. Quirks kept: m counts the
channels of x but indexes those of the wider maps, of which it reaches only the first; spatial convolutions are dense in
the first half of the stages, and there the wave's convolution is depthwise, later it has groups of several channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.block import Block
from saccade.parts.convolution import at_least, grid_conv
from saccade.parts.mlp import Gelu
from saccade.parts.norm import BatchNorm, GroupNorm1
from saccade.parts.pyramid import Pyramid
from saccade.parts.squeeze import SqueezeExcite
from saccade.parts.stem import ConvStem

CARD = Card(
    "SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition",
    authors="Pay, Baskaran, Loo, Wong, See",
    year=2025,
    systems=("spartan",),
    arxiv="2507.10999",
    code="henry-pay/SpaRTAN@1715a43",
    licence="Apache-2.0",
    read="code",
    keywords="multi-order spatial mixing, dilated convolution, wave channel aggregation, complex weights, lightweight",
    kinds=("backbone", "mixer"),
    mixers={"multi_order_spatial": "MultiOrderSpatial"},
    params={"spartan_t": 3.8e6},
    top1={"spartan_t": 77.7},
    goldens=("spartan_t", "op_spartan_smixer", "op_spartan_cmixer"),
)


def convolve(
    rank: int, dim: int, out_dim: int, kernel: int = 3, act: type[nn.Module] = Gelu, **options: Any
) -> list[nn.Module]:
    """A convolution without bias, a batch norm (eps 1e-6), an activation."""
    return [grid_conv(rank, dim, out_dim, kernel, bias=False, **options), BatchNorm(out_dim, eps=1e-6), act()]


class MultiOrderSpatial(nn.Module):
    """out = W_2 [se(conv_near u), se(conv_far u)], u = v + gamma (v - mean v), v = W_1 x: (B, *grid, C) -> the same.

    `groups` of the convolutions on C / 2 channels (None: depthwise). Raises SaccadeError where 8 does not divide C.
    (Pay et al., SpaRTAN, 2025.)
    """

    ranks = (1, 2, 3)
    template = Template("w[j - i], near and far", "squeeze and excitation", "sums of x less its mean")

    def __init__(self, site: Site, groups: int | None = None) -> None:
        super().__init__()
        if site.dim % 8:
            raise SaccadeError(f"{site.dim} channels: two halves, squeezed by 4, need a multiple of 8")
        half = site.dim // 2
        self.groups = groups or half
        self.enter = nn.Linear(site.dim, half)
        self.gamma = nn.Parameter(torch.full((half,), 1e-5))
        near = partial(convolve, site.rank, half, half, groups=self.groups)
        self.near = nn.Sequential(*near(padding=1))
        self.far = nn.Sequential(near(padding=2, dilation=2)[0], *near(padding=2, dilation=2))
        self.weigh_near = SqueezeExcite(half, half // 4)
        self.weigh_far = SqueezeExcite(half, half // 4)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        u = self.enter(x)
        mean = u.flatten(1, -2).mean(1).view(u.shape[0], *[1] * (u.ndim - 2), -1)
        u = u + self.gamma * (u - mean)
        return self.proj(torch.cat([self.weigh_near(self.near(u)), self.weigh_far(self.far(u))], -1))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: N C^2 3 / 2, three convolutions of N C / 2 3^rank (C / 2 / groups), the two weighings."""
        half = site.dim // 2
        convolutions = 3 * half * 3**site.rank * half // self.groups
        return prod(grid) * (site.dim**2 * 3 // 2 + convolutions) + 4 * half * (half // 4)

    def reach(self, site: Site) -> None:
        """Every token reaches every other, through the means."""
        return None


class WaveAggregation(nn.Module):
    """Channels as waves: (B, *grid, C) -> (B, *grid, C), hidden width `ratio` C. `grouped` ties C groups of `ratio`.

    (Pay et al., SpaRTAN, 2025.)
    """

    def __init__(self, rank: int, dim: int, ratio: int, grouped: bool) -> None:
        super().__init__()
        hidden = dim * ratio
        self.phase, self.amplitude = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.turn = nn.Parameter(torch.randn(hidden // 2, 2))
        self.local = nn.Sequential(*convolve(rank, hidden, hidden, padding=1, groups=dim if grouped else hidden))
        self.weigh = SqueezeExcite(hidden, dim // 4)
        self.proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        largest = x.argmax(-1, keepdim=True)
        wave, phase = self.amplitude(x), nn.functional.gelu(self.phase(x))
        wave = wave * phase + wave.gather(-1, largest) * phase.gather(-1, largest)
        (real, imaginary), (cosine, sine) = wave.unflatten(-1, (-1, 2)).unbind(-1), self.turn.unbind(-1)
        turned = [real * cosine - imaginary * sine, real * sine + imaginary * cosine]
        return self.proj(self.weigh(self.local(torch.stack(turned, -1).flatten(-2))))


class Downsample(nn.Sequential):
    """2x2 patches, a batch norm, SiLU; a side of one token is zero-padded to two."""

    def __init__(self, rank: int, dim: int, out_dim: int) -> None:
        super().__init__(*convolve(rank, dim, out_dim, 2, nn.SiLU, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(at_least(x, 2, first=1))


SIZES: dict[str, dict[str, Any]] = {
    "spartan_t": dict(dims=(32, 64, 128, 256), depths=(3, 3, 12, 2), ratios=(4, 4, 2, 2)),
    "spartan_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), ratios=(4, 2, 2), patch=2, img_size=32),
}


def spartan(
    dims: Sequence[int], depths: Sequence[int], ratios: Sequence[int], patch: int = 4, mixer: Any = None, **common: Any
) -> Pyramid:
    """A SpaRTAN of a size; heads of 32 channels for the mixers that want some."""
    middle = len(dims) // 2

    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        return ConvStem(*convolve(rank, in_chans, dim // 2, stride=2, padding=1),
                        *convolve(rank, dim // 2, dim, stride=patch // 2, padding=1))

    def own(site: Site) -> MultiOrderSpatial:
        return MultiOrderSpatial(site, 1 if site.stage < middle else None)

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        channels = partial(WaveAggregation, site.rank, ratio=ratios[site.stage], grouped=site.stage >= middle)
        return Block(site, mixer, drop_path=drop_path, norm=partial(GroupNorm1, eps=1e-6), mlp=channels,
                     layer_scale=1e-5)

    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims], stem=stem, stride=patch, downsample=Downsample, block=block,
        mixer=own, replace=mixer, **common,
    )


def _linear(theirs: str, ours: str) -> KeyMap:
    """A 1x1 convolution as a linear layer."""
    return ((rf"{theirs}\.weight", f"{ours}.weight", matrix_from_1x1), (rf"{theirs}\.bias", f"{ours}.bias"))


def _weighing(theirs: str, ours: str) -> KeyMap:
    return (*_linear(rf"{theirs}\.squeeze", f"{ours}.fc1"), *_linear(rf"{theirs}\.expand", f"{ours}.fc2"))


def _normed(theirs: str, ours: str, first: int = 0) -> KeyMap:
    return ((rf"{theirs}\.conv\.(.*)", rf"{ours}.{first}.\1"), (rf"{theirs}\.norm\.(.*)", rf"{ours}.{first + 1}.\1"))


def _turn(weight: Tensor) -> Tensor:
    """(1, 1, 1, pairs, 2) as (pairs, 2)."""
    return weight.flatten(0, -2)


SPATIAL: KeyMap = (
    ("gamma", "gamma", torch.flatten), *_linear("proj_in", "enter"), *_linear("proj_out", "proj"),
    *_normed("h_conv", "near"), (r"l_conv\.0\.conv\.(.*)", r"far.0.\1"), *_normed(r"l_conv\.1", "far", 1),
    *_weighing("h_attn", "weigh_near"), *_weighing("l_attn", "weigh_far"),
)
CHANNEL: KeyMap = (
    ("complex", "turn", _turn), *_linear("theta", "phase"), *_linear("proj", "amplitude"), *_linear("proj_out", "proj"),
    *_normed("conv", "local"), *_weighing("attn", "weigh"),
)


def authors(depths: Sequence[int]) -> KeyMap:
    """The authors' names for these depths: they count blocks and the layers between stages in one row."""
    rules: list[Any] = [*_normed(r"conv\.0", "stem"), *_normed(r"conv\.1", "stem", 3), (r"linear\.(.*)", r"head.fc.\1")]
    block = (*within(SPATIAL, r"smixer\.", "mixer."), *within(CHANNEL, r"cmixer\.", "mlp."),
             (r"norm_(\d)\.(.*)", r"norm\1.\2"), (r"scale_(\d)", r"scale\1.0.gamma", torch.flatten))
    layer = 0
    for stage, depth in enumerate(depths):
        if stage:
            rules += _normed(rf"layers\.{layer}", f"stages.{stage}.downsample")
            layer += 1
        for index in range(depth):
            rules += within(block, rf"layers\.{layer}\.", f"stages.{stage}.blocks.{index}.")
            layer += 1
    return rules


AUTHORS: KeyMap = authors(SIZES["spartan_t"]["depths"])
TAPS = {"stem": "stem", r"stage(\d)": r"stages.\1"}
