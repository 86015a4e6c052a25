"""ConvNeXt: a ConvNet modernised with everything that made Transformers good but attention.

One residual branch a block: a 7x7 depthwise convolution mixes tokens, a norm and an MLP mix channels,
    x += gamma * fc2(gelu(fc1(norm(depthwise(x))))),
in the four stages of Swin, with patches for a stem and norm + 2x2 convolution between stages. Any other mixer can stand
where the depthwise convolution does. The isotropic form keeps one grid of 16x16 patches, like a ViT.

Liu et al., "A ConvNet for the 2020s", 2022, section 2 and appendix A.

Any grid: the depthwise convolution pads with zeros; between stages a last odd row or column is left out, as the
authors' convolutions do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.block import LAYER_NORM, SingleBlock
from saccade.parts.convolution import depthwise
from saccade.parts.head import Head
from saccade.parts.merging import NormedMerging
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed

_ADDRESS = "https://dl.fbaipublicfiles.com/convnext/"

CARD = Card(
    "A ConvNet for the 2020s",
    authors="Liu, Mao, Wu, Feichtenhofer, Darrell, Xie",
    year=2022,
    systems=("convnext",),
    arxiv="2201.03545",
    code="facebookresearch/ConvNeXt@048efce",
    licence="MIT",
    weights_licence="MIT",
    read="paper, code",
    keywords="depthwise convolution, large kernel, modernised ResNet, layer scale, isotropic",
    kinds=("backbone", "mixer"),
    mixers={"depthwise": "Depthwise"},
    params={"convnext_tiny": 28.6e6, "convnext_small": 50.2e6, "convnext_base": 88.6e6, "convnext_large": 197.8e6,
            "convnext_xlarge": 350.2e6, "convnext_isotropic_small": 22.3e6, "convnext_isotropic_base": 87.1e6,
            "convnext_isotropic_large": 305.7e6},
    macs={"convnext_tiny": 4.5e9, "convnext_small": 8.7e9, "convnext_base": 15.4e9, "convnext_large": 34.4e9,
          "convnext_xlarge": 60.9e9, "convnext_isotropic_small": 4.3e9, "convnext_isotropic_base": 16.9e9,
          "convnext_isotropic_large": 59.7e9},
    # The extra-large model was trained on ImageNet-22K first.
    top1={"convnext_tiny": 82.1, "convnext_small": 83.1, "convnext_base": 83.8, "convnext_large": 84.3,
          "convnext_xlarge": 87.0,
          "convnext_isotropic_small": 79.7, "convnext_isotropic_base": 82.0, "convnext_isotropic_large": 82.6},
    weights={
        name: Weights(f"{_ADDRESS}{file}", licence="MIT")
        for name, file in {
            "convnext_tiny": "convnext_tiny_1k_224_ema.pth",
            "convnext_small": "convnext_small_1k_224_ema.pth",
            "convnext_base": "convnext_base_1k_224_ema.pth",
            "convnext_large": "convnext_large_1k_224_ema.pth",
            "convnext_isotropic_small": "convnext_iso_small_1k_224_ema.pth",
            "convnext_isotropic_base": "convnext_iso_base_1k_224_ema.pth",
            "convnext_isotropic_large": "convnext_iso_large_1k_224_ema.pth",
        }.items()
    } | {
        "convnext_xlarge": Weights(f"{_ADDRESS}convnext_xlarge_22k_1k_224_ema.pth", data="ImageNet-22K, ImageNet-1K",
                                   licence="MIT"),
    },
    goldens=("convnext_tiny", "op_convnext_block"),
)


class Depthwise(nn.Module):
    """A depthwise convolution over the grid: every channel by itself, `kernel` x `kernel` neighbours, zero-padded."""

    ranks = (1, 2, 3)
    template = Template("w[j - i], a number a channel and offset", "none", "sum of x")

    def __init__(self, site: Site, kernel: int = 7) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = depthwise(site.rank, site.dim, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return torch.Size(grid).numel() * site.dim * self.kernel**site.rank

    def reach(self, site: Site) -> tuple[int, ...]:
        return (self.kernel // 2,) * site.rank


SIZES: dict[str, dict[str, Any]] = {
    "convnext_tiny": dict(dims=(96, 192, 384, 768), depths=(3, 3, 9, 3)),
    "convnext_small": dict(dims=(96, 192, 384, 768), depths=(3, 3, 27, 3)),
    "convnext_base": dict(dims=(128, 256, 512, 1024), depths=(3, 3, 27, 3)),
    "convnext_large": dict(dims=(192, 384, 768, 1536), depths=(3, 3, 27, 3)),
    "convnext_xlarge": dict(dims=(256, 512, 1024, 2048), depths=(3, 3, 27, 3)),
    "convnext_isotropic_small": dict(builder="convnext_isotropic", dim=384, depth=18),
    "convnext_isotropic_base": dict(builder="convnext_isotropic", dim=768, depth=18),
    "convnext_isotropic_large": dict(builder="convnext_isotropic", dim=1024, depth=36, layer_scale=1e-6),
    "convnext_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), patch=2, img_size=32),
}


def convnext(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    patch: int = 4,
    layer_scale: float | None = 1e-6,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A ConvNeXt of a size; heads of 32 channels for the mixers that want some."""
    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims],
        stem=partial(PatchEmbed, kernel=patch, stride=patch, norm=LAYER_NORM), stride=patch,
        downsample=partial(NormedMerging, norm=LAYER_NORM), block=partial(SingleBlock, layer_scale=layer_scale),
        mixer=Depthwise, head=partial(Head, norm=LAYER_NORM), replace=mixer, **common,
    )


