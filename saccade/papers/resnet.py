"""ResNet: layers learn what to add to their input.

A block computes x + F(x), so that a deep network starts near the identity and gradients pass:
    F(x) = norm(conv_3x3(relu(norm(conv_3x3(x))))),   or, for deep ones, 1x1 to fewer channels, 3x3, 1x1 back.
Here any mixer can stand in the place of the 3x3 convolution of a bottleneck, and of the second one of a basic block,
wherever it has no stride. ResNeXt cuts the 3x3 convolution into groups; wide ResNets double its channels.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016, section 3.
Xie, Girshick, Dollar, Tu, He, "Aggregated Residual Transformations for Deep Neural Networks", 2017.
Zagoruyko, Komodakis, "Wide Residual Networks", 2016.

Any grid: convolutions pad with zeros. Quirks kept: names, weights and the place of the stride (the 3x3 convolution, not
the 1x1 before it) are torchvision's; timm's checkpoints have the same names.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap
from saccade.parts.pyramid import Pyramid
from saccade.parts.resnet import BasicBlock, Bottleneck, Convolution, resnet_names, resnet_pyramid

__all__ = ["CARD", "SIZES", "Convolution", "resnet"]

_ADDRESS = "https://download.pytorch.org/models/"

CARD = Card(
    "Deep Residual Learning for Image Recognition",
    authors="He, Zhang, Ren, Sun",
    year=2016,
    arxiv="1512.03385, 1611.05431, 1605.07146",
    code="pytorch/vision",
    licence="BSD-3-Clause",
    read="paper, code",
    keywords="residual network, bottleneck, convolution, ResNeXt, grouped convolution, wide ResNet",
    kinds=("backbone", "mixer"),
    mixers={"convolution": "Convolution"},
    params={"resnet18": 11689512, "resnet34": 21797672, "resnet50": 25557032, "resnet101": 44549160,
            "resnet152": 60192808, "resnext50_32x4d": 25028904, "resnext101_32x8d": 88791336,
            "resnext101_64x4d": 83455272, "wide_resnet50_2": 68883240, "wide_resnet101_2": 126886696},
    macs={"resnet18": 1.8e9, "resnet34": 3.6e9, "resnet50": 4.1e9, "resnet101": 7.8e9, "resnet152": 11.5e9},
    top1={"resnet18": 69.76, "resnet34": 73.31, "resnet50": 76.13, "resnet101": 77.37, "resnet152": 78.31,
          "resnext50_32x4d": 77.62, "resnext101_32x8d": 79.31, "wide_resnet50_2": 78.47, "wide_resnet101_2": 78.85},
    weights={
        name: Weights(f"{_ADDRESS}{name}-{digest}.pth", digest, interpolation="bilinear")
        for name, digest in {
            "resnet18": "f37072fd", "resnet34": "b627a593", "resnet50": "0676ba61", "resnet101": "63fe2227",
            "resnet152": "394f9c45", "resnext50_32x4d": "7cdf4587", "resnext101_32x8d": "8ba56ff5",
            "wide_resnet50_2": "95faca4d", "wide_resnet101_2": "32ee1156",
        }.items()
    } | {
        "resnext101_64x4d": Weights(f"{_ADDRESS}resnext101_64x4d-173b62eb.pth", "173b62eb", interpolation="bilinear",
                                    crop=224 / 232, top1=83.25),
    },
    tests=("tests/papers/test_resnet.py",),
)

_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
SIZES: dict[str, dict[str, Any]] = {
    **{f"resnet{layers}": dict(depths=depths, basic=layers < 50) for layers, depths in _DEPTHS.items()},
    "resnext50_32x4d": dict(depths=_DEPTHS[50], width=2, groups=32),
    "resnext101_32x8d": dict(depths=_DEPTHS[101], width=4, groups=32),
    "resnext101_64x4d": dict(depths=_DEPTHS[101], width=4, groups=64),
    "wide_resnet50_2": dict(depths=_DEPTHS[50], width=2),
    "wide_resnet101_2": dict(depths=_DEPTHS[101], width=2),
    "resnet_nano": dict(depths=(1, 2, 2), dim=16, strides=(1, 2, 1), img_size=32),
}


def resnet(
    depths: tuple[int, ...],
    basic: bool = False,
    dim: int = 64,
    width: int = 1,
    groups: int = 1,
    strides: tuple[int, ...] = (1, 2, 2, 2),
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A ResNet of basic blocks or of bottlenecks; `dim` channels double from stage to stage, sides shrink by `strides`.

    In a bottleneck the mixer works on `width` x dim channels and the maps have 4 dim.
    """
    bases = [dim * 2**stage for stage in range(len(depths))]
    options: dict[str, Any] = dict(stem_dim=dim, strides=strides, replace=mixer, **common)
    if basic:
        return resnet_pyramid(bases, depths, widths=bases, block=BasicBlock, reduction=None, **options)
    conv = partial(Convolution, groups=groups)
    return resnet_pyramid([4 * base for base in bases], depths, widths=[width * base for base in bases],
                          block=Bottleneck, mixer=conv, reduction=partial(conv, stride=2), **options)


AUTHORS: KeyMap = tuple(resnet_names())
