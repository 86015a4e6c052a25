"""SpectFormer: filters in the frequency domain first, attention later.

Early layers want the whole map but no content: a spectral gate multiplies its Fourier transform by learned weights, one
complex number a frequency and channel,
    out = F^-1(w * F(x)),
which is a circular convolution as wide as the map. Late layers attend. The plain form puts four spectral blocks, of one
residual branch x + mlp(norm(gate(norm(x)))), before a ViT's; the hierarchical form (`h`) has two stages of each kind in
Wave-ViT's pyramid.

Patro, Namboodiri, Agneeswaran, "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", 2023,
section 3.

Any grid: weights belong to the native grid's frequencies and are resampled (linearly, corners aligned) to others; the
authors' code runs on the native grid alone.
Quirks kept: only the plain form's spectral blocks have a single residual. Not kept: six heads whatever the width, with
which two of the plain models do not run as published; ours have 64 channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.spectral import global_filter, resample_spectrum, spectrum_size
from saccade.parts.attention import Attention
from saccade.parts.labelled_pyramid import LabelledPyramid, wavevit_names
from saccade.parts.plain import Plain, TokenBlock

_PLAIN = ("spectformer_t", "spectformer_xs", "spectformer_s", "spectformer_b")
_PYRAMIDS = ("spectformer_h_s", "spectformer_h_b", "spectformer_h_l")

CARD = Card(
    "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
    authors="Patro, Namboodiri, Agneeswaran",
    year=2023,
    systems=("spectformer",),
    arxiv="2304.06446",
    code="badripatro/SpectFormers@b6cf487",
    licence="unknown",
    read="paper",
    keywords="spectral gating, Fourier transform, global filter, frequency domain, token labelling",
    kinds=("backbone", "mixer"),
    mixers={"spectral_gating": "SpectralGating"},
    params=dict(zip((*_PLAIN, *_PYRAMIDS), (9e6, 20e6, 32e6, 57e6, 22.2e6, 33.1e6, 54.7e6), strict=True)),
    macs=dict(zip((*_PLAIN, *_PYRAMIDS), (1.8e9, 4.0e9, 6.6e9, 11.5e9, 3.9e9, 6.3e9, 12.7e9), strict=True)),
    top1=dict(zip((*_PLAIN, *_PYRAMIDS), (76.9, 80.2, 81.7, 82.1, 84.3, 85.1, 85.7), strict=True)),
    goldens=("spectformer_xs", "spectformer_h_s", "op_spectral_gating"),
    tests=("tests/papers/test_spectformer.py",),
)


class SpectralGating(nn.Module):
    """out = F^-1(w * F(x)), F the orthonormal Fourier transform over the grid: (B, *grid, C) -> (B, *grid, C).

    The weights (*frequencies, C, 2) belong to the native grid.
    """

    ranks = (1, 2, 3)
    template = Template("Fourier: P = F^-1 diag(w) F", "none", "sum of x")
    undecayed = ("filter",)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(*spectrum_size(site.grid), site.dim, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return global_filter(x, self.filter).contiguous()  # Fourier transforms choose their own layout

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The weights of another grid, for this one."""
        return resample_spectrum(value, tuple(self.filter.shape[:-2]))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Products a frequency and Fourier transforms are not counted as multiply-adds."""
        return 0

    def reach(self, site: Site) -> None:
        """The filter is as wide as the map."""
        return None


class SpectralBlock(TokenBlock):
    """x += tail(mlp(norm(mixer(norm(x))))): one residual branch, without prefix tokens."""

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        mixed = self.mixer(self.norm1(tokens).unflatten(1, grid)).flatten(1, -2)
        return tokens + self.scale2(self.mlp(self.norm2(mixed)))


def _hierarchical(dims: Sequence[int], depths: Sequence[int], hidden: int, **options: Any) -> dict[str, Any]:
    heads = [dim // 32 for dim in dims]
    return dict(builder="spectformer_h", dims=dims, depths=depths, heads=heads, hidden=hidden) | options


SIZES: dict[str, dict[str, Any]] = {
    "spectformer_t": dict(dim=256, depth=12),
    "spectformer_xs": dict(dim=384, depth=12),
    "spectformer_s": dict(dim=384, depth=19),
    "spectformer_b": dict(dim=512, depth=19),
    "spectformer_h_s": _hierarchical((64, 128, 320, 448), (3, 4, 6, 3), 32),
    "spectformer_h_b": _hierarchical((64, 128, 320, 512), (3, 4, 12, 3), 64),
    "spectformer_h_l": _hierarchical((96, 192, 384, 512), (3, 6, 18, 3), 64),
    "spectformer_nano": dict(dim=64, depth=4, spectral=2, patch=4, img_size=32),
    "spectformer_h_nano": _hierarchical((32, 64, 128), (1, 2, 2), 16, spectral=1, ratios=(4, 4, 2), patch=2,
                                        img_size=32),
}


def spectformer(
    dim: int,
    depth: int,
    spectral: int = 4,
    heads: int | None = None,
    patch: int = 16,
    mixer: Any = None,
    global_pool: str = "avg",
    **common: Any,
) -> Plain:
    """A plain SpectFormer: `spectral` blocks with gates, then attention with heads of 64 channels."""

    def own(site: Site) -> nn.Module:
        return SpectralGating(site) if site.index < spectral else Attention(site)

    def block(site: Site, mixer: nn.Module, **options: Any) -> TokenBlock:
        return (SpectralBlock if site.index < spectral else TokenBlock)(site, mixer, **options)

    return Plain(dim, depth, heads or dim // 64, patch=patch, prefix=0, mixer=own, block=block, global_pool=global_pool,
                 replace=mixer, **common)


def spectformer_h(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    ratios: Sequence[float] = (8, 8, 4, 4),
    hidden: int = 32,
    spectral: int = 2,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> LabelledPyramid:
    """A hierarchical SpectFormer: gates in the first `spectral` stages, then attention; the stem is `hidden` wide."""
    mixers = [SpectralGating if stage < spectral else Attention for stage in range(len(dims))]
    return LabelledPyramid(dims, depths, heads, mixer=mixers, ratios=ratios, hidden=hidden, patch=patch, replace=mixer,
                           **common)


MIXER: KeyMap = (("complex_weight", "filter"), (r"q\.(.*)", r"qkv.\1#0"), (r"kv\.(.*)", r"qkv.\1#1"))
AUTHORS: KeyMap = (
    ("pos_embed", "position"),
    (r"patch_embed\.proj\.(.*)", r"stem.proj.\1"),
    (r"blocks\.(\d+)\.filter\.complex_weight", r"blocks.\1.mixer.filter"),
    (r"blocks\.(\d+)\.attn\.(.*)", r"blocks.\1.mixer.\2"),
    *wavevit_names(MIXER),
)


def TAPS(name: str) -> dict[str, str]:
    """Stage outputs are normed, the last is the sequence after the class block; `block1_0` is the gate's own output."""
    if "depth" in SIZES[name]:
        return {r"filter(\d+)": r"blocks.\1.mixer", r"block(\d+)": r"blocks.\1",
                "block_last": f"blocks.{SIZES[name]['depth'] - 1}"}
    stages = {rf"block{stage + 1}_(\d+)": rf"stages.{stage}.blocks.\1.mixer" for stage in range(4)}
    return {"norm4": "norm"} | stages | {f"norm{stage + 1}": f"stages.{stage}" for stage in range(3)}
