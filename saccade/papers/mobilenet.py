"""MobileNet: a convolution in two cheap halves, one over places, one over channels.

    out = fc(act(norm(depthwise_3x3(x)))),
costs 1/C + 1/9 of a dense 3x3 convolution. The second network turns the residual block inside out: the shortcut joins
narrow maps, the depthwise convolution works on maps six times as wide, and nothing bends the narrow ones,
    x += norm(fc(act(norm(depthwise_3x3(act(norm(fc'(x)))))))).
Here any mixer can stand in the place of a depthwise convolution that has no stride.

Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam, "MobileNets: Efficient Convolutional Neural Networks for
Mobile Vision Applications", 2017, section 3.
Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, sections 3 and 4.

Any grid: convolutions pad with zeros. Quirks kept: widths are multiples of 8, the last layer of the second never gets
narrower; both bound their activations by 6. The head has no dropout (torchvision trains the second with 0.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saccade.core.card import HALF, Card, Weights
from saccade.core.keymap import KeyMap, Rule, matrix_from_1x1, within
from saccade.parts.mobilenet import (
    INVERTED_ROWS,
    SEPARABLE_ROWS,
    MobileNet,
    Row,
    SeparableBlock,
    places,
    torchvision_names,
)

CARD = Card(
    "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications; "
    "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    authors="Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam; Sandler, Zhmoginov",
    year=2018,
    arxiv="1704.04861, 1801.04381",
    code="pytorch/vision",
    licence="BSD-3-Clause",
    read="paper, code",
    keywords="depthwise separable convolution, inverted residual, linear bottleneck, width multiplier, compact network",
    params={"mobilenet_v1": 4.2e6, "mobilenet_v1_075": 2.6e6, "mobilenet_v1_050": 1.3e6, "mobilenet_v1_025": 0.5e6,
            "mobilenet_v2": 3.4e6, "mobilenet_v2_140": 6.9e6, "mobilenet_v2_050": 1.95e6},
    macs={"mobilenet_v1": 569e6, "mobilenet_v1_075": 325e6, "mobilenet_v1_050": 149e6, "mobilenet_v1_025": 41e6,
          "mobilenet_v2": 300e6, "mobilenet_v2_140": 585e6, "mobilenet_v2_050": 97e6},
    top1={"mobilenet_v1": 70.6, "mobilenet_v1_075": 68.4, "mobilenet_v1_050": 63.7, "mobilenet_v1_025": 50.6,
          "mobilenet_v2": 72.0, "mobilenet_v2_140": 74.7, "mobilenet_v2_050": 65.4},
    aliases={"mobilenetv1_100": "mobilenet_v1", "mobilenetv2_100": "mobilenet_v2",
             "mobilenetv2_140": "mobilenet_v2_140", "mobilenetv2_050": "mobilenet_v2_050"},
    weights={
        "mobilenet_v2": Weights("https://download.pytorch.org/models/mobilenet_v2-b0353104.pth", "b0353104",
                                interpolation="bilinear", top1=71.9),
        "mobilenet_v1": Weights("timm:mobilenetv1_100.ra4_e3600_r224_in1k", layout="timm", mean=HALF, std=HALF,
                                top1=75.4, licence="Apache-2.0"),
        "mobilenet_v2_140": Weights("timm:mobilenetv2_140.ra_in1k", layout="timm", top1=76.5, licence="Apache-2.0"),
        "mobilenet_v2_050": Weights("timm:mobilenetv2_050.lamb_in1k", layout="timm", top1=65.9, licence="Apache-2.0"),
    },
    tests=("tests/papers/test_mobilenet.py",),
)

SIZES: dict[str, dict[str, Any]] = {
    **{f"mobilenet_v1{name}": dict(rows=SEPARABLE_ROWS, width=width)
       for name, width in {"": 1.0, "_075": 0.75, "_050": 0.5, "_025": 0.25}.items()},
    **{f"mobilenet_v2{name}": dict(rows=INVERTED_ROWS, last=1280, width=width)
       for name, width in {"": 1.0, "_140": 1.4, "_050": 0.5}.items()},
    "mobilenet_v1_nano": dict(rows=[Row(1, 32, 1, 1, SeparableBlock), Row(1, 64, 2, 2, SeparableBlock),
                                    Row(1, 128, 2, 2, SeparableBlock)], stem_stride=1, img_size=32),
    "mobilenet_v2_nano": dict(rows=[Row(1, 16, 1, 1), Row(4, 24, 2, 2), Row(4, 32, 2, 2)], stem_stride=1, last=64,
                              img_size=32),
}


def mobilenet(
    rows: Sequence[Row],
    width: float = 1.0,
    stem_stride: int = 2,
    last: int | None = None,
    mixer: Any = None,
    **common: Any,
) -> MobileNet:
    """A MobileNet of `width` times the channels of its rows."""
    return MobileNet(rows, width=width, stem_stride=stem_stride, last=last, replace=mixer, **common)


def AUTHORS(name: str) -> KeyMap:
    """torchvision's names of the second network."""
    return (*torchvision_names(), (r"classifier\.1\.(.*)", r"head.fc.\1")) if "v2" in name else ()


def TIMM(name: str) -> KeyMap:
    """timm's names: blocks.ROW.NUMBER, the layers of a block without an `expand` counted from its depthwise one."""
    rows: Sequence[Row] = SIZES[name]["rows"]
    rules: list[Rule] = [
        (r"conv_stem\.(.*)", r"stem.0.\1"), (r"bn1\.(.*)", r"stem.1.\1"), (r"classifier\.(.*)", r"head.fc.\1"),
        (r"conv_head\.(.*)", r"norm.0.\1", matrix_from_1x1), (r"bn2\.(.*)", r"norm.1.\1")]
    ours = iter(places(rows))
    for stage, row in enumerate(rows):
        narrow = "widen" if row.block is SeparableBlock else "shrink"
        names = ("expand", "", narrow) if row.ratio != 1 else ("", narrow)
        for number in range(row.depth):
            layer = "local" if row.stride > 1 and not number else "mixer"
            rules += within(_timm_block(names, layer), rf"blocks\.{stage}\.{number}\.", f"{next(ours)[0]}.")
    return rules


def _timm_block(layers: Sequence[str], depthwise: str) -> KeyMap:
    """A block's names: conv_pw, conv_dw, conv_pwl with bn1 to bn3, or conv_dw, conv_pw with bn1 and bn2."""
    convs = ("conv_pw", "conv_dw", "conv_pwl") if len(layers) == 3 else ("conv_dw", "conv_pw")
    rules: list[Rule] = [(r"conv_dw\.weight", f"{depthwise}.conv.weight")]
    for number, (conv, layer) in enumerate(zip(convs, layers, strict=True), 1):
        rules += [(rf"{conv}\.weight", f"{layer}.0.weight", matrix_from_1x1),
                  (rf"bn{number}\.(.*)", rf"{layer}.1.\1" if layer else r"norm.\1")]
    return rules
