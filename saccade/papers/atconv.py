"""ATConv: a 3x3 depthwise convolution whose kernel each image writes for itself.

Two things set self-attention apart from convolution: it routes by content, and its scores compete. Attentive
convolution has both at a convolution's price. The map is averaged into k^2 bins, one an entry of the kernel, which a
linear layer turns into a kernel a channel; a learned part of its mean is taken off (lateral inhibition):
    K_c = W gelu(bins_c(W_k x)) + b,    K_c -= sigmoid(d_c) mean(K_c),    out = W_o (K * W_x x).
AttNet is a pyramid of such blocks with gated, locally convolved MLPs.

Yu, Chen, Jiang, Peng, Sun, Kaski, Zhao, "Attentive Convolution: Unifying the Expressivity of Self-Attention with
Convolutional Efficiency", 2025.

Any grid: the convolution pads with zeros; bins share tokens where their number does not divide the map's.
Quirks kept: bins are runs of the map in row-major order, not cells of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.core.record import recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.local import local_sum
from saccade.ops.pooling import adaptive_mean
from saccade.parts.block import Block
from saccade.parts.convolution import conv_norm, depthwise
from saccade.parts.head import Head
from saccade.parts.mlp import Gelu
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem

_PUBLISHED = ("attnet_xxs", "attnet_xs", "attnet_s", "attnet_t1", "attnet_t2", "attnet_t3", "attnet_t4")

CARD = Card(
    "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
    authors="Yu, Chen, Jiang, Peng, Sun, Kaski, Zhao",
    year=2025,
    systems=("atconv",),
    arxiv="2510.20092",
    code="price112/Attentive-Convolution@f4f5a39",
    licence="MIT",
    read="code",
    keywords="attentive convolution, dynamic convolution, adaptive routing, lateral inhibition, AttNet, gated MLP",
    kinds=("backbone", "mixer"),
    mixers={"attentive_convolution": "AttentiveConvolution"},
    params=dict(zip(_PUBLISHED, (2.86e6, 5.56e6, 7.69e6, 13.71e6, 27.01e6, 49.18e6, 87.32e6), strict=True)),
    top1={"attnet_t2": 84.4},
    weights={  # one folder
        name: Weights("https://unioulu-my.sharepoint.com/:f:/g/personal/hayu23_univ_yo_oulu_fi/"
                      f"EtaWTnsh1ytNgsIYetHHwt4B1RxG_HDHN70a3NOq3fustw?e=MZ4w5w#{name}")
        for name in _PUBLISHED
    },
    goldens=("attnet_xxs", "attnet_t1", "op_atconv", "op_atconv_k5"),
)

_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class AttentiveConvolution(nn.Module):
    """Depthwise convolution with kernels made from the map: (B, *grid, C) -> (B, *grid, C)."""

    ranks = (1, 2, 3)
    template = Template("kernel made of the pooled map, a group", "difference from its mean", "sum of v, gated")
    undecayed = ("inhibition",)

    def __init__(self, site: Site, kernel: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.kernel, self.bins = kernel, kernel**site.rank
        self.kernel_proj = nn.Linear(site.dim, site.dim, bias=bias)
        self.activation = Gelu()
        self.kernel_gen = nn.Linear(self.bins, self.bins, bias=bias)
        self.inhibition = nn.Parameter(torch.zeros(site.dim))
        self.x_proj = nn.Linear(site.dim, site.dim, bias=bias)
        self.proj = nn.Linear(site.dim, site.dim, bias=bias)

    def kernels(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, C, k^n), the kernels of each image."""
        tokens = x.flatten(1, -2)
        # Means and a linear layer commute: project k^n means, not N tokens (while watched, in the authors' order).
        if recording():
            bins = adaptive_mean(self.kernel_proj(tokens), (self.bins,)).mT
        else:
            bins = self.kernel_proj(adaptive_mean(tokens, (self.bins,))).mT
        kernels = self.kernel_gen(self.activation(bins))
        return kernels - self.inhibition.sigmoid()[:, None] * kernels.mean(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        B, *grid, C = x.shape
        if torch.compiler.is_exporting():  # ONNX knows no number of groups that is free
            weight = self.kernels(x).view(B, *[1] * len(grid), C, self.bins)
            return self.proj(local_sum(weight, self.x_proj(x)[..., None], self.kernel).squeeze(-1))
        weight = self.kernels(x).view(B * C, 1, *[self.kernel] * len(grid))
        maps = self.x_proj(x).movedim(-1, 1).reshape(1, B * C, *grid)  # a group an image and channel
        out = _CONVOLVE[len(grid)](maps, weight, padding=self.kernel // 2, groups=B * C)
        return self.proj(out.view(B, C, *grid).movedim(1, -1))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 3 N C^2 for the projections, N C k^n for the convolution, C k^2n for the kernels."""
        tokens = torch.Size(grid).numel()
        return 3 * tokens * site.dim**2 + tokens * site.dim * self.bins + site.dim * self.bins**2

    def reach(self, site: Site) -> None:
        """Through the kernels, every token reaches every other."""
        return None


class GatedMlp(nn.Module):
    """out(norm(gelu(conv(gate(x))) * value(x))): conv a 3x3 depthwise convolution, a root-mean-square norm or none.

    The hidden width is two thirds of `ratio` C, so that the parameters are those of a plain MLP.
    """

    def __init__(self, rank: int, dim: int, hidden: int, norm: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden)
        self.value = nn.Linear(dim, hidden)
        self.local = depthwise(rank, hidden, 3)
        self.activation = Gelu()
        self.norm = nn.RMSNorm(hidden, eps=1e-6) if norm else nn.Identity()
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.activation(self.local(self.gate(x))) * self.value(x)))


_RATIOS = (8, 8, 4, 4)
_SMALL: dict[str, Any] = dict(gate_norm=False, layer_scale=None)
SIZES: dict[str, dict[str, Any]] = {
    "attnet_xxs": _SMALL | dict(dims=(32, 64, 128, 240), depths=(2, 2, 4, 2)),
    "attnet_xs": dict(dims=(40, 80, 160, 320), depths=(2, 2, 7, 2), gate_norm=False),
    "attnet_s": _SMALL | dict(dims=(40, 80, 160, 320), depths=(2, 3, 10, 3)),
    "attnet_t1": dict(dims=(48, 96, 224, 384), depths=(2, 3, 12, 3)),
    "attnet_t2": dict(dims=(64, 128, 288, 512), depths=(3, 3, 16, 3)),
    "attnet_t3": dict(dims=(72, 144, 320, 576), depths=(4, 4, 26, 4)),
    "attnet_t4": dict(dims=(96, 192, 384, 768), depths=(5, 5, 28, 5)),
    "attnet_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), patch=2, img_size=32),
}


def atconv(
    dims: Sequence[int],
    depths: Sequence[int],
    ratios: Sequence[float] = _RATIOS,
    kernels: Sequence[int] = (3, 3, 3, 3),
    gate_norm: bool = True,
    layer_scale: float | None = 1e-6,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """An AttNet of a size; `ratios` and `kernels` go by stage; heads of 32 channels for the mixers that want some."""

    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        if patch == 2:
            return ConvStem(*conv_norm(rank, in_chans, dim, stride=2))
        return ConvStem(*conv_norm(rank, in_chans, dim // 2, stride=2), Gelu(),
                        *conv_norm(rank, dim // 2, dim, stride=2))

    def downsample(rank: int, dim: int, out_dim: int) -> nn.Sequential:
        return nn.Sequential(*conv_norm(rank, dim, out_dim, stride=2))

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        hidden = int(2 * int(site.dim * ratios[site.stage]) / 3)
        return Block(site, mixer, drop_path=drop_path, layer_scale=layer_scale,
                     mlp=lambda dim: GatedMlp(site.rank, dim, hidden, gate_norm))

    mixers = [partial(AttentiveConvolution, kernel=kernel) for kernel in kernels[: len(dims)]]
    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims], stem=stem, stride=patch, downsample=downsample,
        block=block, mixer=mixers, head=partial(Head, norm=nn.LayerNorm), replace=mixer, **common,
    )


MIXER: KeyMap = (
    ("difference_control", "inhibition"),
    (r"(kernel_proj|x_proj|proj)\.weight", r"\1.weight", matrix_from_1x1),
    (r"(.*)", r"\1"),
)
MLP: KeyMap = (
    (r"fc1\.weight", ("gate.weight", "value.weight"), matrix_from_1x1),
    (r"fc1\.bias", ("gate.bias", "value.bias")),
    (r"dwconv\.(.*)", r"local.\1"),
    (r"norm_layer\.(.*)", r"norm.\1"),
    (r"fc2\.weight", "out.weight", matrix_from_1x1),
    (r"fc2\.bias", "out.bias"),
)
BLOCK: KeyMap = (
    *within(MIXER, r"token_mixer\.", "mixer."),
    *within(MLP, r"channel_mixer\.", "mlp."),
    (r"layer_scale_(\d)\.gamma", r"scale\1.0.gamma"),
    (r"norm_(\d)\.(.*)", r"norm\1.\2"),
)
AUTHORS: KeyMap = (
    (r"downsample_layers\.0\.0\.([01])\.(.*)", r"stem.\1.\2"),
    *((rf"downsample_layers\.0\.2\.{number}\.(.*)", rf"stem.{number + 3}.\1") for number in range(2)),
    (r"downsample_layers\.(\d+)\.(.*)", r"stages.\1.downsample.\2"),
    *within(BLOCK, r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"norm\.(.*)", r"head.norm.\1"),
    (r"head\.(.*)", r"head.fc.\1"),
)
TAPS = {r"stage(\d)": r"stages.\1"}
