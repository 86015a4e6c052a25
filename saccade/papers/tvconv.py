"""TVConv: a depthwise convolution whose kernel is another at each place, and the same for every image.

    out[i] = sum_o W[i, o] x[i + o],   W = layers(affinity map),
where the weights of all places (k x k for each channel) are made by a small convolutional network from a learned map of
a few channels that belongs to the place alone. Faces and fundus pictures have a layout: what stands where hardly
changes from image to image. Once trained, W is computed once and kept (`reparameterize`).

Chen, He, Zhuo, Ma, Ha, Chan, "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual Processing",
2022, section 3.

Any grid: affinity map and layer norms belong to the native grid; the weights made there are resampled (linearly) to the
grid that comes. The network is MobileNet V2 on 96 x 96 faces, its first convolution without stride, its head a norm, a
mean, a layer and a norm (no dropout): an embedding of `num_classes` (512) numbers.
Quirks kept: layer norms are over the whole map, with an affine of its shape. Blocks that stride convolve likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import Dropped, KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.convolution import grid_conv
from saccade.parts.head import Head
from saccade.parts.mobilenet import INVERTED_ROWS, MobileNet, Row, places, torchvision_names
from saccade.parts.norm import BatchNorm
from saccade.parts.position import resample

CARD = Card(
    "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual Processing",
    authors="Chen, He, Zhuo, Ma, Ha, Chan",
    year=2022,
    systems=("tvconv",),
    arxiv="2203.10489",
    code="JierunChen/TVConv@609d4bf",
    licence="MIT",
    read="paper, code",
    keywords="translation variant convolution, layout-aware, affinity map, position-dependent kernel, face recognition",
    kinds=("backbone", "mixer"),
    mixers={"tvconv": "TVConv"},
    goldens=("tvconv_mobilenet_v2_x0_1", "op_tvconv", "op_tvconv_k5_s2", "op_tvconv_inverted_residual",
             "op_tvconv_inverted_residual_s2"),
)


class MapNorm(nn.LayerNorm):
    """Layer norm over a whole map (*grid, C), with an affine of that shape; it is resampled when it is loaded."""

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        return resample(value[None], self.normalized_shape[:-1], linear=True)[0]


class WeightMaps(nn.Module):
    """() -> the weights of all places (k^rank, *grid, C) and, with `bias`, a bias (*grid, C), made from `affinity`."""

    undecayed = ("affinity",)

    def __init__(self, site: Site, kernel: int, channels: int, width: int, layers: int, bias: bool) -> None:
        super().__init__()
        self.dim = site.dim
        self.affinity = nn.Parameter(torch.ones(1, *site.grid, channels))

        def network(outputs: int) -> nn.Sequential:
            hidden = [layer for number in range(layers + 1) for layer in (
                grid_conv(site.rank, width if number else channels, width, 3, padding=1, bias=False),
                MapNorm([*site.grid, width]), nn.ReLU())]
            return nn.Sequential(*hidden, grid_conv(site.rank, width, outputs, 3, padding=1, bias=False))

        self.weight_layers = network(kernel**site.rank * site.dim)
        self.bias_layers = network(site.dim) if bias else None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        weights = self.weight_layers(self.affinity)[0].unflatten(-1, (self.dim, -1)).movedim(-1, 0).contiguous()
        return weights, None if self.bias_layers is None else self.bias_layers(self.affinity)[0]

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The affinity map of another native grid, resampled."""
        return resample(value, tuple(self.affinity.shape[1:-1]), linear=True)

    def deployed(self) -> FixedMaps:
        """What evaluation needs: the maps themselves."""
        with torch.no_grad():
            return FixedMaps(*self())

    def cost(self) -> int:
        """Multiply-adds of both networks on the native grid."""
        kernels = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.modules.conv._ConvNd))
        return self.affinity[0, ..., 0].numel() * kernels


