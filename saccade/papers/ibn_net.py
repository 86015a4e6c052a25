"""IBN-Net: instance norm beside batch norm, so that a network forgets the look of a picture and keeps its content.

Instance norm removes what an image's appearance adds to a channel (its own mean and variance over the map), batch norm
keeps what tells images apart. In shallow blocks the channels share the two:
    IBN-a: the first norm of a block is [IN(x_1); BN(x_2)], x_1 and x_2 the halves of its channels,
    IBN-b: IN(x + branch(x)) in the last block of the first two stages, and in the stem.

Pan, Luo, Shi, Tang, "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", 2018, section 3.

Any grid: the authors' code pools windows of 7x7, right for 224 pixels; here the whole map. A map of one token has no
variance: its instance norm is the bias.
Quirks kept: IBN-a leaves the last stage alone; DenseNet has two fifths of the channels, the last ones, under instance
norm, in each third layer of the first three stages; SE has no biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as changed
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, Rule, pointwise, within
from saccade.core.site import Site
from saccade.parts.convolution import AveragePool, at_least, grid_conv
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.reparameterize import affine_of
from saccade.parts.resnet import (
    BLOCK_NAMES,
    RELU,
    BasicBlock,
    Bottleneck,
    Convolution,
    each,
    kaiming,
    resnet_names,
    resnet_pyramid,
    resnet_stem,
)
from saccade.parts.squeeze import SqueezeExcite

_ADDRESS = "https://github.com/XingangPan/IBN-Net/releases/download/v1.0/"

CARD = Card(
    "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net",
    authors="Pan, Luo, Shi, Tang",
    year=2018,
    systems=("ibn_net",),
    arxiv="1807.09441",
    code="XingangPan/IBN-Net@d167338",
    licence="MIT",
    weights_licence="MIT",
    read="paper, code",
    keywords="instance normalization, batch normalization, domain generalization, appearance invariance, DenseNet",
    params={"resnet18_ibn_a": 11689512, "resnet18_ibn_b": 11689896, "resnet50_ibn_a": 25.6e6, "resnet101_ibn_a": 44.5e6,
            "resnext101_ibn_a": 44.2e6, "se_resnet101_ibn_a": 49.3e6, "densenet121_ibn_a": 8.0e6,
            "densenet169_ibn_a": 14.1e6},
    top1={"densenet121_ibn_a": 75.53, "densenet169_ibn_a": 76.75, "resnet18_ibn_a": 70.83, "resnet34_ibn_a": 74.22,
          "resnet50_ibn_a": 77.46, "resnet101_ibn_a": 78.61, "resnext101_ibn_a": 79.12, "se_resnet101_ibn_a": 78.75},
    weights={
        name: Weights(f"{_ADDRESS}{name}-{digest}.pth", interpolation="bilinear", licence="MIT")
        for name, digest in {
            "resnet18_ibn_a": "2f571257", "resnet34_ibn_a": "94bc1577", "resnet50_ibn_a": "d9d0bb7b",
            "resnet101_ibn_a": "59ea0ac6", "resnet18_ibn_b": "bc2f3c11", "resnet34_ibn_b": "04134c37",
            "resnet50_ibn_b": "9ca61e85", "resnet101_ibn_b": "c55f6dba", "resnext101_ibn_a": "6ace051d",
            "se_resnet101_ibn_a": "fabed4e2", "densenet121_ibn_a": "e4af5cc1", "densenet169_ibn_a": "9f32c161",
        }.items()
    },
    goldens=("resnet18_ibn_a", "resnet18_ibn_b", "op_ibn"),
    tests=("tests/papers/test_ibn_net.py",),
)


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, statistics of a channel of an image over its map."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """scale and shift (B, 1, C) that norm this x (B, N, C)."""
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        scale = (variance + self.eps).rsqrt() * self.weight
        return scale, self.bias - mean * scale

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        scale, shift = self.affine(tokens)
        return torch.addcmul(shift, tokens, scale).view(x.shape)


class InstanceBatchNorm(nn.Module):
    """[IN(x_1); BN(x_2)]: int(dim ratio) channels under instance norm, the rest under batch norm.

    `last` puts the instance norm on the last channels instead, and rounds the batch norm's share down.
    """

    def __init__(self, dim: int, ratio: float = 0.5, last: bool = False) -> None:
        super().__init__()
        self.last = last
        share = dim - int(dim * (1 - ratio)) if last else int(dim * ratio)
        self.sides = [dim - share, share] if last else [share, dim - share]
        self.IN = InstanceNorm(share)
        self.BN = BatchNorm(dim - share)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        one, other = tokens.split(self.sides, -1)
        if self.last:
            one, other = other, one
        if self.training:
            scale, shift = self.IN.affine(one)
            return self.join(torch.addcmul(shift, one, scale), self.BN(other.contiguous())).view(x.shape)
        # In evaluation both norms are one multiplication and addition: no half is copied.
        pairs = zip(self.IN.affine(one), affine_of(self.BN), strict=True)
        scale, shift = (self.join(mine, its.expand(*mine.shape[:2], -1)) for mine, its in pairs)
        return torch.addcmul(shift, tokens, scale).view(x.shape)

    def join(self, instance: Tensor, batch: Tensor) -> Tensor:
        return torch.cat([batch, instance] if self.last else [instance, batch], -1)


def ibn_block(
    site: Site, mixer: nn.Module, kind: type[BasicBlock | Bottleneck], ibn: str, last: bool, squeeze: bool, **place: Any
) -> nn.Module:
    """A residual block with the norms of IBN-a (the first three stages) or IBN-b (the last block of the first two)."""
    block: Any = kind(site, mixer, **place)
    if ibn == "a" and site.stage < 3:
        block.norm1 = InstanceBatchNorm(site.dim)
    if ibn == "b" and site.stage < 2 and last:
        block.activation = nn.Sequential(InstanceNorm(place["out_dim"]), block.activation)
    if squeeze:
        block.tail = nn.Sequential(Squeeze(place["out_dim"]), block.tail)
    return block


class Squeeze(SqueezeExcite):
    """Squeeze and excitation without biases, to a sixteenth of the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim // 16)
        self.fc1 = nn.Linear(dim, dim // 16, bias=False)
        self.fc2 = nn.Linear(dim // 16, dim, bias=False)


class DenseLayer(nn.Module):
    """x -> [x; mixer(act(norm(fc(act(norm(x))))))]: a layer adds `growth` channels and keeps all before it.

    The mixer is a 3x3 convolution from 4 growth channels to growth; another keeps the 4 growth, and a linear layer
    narrows them. (Huang et al., "Densely Connected Convolutional Networks", 2017, section 3.)
    """

    def __init__(self, dim: int, growth: int, mixer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.norm1, self.activation1 = norm, RELU()
        self.conv1 = kaiming(nn.Linear(dim, 4 * growth, bias=False))
        self.norm2, self.activation2 = BatchNorm(4 * growth), RELU()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        new = self.activation2(self.norm2(self.conv1(self.activation1(self.norm1(x)))))
        return torch.cat([x, self.mixer(new)], -1)


class Transition(nn.Module):
    """mean over 2x2 of fc(act(norm(x))): half the channels, half the sides (a last odd row or column is left out)."""

    def __init__(self, rank: int, dim: int) -> None:
        super().__init__()
        self.norm, self.activation = BatchNorm(dim), RELU()
        self.conv = kaiming(nn.Linear(dim, dim // 2, bias=False))
        self.pool = AveragePool(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.activation(self.norm(x)))
        mean: Tensor = self.pool(at_least(x, 2, first=1))
        return mean


_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_DENSE = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32), 161: (6, 12, 36, 24)}
_NANO: dict[str, Any] = dict(depths=(1, 2, 2), dim=16, strides=(1, 2, 1), img_size=32)
SIZES: dict[str, dict[str, Any]] = {
    **{f"resnet{layers}_ibn_{ibn}": dict(depths=depths, ibn=ibn, basic=layers < 50)
       for layers, depths in _DEPTHS.items() for ibn in "ab"},
    **{f"resnext{layers}_ibn_a": dict(depths=_DEPTHS[layers], width=2, groups=32) for layers in (50, 101, 152)},
    **{f"se_resnet{layers}_ibn_a": dict(depths=_DEPTHS[layers], squeeze=True) for layers in (50, 101, 152)},
    **{f"densenet{layers}_ibn_a": dict(builder="densenet_ibn", depths=depths) for layers, depths in _DENSE.items()},
    "ibn_a_nano": _NANO | dict(squeeze=True),
    "ibn_b_nano": _NANO | dict(ibn="b", basic=True),
    "densenet_ibn_nano": dict(builder="densenet_ibn", depths=(1, 2), dim=16, growth=8, img_size=32),
}
SIZES["densenet161_ibn_a"] |= dict(dim=96, growth=48)


def ibn_net(
    depths: Sequence[int],
    ibn: str = "a",
    basic: bool = False,
    squeeze: bool = False,
    dim: int = 64,
    width: int = 1,
    groups: int = 1,
    strides: Sequence[int] = (1, 2, 2, 2),
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A ResNet with IBN-a or IBN-b, in its kinds: basic blocks, bottlenecks, groups (ResNeXt), squeeze (SE-ResNet)."""
    bases = [dim * 2**stage for stage in range(len(depths))]
    kind: type[BasicBlock | Bottleneck] = BasicBlock if basic else Bottleneck

    def block(site: Site, mixer: nn.Module, **place: Any) -> nn.Module:
        last = site.index == depths[site.stage] - 1 and site.index > 0
        return ibn_block(site, mixer, kind, ibn, last, squeeze, **place)

    def stem(rank: int, in_chans: int, dim: int) -> nn.Module:
        layers = resnet_stem(rank, in_chans, dim)
        if ibn == "b":
            layers[1] = InstanceNorm(dim)
        return layers

    conv = partial(Convolution, groups=groups)
    return resnet_pyramid(
        bases if basic else [4 * base for base in bases], depths, widths=[width * base for base in bases], block=block,
        mixer=conv, reduction=None if basic else partial(conv, stride=2), stem=stem, stem_dim=dim, strides=strides,
        replace=mixer, **common,
    )


def densenet_ibn(
    depths: Sequence[int], dim: int = 64, growth: int = 32, mixer: Any = None, **common: Any
) -> Pyramid:
    """A DenseNet with IBN-a."""
    starts, dims = [dim], []
    for depth in depths:
        dims.append(starts[-1] + depth * growth)
        starts.append(dims[-1] // 2)

    def narrow(site: Site) -> Site:
        return changed(site, dim=4 * growth)

    def conv(site: Site) -> nn.Module:
        return kaiming(grid_conv(site.rank, 4 * growth, growth, 3, padding=1, bias=False))

    def narrowed(factory: Any, site: Site) -> nn.Module:
        return nn.Sequential(factory(narrow(site)), nn.Linear(4 * growth, growth, bias=False))

    def block(site: Site, mixer: nn.Module, drop_path: float) -> nn.Module:
        width = starts[site.stage] + site.index * growth
        ibn = site.stage < 3 and site.index % 3 == 0
        return DenseLayer(width, growth, mixer, InstanceBatchNorm(width, 0.4, last=True) if ibn else BatchNorm(width))

    return Pyramid(
        dims, depths, [max(growth // 8, 1)] * len(depths), block=block, mixer=conv,
        stem=lambda rank, in_chans, _: resnet_stem(rank, in_chans, dim), downsample=lambda rank, dim, _: Transition(
            rank, dim), norm=lambda dim: nn.Sequential(BatchNorm(dim), RELU()),
        replace=None if mixer is None else each(mixer, narrowed), **common,
    )


_BLOCK: KeyMap = (
    (r"IN\.(.*)", r"activation.0.\1"),
    (r"se\.fc\.0\.(.*)", r"tail.0.fc1.\1"),
    (r"se\.fc\.2\.(.*)", r"tail.0.fc2.\1"),
    *BLOCK_NAMES,
)
_LAYER: KeyMap = ((r"conv2\.(.*)", r"mixer.\1"), (r"(.*)", r"\1", pointwise))
_DENSE_NAMES: list[Rule] = [
    (r"features\.conv0\.(.*)", r"stem.0.\1"),
    (r"features\.norm0\.(.*)", r"stem.1.\1"),
    (r"features\.norm5\.(.*)", r"norm.0.\1"),
    (r"classifier\.(.*)", r"head.fc.\1"),
    *(rule for stage, depth in enumerate((6, 12, 48, 32)) for index in range(depth) for rule in within(
        _LAYER, rf"features\.denseblock{stage + 1}\.denselayer{index + 1}\.", rf"stages.{stage}.blocks.{index}.")),
    *((rf"features\.transition{stage}\.(.*)", rf"stages.{stage}.downsample.\1", pointwise) for stage in (1, 2, 3)),
]
AUTHORS: KeyMap = (*resnet_names(_BLOCK), *_DENSE_NAMES)
TAPS = {f"stage{stage + 1}": f"stages.{stage}" for stage in range(4)}
