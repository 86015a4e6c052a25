"""AFFNet: global token mixing by filters that each image makes for its own spectrum.

A product of spectra is a circular convolution as wide as the map. Here the filter is computed from the spectrum itself,
    X = F(x);   M = shrink(W2 act(W1 X + b1) + b2);   out = x + F^-1(M * X),
with complex block-diagonal W1, W2 (8 blocks), act on real and imaginary parts apart, and soft shrinkage by 0.01 that
puts weak frequencies to zero: dynamic global convolution at the price of two Fourier transforms. The network is
MobileViT's with filters in place of attention.

Huang, Zhang, Lan, Zha, Lu, Guo, "Adaptive Frequency Filters As Efficient Global Token Mixers", 2023, section 3.

Any grid: the filter is made at each frequency by itself, so nothing belongs to a size.
Quirks kept: in a block the inverted residual stands before the filter and keeps its own shortcut; the mixer adds its
input; the last width is at most 960. Transforms are taken in float32 at least.
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
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.spectral import complex_product, fourier, inverse_fourier, spectrum_size
from saccade.parts.block import residual_tail
from saccade.parts.convolution import conv_norm
from saccade.parts.mbconv import InvertedResidual
from saccade.parts.norm import BatchNorm, GroupNorm1
from saccade.parts.pyramid import Pyramid, Stage
from saccade.parts.squeeze import divisible
from saccade.parts.stem import ConvStem

CARD = Card(
    "Adaptive Frequency Filters As Efficient Global Token Mixers",
    authors="Huang, Zhang, Lan, Zha, Lu, Guo",
    year=2023,
    systems=("affnet",),
    arxiv="2307.14008",
    code="microsoft/TokenMixers@99dbe38",
    licence="MIT",
    read="paper, code",
    keywords="adaptive frequency filter, Fourier transform, dynamic global convolution, MobileViT, lightweight",
    kinds=("backbone", "mixer"),
    mixers={"adaptive_frequency_filter": "AdaptiveFrequencyFilter"},
    params={"affnet_et": 1.4e6, "affnet_t": 2.6e6, "affnet": 5.5e6},
    macs={"affnet_et": 0.4e9, "affnet_t": 0.8e9, "affnet": 1.5e9},
    top1={"affnet_et": 73.0, "affnet_t": 77.0, "affnet": 79.8},
    weights={name: Weights(f"https://drive.google.com/drive/folders/{folder}?usp=drive_link")
             for name, folder in (("affnet_et", "1q134GgWljvkvX2i_miEMlRcZ3CU9JK-V"),
                                  ("affnet_t", "1yM_4bqTQdjjmBwIvlktYpuOvLgB8OhX7"),
                                  ("affnet", "14MZ4QND009KqTmeFBpBnVVDSx7FfiKMi"))},
    goldens=("affnet_et", "op_adaptive_frequency_filter", "op_aff_block"),
)


class AdaptiveFrequencyFilter(nn.Module):
    """out = x + F^-1(M(F(x)) * F(x)), M a two-layer complex map at each frequency: (B, *grid, C) -> (B, *grid, C)."""

    ranks = (1, 2, 3)
    template = Template("Fourier: P(x) = F^-1 diag(m(F x)) F, m an MLP", "none", "x added")

    def __init__(
        self,
        site: Site,
        blocks: int = 8,
        threshold: float = 0.01,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        if site.dim % blocks:
            raise SaccadeError(f"blocks={blocks} do not divide {site.dim} channels; choose a divisor")
        self.blocks, self.threshold = blocks, threshold
        width = site.dim // blocks
        self.w1 = nn.Parameter(torch.randn(2, blocks, width, width) * 0.02)
        self.b1 = nn.Parameter(torch.randn(2, blocks, width) * 0.02)
        self.activation = activation()
        self.w2 = nn.Parameter(torch.randn(2, blocks, width, width) * 0.02)
        self.b2 = nn.Parameter(torch.randn(2, blocks, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        spectrum = fourier(x.to(precise))
        # A complex matrix is a real one on (real, imaginary): one product a block, on (blocks, B x frequencies, 2 C').
        parts = spectrum.unflatten(-2, (self.blocks, -1)).flatten(0, -4).transpose(0, 1)
        parts = parts.transpose(-1, -2).flatten(-2)
        hidden = self.activation(torch.baddbmm(*self._layer(self.b1, self.w1, parts)))
        filters = F.softshrink(torch.baddbmm(*self._layer(self.b2, self.w2, hidden)), self.threshold).to(precise)
        filters = filters.unflatten(-1, (2, -1)).permute(1, 0, 3, 2).reshape(spectrum.shape)
        return x + inverse_fourier(complex_product(filters, spectrum), tuple(x.shape[1:-1])).to(x.dtype)

    @staticmethod
    def _layer(bias: Tensor, weight: Tensor, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `baddbmm` takes: b, (real, imaginary), and the real form [[R, I], [-I, R]] of the weight R + iI."""
        real, imaginary = weight.to(parts.dtype)
        matrix = torch.cat([torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)], -2)
        return bias.to(parts.dtype).movedim(0, 1).flatten(1)[:, None], parts, matrix

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 8 C^2 / blocks at each frequency; the transforms' own are not counted."""
        return 8 * prod(spectrum_size(grid)) * site.dim**2 // self.blocks

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