class FixedMaps(nn.Module):
    """Weights and bias that were computed once."""

    def __init__(self, weights: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weights: Tensor
        self.bias: Tensor | None
        self.register_buffer("weights", weights)
        self.register_buffer("bias", bias)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.weights, self.bias

    def cost(self) -> int:
        return 0


class TVConv(nn.Module):
    """out[i] = sum_o W[i, o] x[stride i + o] over `kernel`^rank neighbours: (B, *grid, C) -> (B, *grid / stride, C).

    The weights are made by `layers` hidden layers of `width` from an affinity map of `channels`.
    """

    ranks = (1, 2, 3)
    template = Template("w[i, j - i]: a kernel a place", "none", "sum of x")

    def __init__(
        self,
        site: Site,
        kernel: int = 3,
        stride: int = 1,
        channels: int = 4,
        width: int = 64,
        layers: int = 3,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.maps = WeightMaps(site, kernel, channels, width, layers, bias)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        out_grid = tuple((side + self.stride - 1) // self.stride for side in grid)
        weights, bias = self.maps()
        weights = resample(weights, out_grid, linear=True)
        padded = F.pad(x, [0, 0, *[self.kernel // 2] * (2 * len(grid))])
        out = None
        for weight, offsets in zip(weights, product(range(self.kernel), repeat=len(grid)), strict=True):
            part = padded
            for axis, (offset, side) in enumerate(zip(offsets, grid, strict=True), 1):
                part = part.narrow(axis, offset, side)
                if self.stride > 1:
                    part = part[(slice(None),) * axis + (slice(None, None, self.stride),)]
            out = part * weight if out is None else torch.addcmul(out, part, weight)
        assert out is not None
        return out if bias is None else out + resample(bias[None], out_grid, linear=True)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds an image: k^rank products a channel and place are elementwise, which is not counted."""
        return 0

    def shared_cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of the networks that make the weights, once for the whole batch and on the native grid."""
        return self.maps.cost()

    def reach(self, site: Site) -> tuple[int, ...]:
        return (self.kernel // 2,) * site.rank


class EmbeddingHead(Head):
    """norm(fc(pool(norm(x)))): (B, *grid, C) -> (B, embedding)."""

    def __init__(self, dim: int, num_classes: int, global_pool: str = "avg") -> None:
        super().__init__(dim, num_classes, global_pool, norm=BatchNorm)
        if num_classes:
            self.fc = nn.Sequential(nn.Linear(dim, num_classes), BatchNorm(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.norm(x)))


SIZES: dict[str, dict[str, Any]] = {
    f"tvconv_mobilenet_v2_x{number // 10}_{number % 10}": dict(scale=number / 10, num_classes=512, img_size=96)
    for number in (1, 2, 3, 5, 10)
}
SIZES["tvconv_nano"] = dict(rows=(Row(1, 16, 1, 1), Row(2, 24, 2, 2), Row(2, 32, 2, 2)), scale=1.0, width=8, layers=1,
                            last=64, img_size=32)


def tvconv(
    scale: float,
    rows: Sequence[Row] = INVERTED_ROWS,
    kernel: int = 3,
    channels: int = 4,
    width: int = 64,
    layers: int = 3,
    bias: bool = False,
    last: int = 512,
    mixer: Any = None,
    **common: Any,
) -> MobileNet:
    """A MobileNet V2 of `scale` times the width, its depthwise layers translation variant."""
    make = partial(TVConv, kernel=kernel, channels=channels, width=width, layers=layers, bias=bias)
    return MobileNet([row._replace(mixer=make) for row in rows], width=scale, stem_stride=1, last=last,
                     head=EmbeddingHead, replace=mixer, **common)


def _channels_last(value: Tensor) -> Tensor:
    """(C, *grid) as (*grid, C)."""
    return value.movedim(0, -1)


def _affinity(value: Tensor) -> Tensor:
    """(1, channels, *grid) as (1, *grid, channels)."""
    return value.movedim(1, -1)


OPERATOR: KeyMap = (
    Dropped("TVConv_k|TVConv_k_square|stride|channels|h|w", "a setting kept as a buffer"),
    ("posi_map", "maps.affinity", _affinity),
    *(rule for number in range(8) for rule in (
        (rf"(weight|bias)_layers\.{number}(?:\.0)?\.weight", rf"maps.\1_layers.{3 * number}.weight"),
        (rf"(weight|bias)_layers\.{number}\.1\.(.*)", rf"maps.\1_layers.{3 * number + 1}.\2", _channels_last))),
)

AUTHORS: KeyMap = (
    *torchvision_names(layer=OPERATOR),
    (r"output_layer\.layer1\.(?:0\.)?(.*)", r"head.norm.\1"),  # .0 beside a dropout
    (r"output_layer\.layer2\.(.*)", r"head.fc.\1"),
)
TAPS = {f"f{number}": name for number, (name, _, _) in enumerate(places(INVERTED_ROWS), 1)}
