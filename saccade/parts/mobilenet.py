"""MobileNet V2 with its depthwise convolutions left open: a host of mixers for compact networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.site import MixerFactory, Site
from saccade.parts.block import residual_tail
from saccade.parts.convolution import conv_norm, depthwise, grid_conv
from saccade.parts.head import Head
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid, Stage, check_sizes, drop_path_rates
from saccade.parts.squeeze import divisible
from saccade.parts.stem import ConvStem


class Row(NamedTuple):
    """`depth` blocks of width `dim`, their hidden layers `ratio` times what enters; the first block has `stride`."""

    ratio: int
    dim: int
    depth: int
    stride: int


# Sandler et al., 2018, table 2.
ROWS = tuple(Row(*row) for row in (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)))


class SmallDepthwise(nn.Module):
    """A 3x3 depthwise convolution without bias, the token mixer of a MobileNet."""

    ranks = (1, 2, 3)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.conv = depthwise(site.rank, site.dim, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        return prod(grid) * site.dim * 3**site.rank

    def reach(self, site: Site) -> tuple[int, ...]:
        return (1,) * site.rank


def strided_depthwise(site: Site) -> nn.Module:
    """The 3x3 depthwise convolution of stride 2 of a block that downsamples."""
    return grid_conv(site.rank, site.dim, site.dim, 3, stride=2, padding=1, groups=site.dim, bias=False)


class MobileBlock(nn.Module):
    """[x +] norm(shrink(act(norm(mixer(act(norm(expand(x)))))))), the mixer on the wide map (B, *grid, site.dim).

    In a block that downsamples the layer that strides is `local`, and there is no mixer to replace. x is added where
    neither grid nor width changes; where nothing widens there is no `expand`.
    """

    def __init__(
        self, site: Site, layer: nn.Module, dim: int, out_dim: int, stride: int = 1, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.site, self.stride = site, stride
        widen = [nn.Linear(dim, site.dim, bias=False), BatchNorm(site.dim), nn.ReLU6()] if site.dim != dim else []
        self.expand = nn.Sequential(*widen)
        if stride == 1:
            self.mixer = layer
        else:
            self.local = layer
        self.norm = BatchNorm(site.dim)
        self.activation = nn.ReLU6()
        self.shrink = nn.Sequential(nn.Linear(site.dim, out_dim, bias=False), BatchNorm(out_dim))
        self.residual = stride == 1 and dim == out_dim
        self.tail = residual_tail(out_dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        hidden = self.mixer(hidden) if self.stride == 1 else self.local(hidden)
        out = self.shrink(self.activation(self.norm(hidden)))
        return x + self.tail(out) if self.residual else out


class MobileNetV2(Pyramid):
    """Stem, inverted residuals, a wide last layer, head. A stage begins with each block that strides.

    `mixer(site)` builds the depthwise layer of blocks that keep the grid, `strided(site)` of those that halve it (their
    site's grid is the halved one). `replace` is the caller's mixer (see `create_model`). Widths are `width` times those
    of the rows, in multiples of 8.
    (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2.)
    """

    def __init__(
        self,
        rows: Sequence[Row] = ROWS,
        *,
        width: float = 1.0,
        stem: int = 32,
        stem_stride: int = 2,
        last: int = 1280,
        mixer: MixerFactory = SmallDepthwise,
        strided: Callable[[Site], nn.Module] = strided_depthwise,
        head: Callable[[int, int, str], nn.Module] = Head,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        replace: Any = None,
    ) -> None:
        Backbone.__init__(self)  # not Pyramid's: widths change within a stage
        size = check_sizes(num_classes, in_chans, img_size)
        rank, self.in_chans, self.global_pool = len(size), in_chans, global_pool
        build_mixer = choose_mixer(replace, mixer)
        rates = drop_path_rates(drop_path_rate, sum(row.depth for row in rows))
        dim = divisible(stem * width)
        self.stem = ConvStem(*conv_norm(rank, in_chans, dim, stride=stem_stride), nn.ReLU6())
        lowers: list[nn.Module] = []
        stages: list[list[nn.Module]] = []
        widths, names, step = [], [], stem_stride
        for (row, stride), (name, stage, index), rate in zip(blocks_of(rows), places(rows), rates, strict=True):
            step *= stride
            site = Site(row.ratio * dim, 1, stage, index, step, tuple(-(-side // step) for side in size))
            out_dim = divisible(row.dim * width)
            layer = build_mixer(site, name) if stride == 1 else strided(site)
            block = MobileBlock(site, layer, dim, out_dim, stride, rate)
            if stage == len(stages):
                stages.append([])
                lowers.append(block if stride > 1 else nn.Identity())
                widths.append((out_dim, step))
            if stride == 1:
                stages[stage].append(block)
                names.append(name)
            dim, widths[stage] = out_dim, (out_dim, step)
        check_patterns(replace, names)
        self.stages = nn.ModuleList(Stage(lower, list(blocks)) for lower, blocks in zip(lowers, stages, strict=True))
        self.num_features = divisible(last * max(width, 1.0))
        self.norm = nn.Sequential(nn.Linear(dim, self.num_features, bias=False), BatchNorm(self.num_features),
                                  nn.ReLU6())
        self._make_head = head
        self.reset_classifier(num_classes)
        self.feature_info = FeatureInfo(dict(num_chs=channels, reduction=step, module=f"stages.{number}")
                                        for number, (channels, step) in enumerate(widths))
        self.default_out_indices = tuple(range(len(widths)))


def blocks_of(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """The row and the stride of each block, in order."""
    for row in rows:
        for number in range(row.depth):
            yield row, 1 if number else row.stride


def places(rows: Sequence[Row]) -> Iterator[tuple[str, int, int]]:
    """Our name of each block, in order, with its stage and its index among the stage's blocks that keep the grid."""
    stage, index = -1, 0
    for _, stride in blocks_of(rows):
        if stage < 0 or stride > 1:
            stage, index = stage + 1, 0
        name = f"stages.{stage}.downsample" if stride > 1 else f"stages.{stage}.blocks.{index}"
        yield name, stage, index
        index += stride == 1
