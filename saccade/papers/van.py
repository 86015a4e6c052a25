"""VAN: attention made of convolutions alone, a large kernel taken apart into three small ones.

A K x K depthwise convolution reaches far and costs K^2 a channel. Large kernel attention takes it apart into a 5x5 for
what is near, a 7x7 of dilation 3 for what is far and a 1x1 between channels, and multiplies the features by the result:
    u = gelu(W_1 x),   attention = W conv_7,3(conv_5(u)),   out = W_2 (attention * u) + x.
The weights adapt to the input without a softmax, over 21 x 21 neighbours and across channels.

Guo, Lu, Liu, Cheng, Hu, "Visual Attention Network", 2023, section 3.

Any grid: convolutions pad with zeros. Quirk kept: the attention module adds its own shortcut, to the normed input,
inside the branch that layer scale multiplies.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, matrix_from_1x1, pvt_names, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.convolution import depthwise
from saccade.parts.merging import ConvMerging
from saccade.parts.mlp import ConvMlp, Gelu
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed

_PUBLISHED = tuple(f"van_b{number}" for number in range(7))

_ADDRESS = "hf:Visual-Attention-Network/VAN-"

CARD = Card(
    "Visual Attention Network",
    authors="Guo, Lu, Liu, Cheng, Hu",
    year=2023,
    systems=("van",),
    arxiv="2202.09741",
    code="Visual-Attention-Network/VAN-Classification@e19779b",
    licence="Apache-2.0",
    read="paper",
    keywords="large kernel attention, LKA, kernel decomposition, dilated depthwise convolution, gating",
    kinds=("backbone", "mixer"),
    mixers={"large_kernel_attention": "LargeKernelAttention"},
    params=dict(zip(_PUBLISHED, (4.1e6, 13.9e6, 26.6e6, 44.8e6, 60.3e6, 90.0e6, 200e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (0.88e9, 2.5e9, 5.0e9, 9.0e9, 12.2e9, 17.2e9, 38.4e9), strict=True)),
    top1={"van_b0": 75.4, "van_b1": 81.1, "van_b2": 82.8, "van_b3": 83.9, "van_b4": 84.2},
    weights={
        name: Weights(f"{_ADDRESS}{file}.pth.tar", mirrors=(f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1",))
        for name, file, share in (
            ("van_b0", "Tiny-original/van_tiny_754", "aada2242a16245d6a561"),
            ("van_b1", "Small-original/van_small_811", "dd3eb73692f74a2499c9"),
            ("van_b2", "Base-original/van_base_828", "58e7acceaf334ecdba89"),
            ("van_b3", "Large-original/van_large_839", "0201745f6920482490a0"),
        )
    },
    goldens=("van_b0", "op_lka", "op_van_attention"),
)


class LargeKernel(nn.Module):
    """u * W conv_7,3(conv_5(u)): the gate alone, (B, *grid, C) -> (B, *grid, C)."""

    def __init__(self, rank: int, dim: int) -> None:
        super().__init__()
        self.near = depthwise(rank, dim, 5)
        self.far = depthwise(rank, dim, 7, dilation=3)
        self.mix = nn.Linear(dim, dim)

    def forward(self, u: Tensor) -> Tensor:
        return u * self.mix(self.far(self.near(u)))


class LargeKernelAttention(nn.Module):
    """out = W_2 (u * W conv_7,3(conv_5(u))) + x, u = gelu(W_1 x): (B, *grid, C) -> (B, *grid, C).

    (Guo et al., Visual Attention Network, 2023, equations 1-2 and figure 3.)
    """

    ranks = (1, 2, 3)
    template = Template("w[j - i] of a near and a dilated kernel", "none", "sum of u, times u")

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.enter = nn.Linear(site.dim, site.dim)
        self.activation = Gelu()
        self.gate = LargeKernel(site.rank, site.dim)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.gate(self.activation(self.enter(x))))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: N C (3 C + 5^rank + 7^rank)."""
        return torch.Size(grid).numel() * site.dim * (3 * site.dim + 5**site.rank + 7**site.rank)

    def reach(self, site: Site) -> tuple[int, ...]:
        """2 steps near and 3 x 3 steps far."""
        return (11,) * site.rank


_B1: dict[str, Any] = dict(dims=(64, 128, 320, 512))
_B5: dict[str, Any] = dict(dims=(96, 192, 480, 768))
SIZES: dict[str, dict[str, Any]] = {
    "van_b0": dict(dims=(32, 64, 160, 256), depths=(3, 3, 5, 2)),
    "van_b1": _B1 | dict(depths=(2, 2, 4, 2)),
    "van_b2": _B1 | dict(depths=(3, 3, 12, 3)),
    "van_b3": _B1 | dict(depths=(3, 5, 27, 3)),
    "van_b4": _B1 | dict(depths=(3, 6, 40, 3)),
    "van_b5": _B5 | dict(depths=(3, 3, 24, 3)),
    "van_b6": dict(dims=(96, 192, 384, 768), depths=(6, 6, 90, 6)),
    "van_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), ratios=(4, 4, 4), patch=2, img_size=32),
}


def van(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    ratios: tuple[float, ...] = (8, 8, 4, 4),
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A VAN of a size; heads of 32 channels for the mixers that want some."""

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        mlp = partial(ConvMlp, site.rank, ratio=ratios[site.stage])
        return Block(site, mixer, drop_path=drop_path, norm=BatchNorm, mlp=mlp, layer_scale=1e-2)

    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims],
        stem=partial(PatchEmbed, kernel=2 * patch - 1, stride=patch, padding=patch - 1, norm=BatchNorm), stride=patch,
        downsample=partial(ConvMerging, norm=BatchNorm), block=block, mixer=LargeKernelAttention, stage_norm=LAYER_NORM,
        replace=mixer, **common,
    )


GATE: KeyMap = (
    (r"conv0\.(.*)", r"near.\1"),
    (r"conv_spatial\.(.*)", r"far.\1"),
    (r"conv1\.weight", r"mix.weight", matrix_from_1x1),
    (r"conv1\.bias", r"mix.bias"),
)
_PROJECTIONS: KeyMap = tuple(
    rule for theirs, ours in (("proj_1", "enter"), ("proj_2", "proj"))
    for rule in ((rf"{theirs}\.weight", f"{ours}.weight", matrix_from_1x1), (rf"{theirs}\.bias", f"{ours}.bias"))
)
MIXER: KeyMap = (*_PROJECTIONS, *within(GATE, r"spatial_gating_unit\.", "gate."))
AUTHORS: KeyMap = pvt_names((
    *within(MIXER, r"attn\.", "mixer."),
    (r"layer_scale_(\d)", r"scale\1.0.gamma"),
    (r"mlp\.(fc\d)\.weight", r"mlp.\1.weight", matrix_from_1x1),
    (r"mlp\.dwconv\.dwconv\.(.*)", r"mlp.local.\1"),
))
TAPS = {f"norm{stage + 1}": f"stages.{stage}" for stage in range(4)}
