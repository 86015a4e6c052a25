"""MobileNets with their depthwise convolutions left open: hosts of mixers for compact networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.keymap import KeyMap, Rule, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.parts.block import residual_tail
from saccade.parts.convolution import conv_norm, grid_conv
from saccade.parts.head import Head
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid, Stage, check_sizes, drop_path_rates
from saccade.parts.squeeze import divisible
from saccade.parts.stem import ConvStem


class SmallDepthwise(nn.Module):
    """A 3x3 depthwise convolution without bias, a MobileNet's token mixer: (B, *grid, C) -> (B, *grid / stride, C)."""

    ranks = (1, 2, 3)

    def __init__(self, site: Site, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv = grid_conv(site.rank, site.dim, site.dim, 3, stride=stride, padding=1, groups=site.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        tokens = torch.Size(-(-side // self.stride) for side in grid).numel()
        return tokens * site.dim * 3**site.rank

    def reach(self, site: Site) -> tuple[int, ...]:
        return (1,) * site.rank


class MobileBlock(nn.Module):
    """What the blocks of MobileNets share: `mixer`, or `local` in a block that strides, where no other can stand."""

    def __init__(self, site: Site, layer: nn.Module, stride: int) -> None:
        super().__init__()
        self.site, self.stride = site, stride
        if stride == 1:
            self.mixer = layer
        else:
            self.local = layer

    def mix(self, x: Tensor) -> Tensor:
        return self.mixer(x) if self.stride == 1 else self.local(x)


class SeparableBlock(MobileBlock):
    """act(norm(widen(act(norm(mixer(x)))))): (B, *grid, dim) -> (B, *grid / stride, out_dim).

    (Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017, fig. 3.)
    """

    def __init__(
        self, site: Site, layer: nn.Module, dim: int, out_dim: int, stride: int = 1, drop_path: float = 0.0
    ) -> None:
        super().__init__(site, layer, stride)
        self.norm, self.activation = BatchNorm(dim), nn.ReLU6()
        self.widen = nn.Sequential(nn.Linear(dim, out_dim, bias=False), BatchNorm(out_dim), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        return self.widen(self.activation(self.norm(self.mix(x))))


class InvertedBlock(MobileBlock):
    """[x +] norm(shrink(act(norm(mixer(act(norm(expand(x)))))))), the mixer on the wide map (B, *grid, site.dim).

    x is added where neither grid nor width changes; where nothing widens there is no `expand`.
    (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, section 3.)
    """

    def __init__(
        self, site: Site, layer: nn.Module, dim: int, out_dim: int, stride: int = 1, drop_path: float = 0.0
    ) -> None:
        super().__init__(site, layer, stride)
        widen = [nn.Linear(dim, site.dim, bias=False), BatchNorm(site.dim), nn.ReLU6()] if site.dim != dim else []
        self.expand = nn.Sequential(*widen)
        self.norm, self.activation = BatchNorm(site.dim), nn.ReLU6()
        self.shrink = nn.Sequential(nn.Linear(site.dim, out_dim, bias=False), BatchNorm(out_dim))
        self.residual = stride == 1 and dim == out_dim
        self.tail = residual_tail(out_dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.shrink(self.activation(self.norm(self.mix(self.expand(x)))))
        return x + self.tail(out) if self.residual else out


class Row(NamedTuple):
    """`depth` blocks of width `dim`, their mixers on `ratio` times the width that enters; the first has `stride`.

    `block(site, layer, dim, out_dim, stride, drop_path)` gets as its layer what `mixer(site)`, or `mixer(site,
    stride=2)`, builds; the site of a block that strides has the grid that comes out.
    """

    ratio: int
    dim: int
    depth: int
    stride: int
    block: Callable[..., nn.Module] = InvertedBlock
    mixer: Callable[..., nn.Module] = SmallDepthwise


# Howard et al., 2017, table 1; Sandler et al., 2018, table 2.
SEPARABLE_ROWS = tuple(Row(1, *row, block=SeparableBlock) for row in (
    (64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2)))
INVERTED_ROWS = tuple(Row(*row) for row in (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)))


class MobileNet(Pyramid):
    """Stem, rows of blocks, a wide last layer (none without `last`), head; a stage begins with each block that strides.

    `replace` is the caller's mixer (see `create_model`). Widths are `width` times those of the rows, in multiples of 8;
    the last layer does not shrink.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        width: float = 1.0,
        stem_stride: int = 2,
        last: int | None = None,
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
        rates = drop_path_rates(drop_path_rate, sum(row.depth for row in rows))
        dim = divisible(32 * width)
        self.stem = ConvStem(*conv_norm(rank, in_chans, dim, stride=stem_stride), nn.ReLU6())
        lowers: list[nn.Module] = []
        stages: list[list[nn.Module]] = []
        widths, names, step = [], [], stem_stride
        for (row, stride), (name, stage, index), rate in zip(blocks_of(rows), places(rows), rates, strict=True):
            step *= stride
            site = Site(row.ratio * dim, 1, stage, index, step, tuple(-(-side // step) for side in size))
            out_dim = divisible(row.dim * width)
            layer = choose_mixer(replace, row.mixer)(site, name) if stride == 1 else row.mixer(site, stride=stride)
            block = row.block(site, layer, dim, out_dim, stride, rate)
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
        self.num_features = dim if last is None else divisible(last * max(width, 1.0))
        wide = [nn.Linear(dim, self.num_features, bias=False), BatchNorm(self.num_features), nn.ReLU6()]
        self.norm = nn.Identity() if last is None else nn.Sequential(*wide)
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


DEPTHWISE: KeyMap = ((r"weight", "conv.weight"),)


def inverted_names(expand: bool, stride: int, layer: KeyMap = DEPTHWISE) -> list[Rule]:
    """torchvision's names of an inverted residual, whose layers are counted whether or not it expands.

    `layer` has the rules of what stands for the depthwise convolution.
    """
    first = int(expand)
    rules: list[Rule] = []
    if expand:
        rules += [(r"conv\.0\.0\.weight", "expand.0.weight", matrix_from_1x1), (r"conv\.0\.1\.(.*)", r"expand.1.\1")]
    rules += within(layer, rf"conv\.{first}\.0\.", "mixer." if stride == 1 else "local.")
    rules += [(rf"conv\.{first}\.1\.(.*)", r"norm.\1"),
              (rf"conv\.{first + 1}\.weight", "shrink.0.weight", matrix_from_1x1),
              (rf"conv\.{first + 2}\.(.*)", r"shrink.1.\1")]
    return rules


def torchvision_names(rows: Sequence[Row] = INVERTED_ROWS, layer: KeyMap = DEPTHWISE) -> list[Rule]:
    """torchvision's names of a MobileNet V2 but for its head: its layers in one sequence."""
    rules: list[Rule] = [(r"features\.0\.(.*)", r"stem.\1")]
    number = 0
    for number, ((row, stride), (name, _, _)) in enumerate(zip(blocks_of(rows), places(rows), strict=True), 1):
        rules += within(inverted_names(row.ratio != 1, stride, layer), rf"features\.{number}\.", f"{name}.")
    last = rf"features\.{number + 1}\."
    rules += [(rf"{last}0\.weight", "norm.0.weight", matrix_from_1x1), (rf"{last}1\.(.*)", r"norm.1.\1")]
    return rules
