"""ResNet: its stem, its two blocks, and the pyramid of them, whose 3x3 convolution gives way to any mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.build import check_patterns
from saccade.core.keymap import KeyMap, Rule, pointwise, within
from saccade.core.site import MixerFactory, Site
from saccade.core.template import Template
from saccade.parts.block import residual_tail
from saccade.parts.convolution import grid_conv, on_grid
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem

Activation = Callable[[], nn.Module]
RELU: Activation = partial(nn.ReLU, inplace=True)
POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class MaxPool(nn.Module):
    """The largest of 3x3 neighbours, every second token: (B, *grid, C) -> (B, *ceil(grid / 2), C)."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.pool = POOLS[rank](3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return on_grid(self.pool, x)


class Convolution(nn.Module):
    """A dense convolution over the grid, zero-padded: (B, *grid, C) -> (B, *ceil(grid / stride), C)."""

    ranks = (1, 2, 3)
    template = Template("w[j - i], a matrix an offset", "none", "sum of x")

    def __init__(self, site: Site, kernel: int = 3, groups: int = 1, dilation: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.groups, self.dilation, self.stride = kernel, groups, dilation, stride
        padding = dilation * (kernel // 2)
        self.conv: Any = kaiming(grid_conv(site.rank, site.dim, site.dim, kernel, stride=stride, padding=padding,
                                           groups=groups, dilation=dilation, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def cost(self, site: Site | None, grid: tuple[int, ...]) -> int:
        """Multiply-adds: N kernel^n C^2 / groups, over the N tokens that come out."""
        tokens = torch.Size(-(-side // self.stride) for side in grid).numel()
        return tokens * int(self.conv.weight.numel())

    def reach(self, site: Site) -> tuple[int, ...]:
        return (self.dilation * (self.kernel // 2),) * site.rank


STRIDED: MixerFactory = partial(Convolution, stride=2)


class ResidualBlock(nn.Module):
    """activation(shortcut(x) + tail(branch(x))), (B, *grid, C) -> (B, *ceil(grid / stride), C').

    The shortcut is a 1x1 convolution and a batch norm where the shape changes. `site` is where the mixer stands; a
    block whose mixer has a stride has none, so that no other can be put in its place.
    """

    site: Site | None

    def __init__(
        self, site: Site, in_dim: int, out_dim: int, stride: int, drop_path: float, activation: Activation
    ) -> None:
        super().__init__()
        self.site = site
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_dim != out_dim:
            conv = kaiming(grid_conv(site.rank, in_dim, out_dim, 1, stride=stride, bias=False))
            self.shortcut = nn.Sequential(conv, BatchNorm(out_dim))
        self.tail = residual_tail(out_dim, None, drop_path)
        self.activation = activation()

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no branch")

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.shortcut(x) + self.tail(self.branch(x)))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; the second, which never has a stride, is the mixer: norm(mixer(act(norm(conv(x))))).

    (He et al., "Deep Residual Learning for Image Recognition", 2016, figure 5, left.)
    """

    def __init__(
        self,
        site: Site,
        mixer: nn.Module,
        *,
        in_dim: int,
        out_dim: int,
        stride: int = 1,
        drop_path: float = 0.0,
        activation: Activation = RELU,
    ) -> None:
        super().__init__(site, in_dim, out_dim, stride, drop_path, activation)
        self.conv1 = kaiming(grid_conv(site.rank, in_dim, site.dim, 3, stride=stride, padding=1, bias=False))
        self.norm1, self.activation1 = BatchNorm(site.dim), activation()
        self.mixer = mixer
        self.norm2 = BatchNorm(out_dim)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.mixer(self.activation1(self.norm1(self.conv1(x)))))


class Bottleneck(ResidualBlock):
    """norm(fc(act(norm(mixer(act(norm(fc(x)))))))): the mixer, a 3x3 convolution, works on fewer channels.

    The stride is the mixer's (as in torchvision, and not in the paper's first 1x1 convolution).
    (He et al., 2016, figure 5, right.)
    """

    def __init__(
        self,
        site: Site,
        mixer: nn.Module,
        *,
        in_dim: int,
        out_dim: int,
        stride: int = 1,
        drop_path: float = 0.0,
        activation: Activation = RELU,
    ) -> None:
        super().__init__(site, in_dim, out_dim, stride, drop_path, activation)
        self.site = site if stride == 1 else None
        self.conv1 = kaiming(nn.Linear(in_dim, site.dim, bias=False))
        self.norm1, self.activation1 = BatchNorm(site.dim), activation()
        self.mixer = mixer
        self.norm2, self.activation2 = BatchNorm(site.dim), activation()
        self.conv3 = kaiming(nn.Linear(site.dim, out_dim, bias=False))
        self.norm3 = BatchNorm(out_dim)

    def branch(self, x: Tensor) -> Tensor:
        x = self.activation2(self.norm2(self.mixer(self.activation1(self.norm1(self.conv1(x))))))
        return self.norm3(self.conv3(x))


def kaiming(layer: nn.Module) -> nn.Module:
    """The layer, its weight normal with variance 2 / (outputs that an input reaches), as ResNets start."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    return layer


def resnet_stem(rank: int, in_chans: int, dim: int, activation: Activation | None = RELU) -> ConvStem:
    """A 7x7 convolution of stride 2, norm, activation (or None), pooling: (B, C, *size) -> (B, *size / 4, dim)."""
    conv = kaiming(grid_conv(rank, in_chans, dim, 7, stride=2, padding=3, bias=False))
    act = nn.Identity() if activation is None else activation()
    return ConvStem(conv, BatchNorm(dim), act, MaxPool(rank))


def resnet_pyramid(
    dims: Sequence[int],
    depths: Sequence[int],
    *,
    widths: Sequence[int],
    block: Callable[..., nn.Module],
    mixer: MixerFactory | Sequence[MixerFactory] = Convolution,
    reduction: MixerFactory | Sequence[MixerFactory] | None = STRIDED,
    stem: Callable[[int, int, int], nn.Module] = resnet_stem,
    stem_dim: int = 64,
    stem_stride: int = 4,
    strides: Sequence[int] = (1, 2, 2, 2),
    heads: Sequence[int] | None = None,
    replace: Any = None,
    **options: Any,
) -> Pyramid:
    """A pyramid of residual blocks: maps of `dims` channels, mixers on `widths` channels.

    `block(site, mixer, in_dim=, out_dim=, stride=, drop_path=)`; the first block of a stage has the stage's stride. A
    mixer that has to follow a stride is built by `reduction`, whatever the caller replaces; None says that the block
    strides before it mixes (`BasicBlock`), so that every block has a mixer. heads: one for 32 channels unless given.
    """

    def first(site: Site) -> bool:
        return reduction is not None and site.index == 0 and strides[site.stage] > 1

    def narrow(site: Site) -> Site:
        return changed(site, dim=widths[site.stage])

    def at(factory: MixerFactory, site: Site) -> nn.Module:
        if first(site):
            factory = reduction if callable(reduction) else reduction[site.stage]  # type: ignore[index]
        return factory(narrow(site))

    def build(site: Site, mixer: nn.Module, drop_path: float) -> nn.Module:
        before = dims[site.stage - 1] if site.stage else stem_dim
        return block(narrow(site), mixer, in_dim=site.dim if site.index else before, out_dim=site.dim,
                     stride=1 if site.index else strides[site.stage], drop_path=drop_path)

    check_patterns(replace, [f"stages.{stage}.blocks.{index}" for stage, depth in enumerate(depths)
                             for index in range(depth) if not first(Site(1, stage=stage, index=index))])
    return Pyramid(
        dims, depths, heads or [max(width // 32, 1) for width in widths],
        stem=lambda rank, in_chans, _: stem(rank, in_chans, stem_dim), stride=stem_stride * strides[0],
        downsample=lambda *_: nn.Identity(), downsample_stride=strides[1:], block=build,
        mixer=each(mixer, at), replace=None if replace is None else each(replace, at), **options,
    )


def each(factories: Any, at: Callable[[MixerFactory, Site], nn.Module]) -> Any:
    """One mixer factory, several, or some by pattern, each asked through `at`."""
    if callable(factories):
        return partial(at, factories)
    if isinstance(factories, Mapping):
        return {pattern: partial(at, factory) for pattern, factory in factories.items()}
    return [partial(at, factory) for factory in factories]


# The names that torchvision, timm and most authors give to the modules of a block.
BLOCK_NAMES: KeyMap = (
    (r"conv2\.(.*)", r"mixer.conv.\1"),
    (r"conv([13])\.(.*)", r"conv\1.\2", pointwise),
    (r"bn(\d)\.(.*)", r"norm\1.\2"),
    (r"downsample\.(.*)", r"shortcut.\1"),
)


def resnet_names(block: KeyMap = BLOCK_NAMES) -> list[Rule]:
    """torchvision's names of a ResNet; `block` has a block's rules."""
    rules: list[Rule] = [
        (r"conv1\.(.*)", r"stem.0.\1"),
        (r"bn1\.(.*)", r"stem.1.\1"),
        (r"fc\.(.*)", r"head.fc.\1"),
    ]
    for number in range(4):
        rules += within(block, rf"layer{number + 1}\.(\d+)\.", rf"stages.{number}.blocks.\1.")
    return rules