def convnext_isotropic(
    dim: int, depth: int, patch: int = 16, layer_scale: float | None = None, mixer: Any = None, **common: Any
) -> Pyramid:
    """One stage on 16x16 patches, without a norm in the stem."""
    return Pyramid(
        [dim], [depth], [dim // 64], stem=partial(PatchEmbed, kernel=patch, stride=patch), stride=patch,
        downsample=partial(NormedMerging, norm=LAYER_NORM), block=partial(SingleBlock, layer_scale=layer_scale),
        mixer=Depthwise, head=partial(Head, norm=LAYER_NORM), replace=mixer, **common,
    )


AUTHORS: KeyMap = (
    (r"stages\.(\d+)\.(\d+)\.dwconv\.(.*)", r"stages.\1.blocks.\2.mixer.conv.\3"),
    (r"stages\.(\d+)\.(\d+)\.pwconv(\d)\.(.*)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
    (r"stages\.(\d+)\.(\d+)\.gamma", r"stages.\1.blocks.\2.scale.0.gamma"),
    (r"stages\.(\d+)\.(\d+)\.norm\.(.*)", r"stages.\1.blocks.\2.norm.\3"),
    (r"downsample_layers\.0\.0\.(.*)", r"stem.proj.\1"),
    (r"downsample_layers\.0\.1\.(.*)", r"stem.norm.\1"),
    (r"downsample_layers\.(\d+)\.(.*)", r"stages.\1.downsample.\2"),
    (r"stem\.(weight|bias)", r"stem.proj.\1"),  # isotropic
    (r"blocks\.(\d+)\.dwconv\.(.*)", r"stages.0.blocks.\1.mixer.conv.\2"),
    (r"blocks\.(\d+)\.pwconv(\d)\.(.*)", r"stages.0.blocks.\1.mlp.fc\2.\3"),
    (r"blocks\.(\d+)\.gamma", r"stages.0.blocks.\1.scale.0.gamma"),
    (r"blocks\.(\d+)\.norm\.(.*)", r"stages.0.blocks.\1.norm.\2"),
    (r"norm\.(.*)", r"head.norm.\1"),
    (r"head\.(.*)", r"head.fc.\1"),
)
TIMM: KeyMap = (
    (r"stem\.0\.(.*)", r"stem.proj.\1"),
    (r"stem\.1\.(.*)", r"stem.norm.\1"),
    (r"(stages\.\d+\.blocks\.\d+)\.conv_dw\.(.*)", r"\1.mixer.conv.\2"),
    (r"(stages\.\d+\.blocks\.\d+)\.gamma", r"\1.scale.0.gamma"),
)
TAPS = {r"stage(\d)": r"stages.\1"}
