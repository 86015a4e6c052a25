"""RegNetY: residual bottlenecks that do not narrow, of grouped convolutions, with squeeze and excitation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.core.keymap import KeyMap, Rule, pointwise, within
from saccade.core.site import Site
from saccade.parts.convolution import grid_conv
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.resnet import Bottleneck, Convolution, kaiming, resnet_pyramid
from saccade.parts.squeeze import SqueezeExcite
from saccade.parts.stem import ConvStem


class SqueezedBottleneck(Bottleneck):
    """A bottleneck that weighs the mixed channels, by a layer a quarter as wide as what enters the block.

    (Radosavovic et al., "Designing Network Design Spaces", 2020, section 4 and appendix B.)
    """

    def __init__(self, site: Site, mixer: nn.Module, *, in_dim: int, **options: Any) -> None:
        super().__init__(site, mixer, in_dim=in_dim, **options)
        self.squeeze = SqueezeExcite(site.dim, round(in_dim / 4))

    def branch(self, x: Tensor) -> Tensor:
        x = self.activation2(self.norm2(self.mixer(self.activation1(self.norm1(self.conv1(x))))))
        return self.norm3(self.conv3(self.squeeze(x)))


def regnet_stem(rank: int, in_chans: int, dim: int) -> ConvStem:
    """A 3x3 convolution of stride 2, norm, ReLU: (B, C, *size) -> (B, *size / 2, dim)."""
    return ConvStem(kaiming(grid_conv(rank, in_chans, dim, 3, stride=2, padding=1, bias=False)), BatchNorm(dim),
                    nn.ReLU())


def regnet_pyramid(
    dims: Sequence[int], depths: Sequence[int], group: int, stem_dim: int = 32, **options: Any
) -> Pyramid:
    """A RegNetY of stages of `dims` channels, `group` of them in a group of a convolution; each halves the map."""
    mixers = [partial(Convolution, groups=dim // group) for dim in dims]
    return resnet_pyramid(
        dims, depths, widths=dims, block=SqueezedBottleneck, mixer=mixers, stem=regnet_stem, stem_dim=stem_dim,
        stem_stride=2, reduction=[partial(mixer, stride=2) for mixer in mixers], strides=(2,) * len(dims), **options,
    )


def regnet_names(stages: int = 4, trunk: str = "trunk_output", stem: str = "stem") -> list[Rule]:
    """torchvision's names of a RegNetY but for its head; `trunk` and `stem` are those of the two before it."""
    block: KeyMap = (
        (r"proj\.(.*)", r"shortcut.\1"),
        (r"f\.a\.0\.(.*)", r"conv1.\1", pointwise),
        (r"f\.a\.1\.(.*)", r"norm1.\1"),
        (r"f\.b\.0\.(.*)", r"mixer.conv.\1"),
        (r"f\.b\.1\.(.*)", r"norm2.\1"),
        (r"f\.se\.(.*)", r"squeeze.\1", pointwise),
        (r"f\.c\.0\.(.*)", r"conv3.\1", pointwise),
        (r"f\.c\.1\.(.*)", r"norm3.\1"),
    )
    rules: list[Rule] = [(rf"{stem}\.(.*)", r"stem.\1")]
    for stage in range(stages):
        place = rf"{trunk}\.block{stage + 1}\.block{stage + 1}-(\d+)\."
        rules += within(block, place, rf"stages.{stage}.blocks.\1.")
    return rules
