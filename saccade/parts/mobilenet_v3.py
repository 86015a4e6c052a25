"""MobileNetV3: inverted residuals with squeeze and excitation and hard swish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.keymap import KeyMap, pointwise
from saccade.core.site import Site
from saccade.parts.block import residual_tail
from saccade.parts.convolution import grid_conv
from saccade.parts.head import Head
from saccade.parts.mobilenet import MobileBlock
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid, Stage, check_sizes, drop_path_rates
from saccade.parts.squeeze import SqueezeExcite, divisible
from saccade.parts.stem import ConvStem

NORM: Callable[[int], BatchNorm] = partial(BatchNorm, eps=1e-3, momentum=0.01)


class Depthwise(nn.Module):
    """A depthwise convolution without bias: (B, *grid, C) -> (B, *grid / stride, C)."""

    ranks = (1, 2, 3)

    def __init__(self, site: Site, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = grid_conv(site.rank, site.dim, site.dim, kernel, stride=stride, padding=kernel // 2,
                              groups=site.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class GatedBlock(MobileBlock):
    """[x +] norm(shrink(se(act(norm(mixer(act(norm(expand(x)))))))), the mixer on a map (B, *grid, site.dim).

    (Howard et al., "Searching for MobileNetV3", 2019, section 5.)
    """

    def __init__(
        self, site: Site, layer: nn.Module, dim: int, out_dim: int, stride: int, squeezes: bool,
        activation: Callable[[], nn.Module], drop_path: float = 0.0,
    ) -> None:
        super().__init__(site, layer, stride)
        wide = site.dim
        self.expand = nn.Sequential(*([nn.Linear(dim, wide, bias=False), NORM(wide), activation()]
                                      if wide != dim else []))
        self.norm, self.activation = NORM(wide), activation()
        self.squeeze: nn.Module = SqueezeExcite(wide, divisible(wide // 4), gate=nn.Hardsigmoid) if squeezes \
            else nn.Identity()
        self.shrink = nn.Sequential(nn.Linear(wide, out_dim, bias=False), NORM(out_dim))
        self.residual = stride == 1 and dim == out_dim
        self.tail = residual_tail(out_dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.shrink(self.squeeze(self.activation(self.norm(self.mix(self.expand(x))))))
        return x + self.tail(out) if self.residual else out


class Row(NamedTuple):
    """One block: the kernel and width of its mixer, the width that leaves, and whether it squeezes."""

    kernel: int
    wide: int
    dim: int
    squeezes: bool
    hard: bool  # hard swish, else ReLU
    stride: int


# Howard et al., 2019, table 1: the block of the stem, then a stage from each block that strides.
LARGE = (
    (Row(3, 16, 16, False, False, 1),),
    (Row(3, 64, 24, False, False, 2), Row(3, 72, 24, False, False, 1)),
    (Row(5, 72, 40, True, False, 2), *[Row(5, 120, 40, True, False, 1)] * 2),
    (Row(3, 240, 80, False, True, 2), Row(3, 200, 80, False, True, 1), *[Row(3, 184, 80, False, True, 1)] * 2,
     Row(3, 480, 112, True, True, 1), Row(3, 672, 112, True, True, 1)),
    (Row(5, 672, 160, True, True, 2), *[Row(5, 960, 160, True, True, 1)] * 2),
)
NANO = (
    (Row(3, 16, 16, False, False, 1),),
    (Row(3, 32, 16, False, False, 1), Row(3, 32, 16, False, False, 1)),
    (Row(5, 32, 24, True, False, 2),),
    (Row(3, 48, 32, True, True, 2), Row(3, 64, 32, True, True, 1)),
    (Row(5, 64, 40, True, True, 2), Row(5, 80, 40, True, True, 1)),
)


class MobileNetV3(Pyramid):
    """Stem, stages, a last layer six times as wide as the last stage (the norm), head.

    Widths are `width` times those of the rows, in multiples of 8. `replace` is the caller's mixer.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Row]] = LARGE,
        *,
        width: float = 1.0,
        stem_stride: int = 2,
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
        rates = drop_path_rates(drop_path_rate, sum(map(len, rows)))
        dim, step = divisible(rows[0][0].dim * width), stem_stride
        stem = [grid_conv(rank, in_chans, dim, 3, stride=stem_stride, padding=1, bias=False), NORM(dim), nn.Hardswish()]
        stages: list[list[nn.Module]] = []
        names: list[str] = []
        info = []
        for stage, group in enumerate(rows, -1):
            blocks: list[nn.Module] = []
            for index, row in enumerate(group):
                step *= row.stride
                out_dim = divisible(row.dim * width)
                site = Site(divisible(row.wide * width), 1, max(stage, 0), index, step,
                            tuple(-(-side // step) for side in size))
                own = partial(Depthwise, kernel=row.kernel)
                if stage >= 0 and index and row.stride == 1:
                    names.append(f"stages.{stage}.blocks.{index - 1}")
                    layer = choose_mixer(replace, own)(site, names[-1])
                else:
                    layer = own(site, stride=row.stride)
                blocks.append(GatedBlock(site, layer, dim, out_dim, row.stride, row.squeezes,
                                         nn.Hardswish if row.hard else nn.ReLU, rates.pop(0)))
                dim = out_dim
            if stage < 0:
                stem += blocks
                continue
            stages.append(blocks)
            info.append(dict(num_chs=dim, reduction=step, module=f"stages.{stage}"))
        check_patterns(replace, names)
        self.stem = ConvStem(*stem)
        self.stages = nn.ModuleList(Stage(lower, blocks) for lower, *blocks in stages)
        self.num_features = 6 * dim
        self.norm = nn.Sequential(nn.Linear(dim, self.num_features, bias=False), NORM(self.num_features),
                                  nn.Hardswish())
        self._make_head = Head
        self.reset_classifier(num_classes)
        self.feature_info = FeatureInfo(info)
        self.default_out_indices = tuple(range(len(stages)))


def block_names(row: Row, expands: bool, theirs: str, ours: str, mixer: str) -> KeyMap:
    """torchvision's names of one block, whose layers are counted whether or not it expands or squeezes."""
    first = int(expands)
    last = first + 1 + row.squeezes
    block = rf"{theirs}block\."
    return (
        *(((rf"{block}0\.0\.(.*)", rf"{ours}expand.0.\1", pointwise),
           (rf"{block}0\.1\.(.*)", rf"{ours}expand.1.\1")) if expands else ()),
        (rf"{block}{first}\.0\.(.*)", rf"{ours}{mixer}.conv.\1"),
        (rf"{block}{first}\.1\.(.*)", rf"{ours}norm.\1"),
        (rf"{block}{first + 1}\.(fc[12]\..*)", rf"{ours}squeeze.\1", pointwise),
        (rf"{block}{last}\.0\.(.*)", rf"{ours}shrink.0.\1", pointwise),
        (rf"{block}{last}\.1\.(.*)", rf"{ours}shrink.1.\1"),
    )