class FrequencyBlock(nn.Module):
    """x + tail(mixer(norm(inverted residual(norm(x)))))."""

    def __init__(self, site: Site, mixer: nn.Module, drop_path: float = 0.0, ratio: float = 2.0) -> None:
        super().__init__()
        self.site = site
        self.norm1 = GroupNorm1(site.dim)
        self.local = inverted(site.rank, site.dim, site.dim, ratio)
        self.norm2 = GroupNorm1(site.dim)
        self.mixer = mixer
        self.tail = residual_tail(site.dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.mixer(self.norm2(self.local(self.norm1(x)))))


class FusedStage(Stage):
    """Downsampling, blocks, norm and projection, fused with the map before the blocks."""

    def __init__(self, stage: Stage, dim: int) -> None:
        super().__init__(stage.downsample, [*stage.blocks], GroupNorm1(dim))
        self.project = nn.Sequential(nn.Linear(dim, dim, bias=False), BatchNorm(dim))
        self.fuse = nn.Sequential(nn.Linear(2 * dim, dim, bias=False), BatchNorm(dim), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        return self.fuse(torch.cat([x, self.project(self.norm(self.blocks(x)))], -1))


def inverted(rank: int, dim: int, out_dim: int, ratio: float, stride: int = 1) -> InvertedResidual:
    """The authors' inverted residual: hidden widths of multiples of 8, SiLU."""
    return InvertedResidual(rank, dim, out_dim, divisible(round(dim * ratio)), stride=stride, expand=ratio != 1,
                            activation=nn.SiLU)


class AffNet(Pyramid):
    """A pyramid of strides 2 to 32; `counts` are the inverted residuals a stage begins with, `depths` the filters."""

    def __init__(self, dims: Sequence[int], depths: Sequence[int], counts: Sequence[int], ratio: float, stem: int,
                 **common: Any) -> None:
        def residuals(stage: int, stride: int, rank: int, dim: int, out_dim: int) -> list[nn.Module]:
            return [inverted(rank, out_dim if index else dim, out_dim, ratio, 1 if index else stride)
                    for index in range(counts[stage])]

        def image(rank: int, in_chans: int, dim: int) -> ConvStem:
            return ConvStem(*conv_norm(rank, in_chans, stem, stride=2), nn.SiLU(), *residuals(0, 1, rank, stem, dim))

        def lower(stage: int) -> Callable[[int, int, int], nn.Module]:
            return lambda rank, dim, out_dim: nn.Sequential(*residuals(stage, 2, rank, dim, out_dim))

        super().__init__(dims, depths, [1] * len(dims), stem=image, stride=2, block=FrequencyBlock,
                         downsample=[lower(stage) for stage in range(1, len(dims))], norm=self._widen, **common)
        for stage, depth in enumerate(depths):
            if depth:
                plain: Any = self.stages[stage]
                self.stages[stage] = FusedStage(plain, dims[stage])
        self.num_features = min(4 * dims[-1], 960)
        self.reset_classifier(self.num_classes)

    @staticmethod
    def _widen(dim: int) -> nn.Module:
        wide = min(4 * dim, 960)
        return nn.Sequential(nn.Linear(dim, wide, bias=False), BatchNorm(wide), nn.SiLU())


_DEEP: dict[str, Any] = dict(depths=(0, 0, 2, 4, 3), counts=(1, 3, 1, 1, 1), img_size=256)
SIZES: dict[str, dict[str, Any]] = {
    "affnet_et": dict(dims=(32, 48, 64, 104, 144), ratio=2) | _DEEP,
    "affnet_t": dict(dims=(32, 48, 96, 160, 192), ratio=4) | _DEEP,
    "affnet": dict(dims=(32, 64, 128, 256, 320), ratio=4) | _DEEP,
    "affnet_nano": dict(dims=(16, 32, 64), depths=(0, 2, 2), counts=(1, 1, 1), ratio=2, img_size=32),
}


def affnet(
    dims: Sequence[int],
    depths: Sequence[int],
    counts: Sequence[int],
    ratio: float,
    stem: int = 16,
    activation: Callable[[], nn.Module] = nn.SiLU,
    mixer: Any = None,
    **common: Any,
) -> AffNet:
    """An AFFNet of a size: `counts` inverted residuals, of `ratio` times the width, and `depths` filters a stage."""
    return AffNet(dims, depths, counts, ratio, stem, mixer=partial(AdaptiveFrequencyFilter, activation=activation),
                  replace=mixer, **common)


def _layer(theirs: str, ours: str, matrix: bool = False) -> KeyMap:
    """A convolution and its norm as the first two layers of an nn.Sequential; a 1x1 becomes a matrix."""
    weight: Any = (rf"{theirs}\.block\.conv\.weight", f"{ours}.0.weight", *((matrix_from_1x1,) if matrix else ()))
    return (weight, (rf"{theirs}\.block\.norm\.(.*)", rf"{ours}.1.\1"))


INVERTED: KeyMap = (*_layer(r"block\.exp_1x1", "expand", True), *_layer(r"block\.conv_3x3", "depthwise"),
                    *_layer(r"block\.red_1x1", "shrink", True))
BLOCK: KeyMap = (*within(INVERTED, r"mlp\.", "local."), (r"filter\.(.*)", r"mixer.\1"))
_STAGE: KeyMap = (
    *within((*BLOCK, (r"(norm\d\..*)", r"\1")), r"global_rep\.(\d+)\.", r"blocks.\1."),
    (r"global_rep\.\d+\.(weight|bias)", r"norm.\1"),
    *_layer("conv_proj", "project", True),
    *_layer("fusion", "fuse", True),
)
AUTHORS: KeyMap = (
    *_layer("conv_1", "stem"),
    *within(INVERTED, r"layer_1\.0\.", "stem.3."),
    *(rule for stage in range(1, 5) for index in range(3)
      for rule in within(INVERTED, rf"layer_{stage + 1}\.{index}\.", f"stages.{stage}.downsample.{index}.")),
    *(rule for stage in range(2, 5) for rule in within(_STAGE, rf"layer_{stage + 1}\.1\.", f"stages.{stage}.")),
    *_layer("conv_1x1_exp", "norm", True),
    (r"classifier\.fc\.(.*)", r"head.fc.\1"),
)
TAPS = {"layer_1": "stem"} | {f"layer_{stage + 1}": f"stages.{stage}" for stage in range(1, 5)}
