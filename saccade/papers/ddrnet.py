"""DDRNet: two branches of one resolution apart and more, which tell each other what they see.

After a shared start at an eighth of the picture one branch stays there for the detail d, the other goes on to 1/64 for
the context c. After each stage both are fused,
    c = context(relu(c)),   d = detail(relu(d)),   c' = c + down(relu(d)),   d' = d + up(compress(relu(c))),
and what the context ends with is pooled over ever larger windows, each scale refined with what the smaller ones found,
    y_0 = f_0(x),   y_i = g_i(up(f_i(pool_i(x))) + y_(i-1)),   DAPPM(x) = f([y_0 ... y_4]) + s(x),
enlarged, and added to the detail for the head. All of f, g, s are relu(norm(.)) before a convolution.

Hong, Pan, Sun, Jia, "Deep Dual-resolution Networks for Real-time and Accurate Semantic Segmentation of Road Scenes",
2021, sections 3.2 and 3.3.

Any picture: coarse maps are enlarged to the sides of the fine ones, an eighth rounded up (the authors' rounds down and
takes multiples of 8 alone). Quirks kept: averages count the zeros of their padding; the last block of a stage has no
activation; what both branches send is taken before the other's has been added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.card import Card, Weights
from saccade.core.keymap import Dropped, KeyMap, Rule, within
from saccade.core.site import Site
from saccade.parts.convolution import AveragePool, grid_conv
from saccade.parts.norm import BatchNorm
from saccade.parts.position import LINEAR
from saccade.parts.pyramid import check_sizes
from saccade.parts.resnet import BLOCK_NAMES, STRIDED, BasicBlock, Bottleneck, Convolution, kaiming
from saccade.parts.stem import ConvStem

CARD = Card(
    "Deep Dual-resolution Networks for Real-time and Accurate Semantic Segmentation of Road Scenes",
    authors="Hong, Pan, Sun, Jia",
    year=2021,
    systems=("ddrnet",),
    arxiv="2101.06085",
    code="ydhongHIT/DDRNet@de0db31",
    licence="MIT",
    read="abstract, code",
    keywords="real-time semantic segmentation, dual-resolution, bilateral fusion, deep aggregation pyramid pooling, "
             "DAPPM, Cityscapes",
    kinds=("segmentation",),
    weights={
        name: Weights(f"https://drive.google.com/file/d/{file}/view?usp=sharing", data="Cityscapes", img_size=1024,
                      crop=1.0)
        for name, file in (("ddrnet_23_slim", "1d_K3Af5fKHYwxSo8HkxpnhiekhwovmiP"),
                           ("ddrnet_23", "16viDZhbmuc3y7OSsUo2vhA7V6kYO0KX6"))
    },
    params={"ddrnet_23_slim": 5.7e6, "ddrnet_23": 20.1e6, "ddrnet_39": 32.3e6},
    goldens=("ddrnet_23_slim", "op_ddrnet_dappm"),
    tests=("tests/papers/test_ddrnet.py",),
)

WINDOWS = ((5, 2), (9, 4), (17, 8))  # kernel and stride of DAPPM's averages; the last scale is the whole map


def preceded(rank: int, dim: int, out_dim: int, kernel: int = 1, bias: bool = False) -> nn.Sequential:
    """conv(relu(norm(x))) on grids of tokens."""
    conv = kaiming(grid_conv(rank, dim, out_dim, kernel, padding=kernel // 2, bias=bias))
    return nn.Sequential(BatchNorm(dim), nn.ReLU(), conv)


def followed(rank: int, widths: Sequence[int], kernel: int, stride: int) -> nn.Sequential:
    """norm(conv(x)) from width to width, relu between."""
    layers: list[nn.Module] = []
    for dim, out_dim in zip(widths, widths[1:], strict=False):
        conv = kaiming(grid_conv(rank, dim, out_dim, kernel, stride=stride, padding=kernel // 2, bias=False))
        layers += [conv, BatchNorm(out_dim), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def enlarged(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, *coarse, C) -> (B, *grid, C), linearly between the middles of tokens."""
    image = F.interpolate(x.movedim(-1, 1), size=grid, mode=LINEAR[len(grid)], align_corners=False)
    return image.movedim(1, -1).contiguous()


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling: (B, *grid, C) -> (B, *grid, C'), `hidden` channels a scale. (Section 3.3.)"""

    def __init__(self, rank: int, dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.pools = nn.ModuleList(AveragePool(kernel, stride, kernel // 2) for kernel, stride in WINDOWS)
        count = len(WINDOWS) + 2
        self.scales = nn.ModuleList(preceded(rank, dim, hidden) for _ in range(count))
        self.process = nn.ModuleList(preceded(rank, hidden, hidden, 3) for _ in range(count - 1))
        self.compress = preceded(rank, count * hidden, out_dim)
        self.shortcut = preceded(rank, dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        pooled = [*(pool(x) for pool in self.pools), x.flatten(1, -2).mean(1).view(-1, *[1] * len(grid), x.shape[-1])]
        first, *others = self.scales
        found = [first(x)]
        for scale, process, part in zip(others, self.process, pooled, strict=True):
            found.append(process(enlarged(scale(part), grid) + found[-1]))
        return self.compress(torch.cat(found, -1)) + self.shortcut(x)


class SegmentationHead(nn.Module):
    """fc(relu(norm(conv3x3(relu(norm(x)))))): (B, *grid, C) -> (B, *grid, classes)."""

    def __init__(self, rank: int, dim: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.conv = preceded(rank, dim, hidden, 3)
        self.out = preceded(rank, hidden, classes, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x))


class DDRNet(nn.Module):
    """Images (B, C, *size) -> logits (B, classes, *size / 8).

    With `auxiliary` training gives {"out", "auxiliary"}, the second of the detail after its fusions at stride 16; its
    loss counts 0.4. `depths` are those of the context's stages at strides 4, 8, 16 (in as many parts as `fusions`
    there) and 32. Enlarge logits linearly (align_corners=False), as the authors do before the loss and the answer.
    `replace` is the caller's mixer for blocks that keep the grid (see `create_model`).
    """

    def __init__(
        self, dim: int, depths: Sequence[int], *, pool: int = 128, hidden: int = 64, fusions: int = 1,
        detail_depths: Sequence[int] = (2, 2), auxiliary: bool = False, num_classes: int = 19, in_chans: int = 3,
        img_size: int | Sequence[int] = 1024, replace: Any = None,
    ) -> None:
        super().__init__()
        size = check_sizes(num_classes, in_chans, img_size)
        rank, self.in_chans, self.hidden = len(size), in_chans, hidden
        self.rank, self.num_features, self.asked = rank, 4 * dim, auxiliary
        build_mixer, names = choose_mixer(replace, Convolution), list[str]()

        def stage(branch: str, number: int, widths: Sequence[int], depth: int, step: int, stride: int = 1,
                  bottleneck: bool = False) -> nn.Sequential:
            """`depth` blocks from the first width to the second; strides of pixels: `step` where they end."""
            blocks: list[Any] = []
            for index in range(depth):
                grid = tuple(-(-side // step) for side in size)
                site = Site(widths[1], max(widths[1] // 32, 1), number, index, step, grid)
                name, strided = f"{branch}.{number}.{index}", stride if index == 0 else 1
                if bottleneck and strided > 1:
                    layer: nn.Module = STRIDED(site)
                else:
                    names.append(name)
                    layer = build_mixer(site, name)
                kind, wider = (Bottleneck, 2) if bottleneck else (BasicBlock, 1)
                blocks.append(kind(site, layer, in_dim=widths[1] if index else widths[0], out_dim=wider * widths[1],
                                   stride=strided))
            if bottleneck or depth > 1:
                blocks[-1].activation = nn.Identity()
            return nn.Sequential(*blocks)

        stem = [kaiming(grid_conv(rank, into, dim, 3, stride=2, padding=1)) for into in (in_chans, dim)]
        self.stem = ConvStem(stem[0], BatchNorm(dim), nn.ReLU(), stem[1], BatchNorm(dim), nn.ReLU())
        # width, depth, stride of pixels of the stages that are fused: some at 16, one at 32
        plan = [(4 * dim, depths[2] // fusions, 16)] * fusions + [(8 * dim, depths[3], 32)]
        context = [stage("context", 0, (dim, dim), depths[0], 4), stage("context", 1, (dim, 2 * dim), depths[1], 8, 2)]
        detail, down, compress, before = [], [], [], 2 * dim
        for number, (width, depth, step) in enumerate(plan):
            context.append(stage("context", number + 2, (before, width), depth, step, 1 if before == width else 2))
            own = detail_depths[0 if step == 16 else 1]
            detail.append(stage("detail", number, (2 * dim, 2 * dim), own, 8))
            down.append(followed(rank, (2 * dim, *[4 * dim, 8 * dim][: step // 16]), 3, 2))
            compress.append(followed(rank, (width, 2 * dim), 1, 1))
            before = width
        context.append(stage("context", len(context), (before, before), 1, 64, 2, bottleneck=True))
        detail.append(stage("detail", len(detail), (2 * dim, 2 * dim), 1, 8, bottleneck=True))
        self.context, self.detail = nn.ModuleList(context), nn.ModuleList(detail)
        self.down, self.compress = nn.ModuleList(down), nn.ModuleList(compress)
        self.pool = DAPPM(rank, 16 * dim, pool, 4 * dim)
        check_patterns(replace, names)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put new heads of `num_classes` (0: none) in place."""
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        self.auxiliary: nn.Module | None = None
        if num_classes:
            self.head = SegmentationHead(self.rank, self.num_features, self.hidden, num_classes)
        if num_classes and self.asked:
            self.auxiliary = SegmentationHead(self.rank, self.num_features // 2, self.hidden, num_classes)
        self.removed = (*(() if num_classes else ("head",)), *(() if self.auxiliary else ("auxiliary",)))

    def run(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What the auxiliary head and the head are given, (B, *size / 8, C)."""
        first, second, *stages, last = self.context
        d = c = second(first(self.stem(image)).relu())
        for number, stage in enumerate(stages):
            c, d = stage(c.relu()), self.detail[number](d.relu())
            sent = self.compress[number](c.relu())
            c = c + self.down[number](d.relu())
            d = d + enlarged(sent, tuple(d.shape[1:-1]))
            if number == len(stages) - 2:
                middle = d
        d = self.detail[-1](d.relu())
        return middle, d + enlarged(self.pool(last(c.relu())), tuple(d.shape[1:-1]))

    def forward_features(self, image: Tensor) -> Tensor:
        """Detail and pooled context together, (B, C, *size / 8)."""
        return self.run(image)[1].movedim(-1, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits from what `forward_features` gives."""
        return self.head(features.movedim(1, -1)).movedim(-1, 1)

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        middle, x = self.run(image)
        out = self.head(x).movedim(-1, 1)
        if not self.training or self.auxiliary is None:
            return out
        return {"out": out, "auxiliary": self.auxiliary(middle).movedim(-1, 1)}


SIZES: dict[str, dict[str, Any]] = {
    "ddrnet_23_slim": dict(dim=32, depths=(2, 2, 2, 2)),
    "ddrnet_23": dict(dim=64, depths=(2, 2, 2, 2), hidden=128),
    "ddrnet_39": dict(dim=64, depths=(3, 4, 6, 3), hidden=256, fusions=2, detail_depths=(3, 3)),
    "ddrnet_narrow": dict(dim=8, depths=(1, 1, 2, 1), pool=8, hidden=8, img_size=64),
}


def ddrnet(
    dim: int, depths: Sequence[int], pool: int = 128, hidden: int = 64, fusions: int = 1,
    detail_depths: Sequence[int] = (2, 2), auxiliary: bool = False, mixer: Any = None, num_classes: int = 19,
    **common: Any,
) -> DDRNet:
    """A DDRNet of a size; 19 classes are those of Cityscapes."""
    return DDRNet(dim, depths, pool=pool, hidden=hidden, fusions=fusions, detail_depths=detail_depths,
                  auxiliary=auxiliary, num_classes=num_classes, replace=mixer, **common)


def _preceded(theirs: Sequence[str], ours: str) -> list[Rule]:
    """Norm and convolution, by their names."""
    norm, conv = theirs
    return [(rf"{norm}\.(.*)", rf"{ours}.0.\1"), (rf"{conv}\.(.*)", rf"{ours}.2.\1")]


DAPPM_NAMES: KeyMap = (
    *_preceded((r"scale0\.0", r"scale0\.2"), "scales.0"),
    *(rule for scale in range(1, 5)
      for rule in _preceded((rf"scale{scale}\.1", rf"scale{scale}\.3"), f"scales.{scale}")),
    *((rf"process{scale}\.(.*)", rf"process.{scale - 1}.\1") for scale in range(1, 5)),
    (r"compression\.(.*)", r"compress.\1"),
    (r"shortcut\.(.*)", r"shortcut.\1"),
)
HEAD_NAMES: KeyMap = (*_preceded(("bn1", "conv1"), "conv"), *_preceded(("bn2", "conv2"), "out"))


def layers(fusions: int) -> list[str]:
    """What the authors call the stages of the context, with so many fusions at stride 16."""
    return ["1", "2", *(["3"] if fusions == 1 else [f"3_{part + 1}" for part in range(fusions)]), "4", "5"]


def names(fusions: int) -> KeyMap:
    """The authors' names of a network with so many fusions at stride 16."""
    stages = layers(fusions)
    return (
        (r"conv1\.(.*)", r"stem.\1"),
        *(rule for number, layer in enumerate(stages)
          for rule in within(BLOCK_NAMES, rf"layer{layer}\.(\d+)\.", rf"context.{number}.\1.")),
        *(rule for number, layer in enumerate(stages[2:])
          for rule in within(BLOCK_NAMES, rf"layer{layer}_\.(\d+)\.", rf"detail.{number}.\1.")),
        *(rule for number, layer in enumerate(stages[2:-1])
          for rule in ((rf"down{layer}\.(.*)", rf"down.{number}.\1"),
                       (rf"compression{layer}\.(.*)", rf"compress.{number}.\1"))),
        *within(DAPPM_NAMES, r"spp\.", "pool."),
        *within(HEAD_NAMES, r"final_layer\.", "head."),
        *within(HEAD_NAMES, r"seghead_extra\.", "auxiliary."),
    )


def AUTHORS(name: str) -> KeyMap:
    """The authors' names of a size; what they trained is the `model` beside its loss."""
    loss = Dropped(r"loss\..*", "weights of classes in the loss that trained it")
    return (*within(names(SIZES[name].get("fusions", 1)), r"(?:model\.)?", ""), loss)


def taps(fusions: int) -> dict[str, str]:
    """Where what the authors' layers give is here, before it is fused."""
    stages = layers(fusions)
    return {"spp": "pool", "final_layer": "head", **{f"layer{name}": f"context.{at}" for at, name in enumerate(stages)},
            **{f"layer{name}_": f"detail.{at}" for at, name in enumerate(stages[2:])}}


def TAPS(name: str) -> dict[str, str]:
    """Where the authors' layers are in a size."""
    return taps(SIZES[name].get("fusions", 1))
