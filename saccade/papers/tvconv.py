"""TVConv: a depthwise convolution whose kernel is another at each place, and the same for every image.

    out[i] = sum_o W[i, o] x[i + o],   W = layers(affinity map),
where the weights of all places (k x k for each channel) are made by a small convolutional network from a learned map of
a few channels that belongs to the place alone. Faces and fundus pictures have a layout: what stands where hardly
changes from image to image. Once trained, W is computed once and kept (`reparameterize`).

Chen, He, Zhuo, Ma, Ha, Chan, "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual Processing",
2022, section 3.

Any grid: affinity map and layer norms belong to the native grid; the weights made there are resampled (linearly) to the
grid that comes. The networks are MobileNet V2 and ShuffleNet V2 on 96 x 96 faces, their first convolution without
stride, their head a norm, a mean, a layer and a norm (no dropout): an embedding of `num_classes` (512) numbers.
Quirks kept: layer norms are over the whole map, with an affine of its shape. Blocks that stride convolve likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as changed
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import Dropped, KeyMap, Rule, matrix_from_1x1, within
from saccade.core.site import MixerFactory, Site
from saccade.core.template import Template
from saccade.parts.convolution import conv_norm, grid_conv
from saccade.parts.head import Head
from saccade.parts.mobilenet import (
    DEPTHWISE,
    INVERTED_ROWS,
    MobileBlock,
    MobileNet,
    Row,
    places,
    torchvision_names,
)
from saccade.parts.norm import BatchNorm
from saccade.parts.position import resample
from saccade.parts.pyramid import Pyramid
from saccade.parts.resnet import MaxPool, each
from saccade.parts.stem import ConvStem

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


class ShuffleBlock(MobileBlock):
    """Channels of two branches in turn: (B, *grid, dim) -> (B, *grid / stride, out_dim).

    One is act(norm(fc(norm(mixer(act(norm(fc(x))))))), on half of the channels; the other the other half, as it is, or,
    where the block strides, act(norm(fc(norm(skip(x))))), both on all of them.
    (Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", 2018, figure 3 c, d.)
    """

    def __init__(self, site: Site, layer: nn.Module, dim: int, out_dim: int, skip: nn.Module | None = None) -> None:
        super().__init__(site, layer, 1 if skip is None else 2)
        half = out_dim // 2
        self.expand = _activated(half if skip is None else dim, half)
        self.norm = BatchNorm(half)
        self.shrink = _activated(half, half)
        self.skip = None if skip is None else nn.Sequential(skip, BatchNorm(dim), *_activated(dim, half))

    def forward(self, x: Tensor) -> Tensor:
        kept, x = x.chunk(2, -1) if self.skip is None else (self.skip(x), x)
        return torch.stack([kept, self.shrink(self.norm(self.mix(self.expand(x))))], -1).flatten(-2)


def embedding_on(width: int, dim: int, num_classes: int, global_pool: str = "avg") -> EmbeddingHead:
    """A head on a map of `width` channels, whatever the width `dim` of the last stage."""
    return EmbeddingHead(width, num_classes, global_pool)


def _activated(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, out_dim, bias=False), BatchNorm(out_dim), nn.ReLU())


class ShuffleNet(Pyramid):
    """ShuffleNet V2: a stem that ends with the first block that strides, such blocks between stages, a wide last layer.

    `make` builds depthwise layers; those of blocks that keep the grid are the mixers, on half of the channels.
    """

    def __init__(
        self, dims: Sequence[int], depths: Sequence[int], *, make: MixerFactory, stem_dim: int, last: int,
        img_size: int | Sequence[int] = 224, replace: Any = None, **common: Any,
    ) -> None:
        size = (img_size,) * 2 if isinstance(img_size, int) else tuple(img_size)

        def down(stage: int, rank: int, dim: int, out_dim: int) -> ShuffleBlock:
            grid = tuple(-(-side // (4 << stage)) for side in size)
            sites = [Site(width, 1, stage, 0, 4 << stage, grid) for width in (out_dim // 2, dim)]
            layer, skip = (make(site, stride=2) for site in sites)  # type: ignore[call-arg]
            return ShuffleBlock(sites[0], layer, dim, out_dim, skip)

        def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
            start = conv_norm(rank, in_chans, stem_dim)
            return ConvStem(*start, nn.ReLU(), MaxPool(rank), down(0, rank, stem_dim, dim))

        def narrow(site: Site) -> Site:
            return changed(site, dim=site.dim // 2)

        def at(factory: MixerFactory, site: Site) -> nn.Module:
            return factory(narrow(site))

        super().__init__(
            dims, depths, [1] * len(dims), stem=stem, stride=4, img_size=img_size,
            downsample=[partial(down, stage) for stage in range(1, len(dims))],
            block=lambda site, mixer, drop_path: ShuffleBlock(narrow(site), mixer, site.dim, site.dim),
            mixer=each(make, at), replace=None if replace is None else each(replace, at),
            norm=lambda dim: _activated(dim, last), head=partial(embedding_on, last), **common,
        )
        self.num_features = last


SIZES: dict[str, dict[str, Any]] = {
    f"tvconv_mobilenet_v2_x{number // 10}_{number % 10}": dict(scale=number / 10, num_classes=512, img_size=96)
    for number in (1, 2, 3, 5, 10)
}
SIZES["tvconv_nano"] = dict(rows=(Row(1, 16, 1, 1), Row(2, 24, 2, 2), Row(2, 32, 2, 2)), scale=1.0, width=8, layers=1,
                            last=64, img_size=32)
SIZES |= {f"tvconv_shufflenet_v2_x{name}": dict(builder="tvconv_shufflenet", dims=dims, num_classes=512, img_size=96)
          for name, dims in (("0_5", (48, 96, 192)), ("1_0", (116, 232, 464)), ("1_5", (176, 352, 704)))}
SIZES["tvconv_shufflenet_nano"] = dict(builder="tvconv_shufflenet", dims=(32, 48), depths=(1, 1), width=8, layers=1,
                                       stem_dim=16, last=64, img_size=32)


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


def tvconv_shufflenet(
    dims: Sequence[int],
    depths: Sequence[int] = (3, 7, 3),
    kernel: int = 3,
    channels: int = 4,
    width: int = 64,
    layers: int = 3,
    bias: bool = False,
    stem_dim: int = 24,
    last: int = 1024,
    mixer: Any = None,
    **common: Any,
) -> ShuffleNet:
    """A ShuffleNet V2 of a width, its depthwise layers translation variant."""
    make = partial(TVConv, kernel=kernel, channels=channels, width=width, layers=layers, bias=bias)
    return ShuffleNet(dims, depths, make=make, stem_dim=stem_dim, last=last, replace=mixer, **common)


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



def shuffle_names(layer: KeyMap = DEPTHWISE) -> list[Rule]:
    """torchvision's names of a ShuffleNet V2 but for its head; `layer` has the rules of what is a depthwise layer."""

    def block(mixer: str) -> list[Rule]:
        return [
            *within(layer, r"branch1\.0\.", "skip.0."),
            (r"branch1\.2\.weight", "skip.2.weight", matrix_from_1x1),
            (r"branch1\.(.*)", r"skip.\1"),
            (r"branch2\.0\.weight", "expand.0.weight", matrix_from_1x1),
            (r"branch2\.1\.(.*)", r"expand.1.\1"),
            *within(layer, r"branch2\.3\.", f"{mixer}."),
            (r"branch2\.4\.(.*)", r"norm.\1"),
            (r"branch2\.5\.weight", "shrink.0.weight", matrix_from_1x1),
            (r"branch2\.6\.(.*)", r"shrink.1.\1"),
        ]

    return [
        (r"conv1\.(.*)", r"stem.\1"),
        *within(block("local"), r"stage2\.0\.", "stem.4."),
        *(rule for stage in range(3) for rule in (
            *within(block("local"), rf"stage{stage + 2}\.0\.", f"stages.{stage}.downsample."),
            *(rule for index in range(1, 8) for rule in within(
                block("mixer"), rf"stage{stage + 2}\.{index}\.", f"stages.{stage}.blocks.{index - 1}.")))),
        (r"conv5\.0\.weight", "norm.0.weight", matrix_from_1x1),
        (r"conv5\.1\.(.*)", r"norm.1.\1"),
    ]


AUTHORS: KeyMap = (
    *torchvision_names(layer=OPERATOR),
    *shuffle_names(OPERATOR),
    (r"output_layer\.layer1\.(?:0\.)?(.*)", r"head.norm.\1"),  # .0 beside a dropout
    (r"output_layer\.layer2\.(.*)", r"head.fc.\1"),
)
TAPS = {f"f{number}": name for number, (name, _, _) in enumerate(places(INVERTED_ROWS), 1)}
