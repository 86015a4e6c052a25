"""CrossFormer: tokens of several scales, attention near and far by turns.

Every token is embedded from patches of several sizes around one place, most channels from the smallest,
    x = [conv_4(image), conv_8(image), conv_16(image), conv_32(image)],   all with stride 4,
and again between stages. Attention in groups of G x G tokens takes neighbours in even blocks (short distance) and
every I-th token in odd ones (long distance): the token at (i, j) then meets those at (i + a I, j + b I). The bias of an
offset comes from a small MLP instead of a table, so that a group may have any size,
    out = softmax(q k^T / sqrt(d) + mlp(offset)) v.
CrossFormer++ takes groups that grow from stage to stage and cools activations: a depthwise convolution and a norm,
without a shortcut, after every third block.

Wang, Yao, Chen, Lin, Cai, He, Liu, "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
2022, section 3.
Wang, Chen, Qiu, Chen, Wu, Lin, He, Liu, "CrossFormer++: A Versatile Vision Transformer Hinging on
Cross-scale Attention", 2023, section 4.

Any grid: zero-padded at its end, after the norm and before qkv; padded keys are masked, as in the authors' code. Where
a side of the native grid is no longer than the group, the group takes that side and attention is short (their
classification code). Quirks kept: the bias MLP is dim/16 wide (a quarter of a quarter) and reads offsets as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.ops.window import crop, pad_end, pad_to_multiple
from saccade.parts.attention import check_heads
from saccade.parts.block import Block
from saccade.parts.convolution import CONVOLUTIONS, GRID_CONVOLUTIONS, depthwise
from saccade.parts.dynamic_bias import DYNAMIC_BIAS, DynamicBias
from saccade.parts.mlp import Mlp
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import pad_image

CARD = Card(
    "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (and CrossFormer++)",
    authors="Wang, Yao, Chen, Lin, Cai, He, Liu",
    year=2022,
    systems=("crossformer",),
    arxiv="2108.00154, 2303.06908",
    code="cheerss/CrossFormer@7952010",
    licence="MIT",
    read="paper, code",
    keywords="cross-scale embedding, long short distance attention, dynamic position bias, progressive group size, "
             "activation cooling layer, dilated groups",
    kinds=("backbone", "mixer"),
    mixers={"long_short_distance": "LongShortDistance"},
    params={"crossformer_tiny": 27.8e6, "crossformer_small": 30.7e6, "crossformer_base": 52.0e6,
            "crossformer_large": 92.0e6, "crossformer_pp_small": 23.3e6, "crossformer_pp_base": 52.0e6,
            "crossformer_pp_large": 92.0e6, "crossformer_pp_huge": 96.0e6},
    macs={"crossformer_tiny": 2.9e9, "crossformer_small": 4.9e9, "crossformer_base": 9.2e9, "crossformer_large": 16.1e9,
          "crossformer_pp_small": 4.9e9, "crossformer_pp_base": 9.5e9, "crossformer_pp_large": 16.6e9,
          "crossformer_pp_huge": 21.8e9},
    top1={"crossformer_tiny": 81.5, "crossformer_small": 82.5, "crossformer_base": 83.4, "crossformer_large": 84.0,
          "crossformer_pp_small": 83.2, "crossformer_pp_base": 84.2, "crossformer_pp_large": 84.7,
          "crossformer_pp_huge": 84.9},
    aliases={
        **{f"cros_{size}_patch4_group7_224": f"crossformer_{size}" for size in ("tiny", "small", "base", "large")},
        **{f"cros_pp_{size}_patch4_group_const_224": f"crossformer_pp_{size}" for size in ("small", "base", "large")},
    },
    weights={
        f"crossformer_{size}": Weights(f"https://drive.google.com/file/d/{file}/view?usp=sharing",
                                       mirrors=(f"https://pan.baidu.com/s/{mirror}",))
        for size, file, mirror in (
            ("tiny", "1YSkU9enn-ITyrbxLH13zNcBYvWSEidfq", "1M45YXZgVvp6Ew9DO8UhdlA"),
            ("small", "1RAkigsgr33va0RZ85S2Shs2BhXYcS6U8", "1Xf4MXfb_soCnJFBeNDmoQQ"),
            ("base", "1bK8biVCi17nz_nkt7rBfio_kywUpllSU", "1f5dH__UGDXb-HoOPHT5p0A"),
            ("large", "1zRWByVW_KIZ87NgaBkDIm60DAsGJErdG", "1YJLeHy_cxLBrZLklQBCA_A"),
        )
    } | {  # two of them are in one folder
        f"crossformer_pp_{size}": Weights(f"https://pan.baidu.com/s/{folder}?pwd=crsf#{size}")
        for size, folder in (("small", "1smc_kRoogd0Ig5vfqwuGTA"), ("base", "13XVP0ebtNcyRMmkl11ALYg"),
                             ("large", "1xtPh-ndcOxRM7fPYYxIIRg"), ("huge", "1xtPh-ndcOxRM7fPYYxIIRg"))
    },
    goldens=("crossformer_tiny", "op_crossformer_attention", "op_crossformer_lda_block", "op_crossformer_patch_embed",
             "op_crossformer_sda_block"),
    tests=("tests/papers/test_crossformer.py",),
)

_MASKED = -1e4  # as good as the authors' -1e6, and finite in half precision
Sides = tuple[int, ...]


class LongShortDistance(nn.Module):
    """Attention in groups of `group` neighbours or, where it is `long`, of tokens `interval` steps apart.

    (B, *grid, C) -> (B, *grid, C). By default blocks of odd index are long.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d) + offset of a network, in near or spread groups", "softmax", "sum of v")

    def __init__(
        self,
        site: Site,
        group: int | Sides = 7,
        interval: int = 4,
        long: bool | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        check_heads(site)
        long = site.index % 2 == 1 if long is None else long
        self.group = (group,) * site.rank if isinstance(group, int) else tuple(group)
        if min(site.grid) <= min(self.group):
            self.group, long = (min(site.grid),) * site.rank, False
        self.heads, self.interval = site.heads, interval if long else 1
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.bias = DynamicBias(self.group, site.heads, max(site.dim // 16, 1))
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        x = pad_to_multiple(x, self.spans)
        padded = tuple(x.shape[1:-1])
        groups = split_groups(x, self.group, self.interval)
        q, k, v = self.qkv(groups).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        tokens = partial(group_tokens, grid, padded, self.group, self.interval, x.device)
        bias = self.bias()
        if not all(isinstance(full, int) and full == side for full, side in zip(padded, grid, strict=True)):
            masked = bias + ((tokens() < 0) * _MASKED)[:, None, None].to(bias.dtype)  # (G, heads, N, N)
            bias = masked.expand(x.shape[0], *masked.shape).flatten(0, 1)
        out = attend(q, k, v, bias, where=lambda: (tokens(), tokens()))
        out = self.proj(out.transpose(1, 2).flatten(2))
        return crop(join_groups(out, self.group, self.interval, padded), grid)

    @property
    def spans(self) -> Sides:
        """What the sides of the padded grid are multiples of."""
        return tuple(side * self.interval for side in self.group)

    def reach(self, site: Site) -> Sides:
        """From one end of a group to the other."""
        return tuple((side - 1) * self.interval for side in self.group)

    def cost(self, site: Site, grid: Sides) -> int:
        """Multiply-adds: 4 N C^2 + 2 N |group| C over the N tokens of the padded grid, and the bias."""
        tokens = prod(side + (-side) % span for side, span in zip(grid, self.spans, strict=True))
        return 4 * tokens * site.dim**2 + 2 * tokens * prod(self.group) * site.dim + self.bias.cost()


def split_groups(x: Tensor, group: Sides, interval: int) -> Tensor:
    """(B, *grid, C) -> (B x groups, N, C): tokens `interval` apart; the grid is a multiple of group x interval."""
    rank = len(group)
    spans = zip(x.shape[1:-1], group, strict=True)
    parts = [part for size, side in spans for part in (size // (side * interval), side, interval)]
    order = [0, *range(1, 3 * rank, 3), *range(3, 3 * rank + 1, 3), *range(2, 3 * rank, 3), 3 * rank + 1]
    x = x.view(x.shape[0], *parts, x.shape[-1]).permute(order).clone(memory_format=torch.contiguous_format)
    return x.flatten(2 * rank + 1, 3 * rank).flatten(0, 2 * rank)


def join_groups(groups: Tensor, group: Sides, interval: int, padded: Sides) -> Tensor:
    """Undo `split_groups`."""
    rank = len(group)
    counts = [size // (side * interval) for size, side in zip(padded, group, strict=True)]
    x = groups.view(-1, *counts, *[interval] * rank, *group, groups.shape[-1])
    order = [axis for number in range(1, rank + 1) for axis in (number, number + 2 * rank, number + rank)]
    x = x.permute(0, *order, 3 * rank + 1).clone(memory_format=torch.contiguous_format)
    return x.view(-1, *padded, groups.shape[-1])


@table
def group_tokens(grid: Sides, padded: Sides, group: Sides, interval: int, device: torch.device) -> Tensor:
    """(groups, N) number of the token at each place of each group; -1 for padding."""
    numbers = torch.arange(prod(grid), device=device).view(1, *grid, 1) + 1
    numbers = pad_end(numbers, [full - side for full, side in zip(padded, grid, strict=True)]) - 1
    return split_groups(numbers, group, interval).squeeze(-1)


def cross_scale(layers: dict[int, Any], rank: int, dim: int, out_dim: int, kernels: Sequence[int]) -> nn.ModuleList:
    """Convolutions of one stride, the smallest kernel: half of the channels from it, a quarter from the next, ...

    The last two have the same number of channels.
    """
    stride, last = kernels[0], len(kernels) - 1
    return nn.ModuleList(
        layers[rank](dim, out_dim // 2 ** min(place + 1, last), kernel, stride=stride, padding=(kernel - stride) // 2)
        for place, kernel in enumerate(kernels)
    )


class CrossScaleEmbedding(nn.Module):
    """norm([convolutions of several scales]): (B, C, *size) -> (B, *grid, dim); zero-padded to whole strides."""

    def __init__(self, rank: int, in_chans: int, dim: int, kernels: Sequence[int] = (4, 8, 16, 32)) -> None:
        super().__init__()
        self.stride = kernels[0]
        self.scales = cross_scale(CONVOLUTIONS, rank, in_chans, dim, kernels)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        image = pad_image(image, self.stride)
        return self.norm(torch.cat([scale(image) for scale in self.scales], 1).movedim(1, -1).contiguous())


class CrossScaleMerging(nn.Module):
    """[convolutions of several scales](norm(x)): (B, *grid, C) -> (B, *ceil(grid / 2), out); odd sides zero-padded."""

    def __init__(self, rank: int, dim: int, out_dim: int, kernels: Sequence[int] = (2, 4)) -> None:
        super().__init__()
        self.strides = (kernels[0],) * rank
        self.norm = nn.LayerNorm(dim)
        self.scales = cross_scale(GRID_CONVOLUTIONS, rank, dim, out_dim, kernels)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(self.norm(x), self.strides)
        return torch.cat([scale(x) for scale in self.scales], -1)


class CooledBlock(Block):
    """A block, then a depthwise convolution and a norm without a shortcut: the activation cooling layer."""

    def __init__(self, site: Site, mixer: nn.Module, **options: Any) -> None:
        super().__init__(site, mixer, **options)
        self.cooling = nn.Sequential(depthwise(site.rank, site.dim, 3), nn.LayerNorm(site.dim))

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        return self.cooling(super().forward(x, **optional))


_PP: dict[str, Any] = dict(groups=(4, 4, 14, 7), intervals=(4, 2, 1, 1), cooled=True)
SIZES: dict[str, dict[str, Any]] = {
    "crossformer_tiny": dict(dim=64, depths=(1, 1, 8, 6), heads=2),
    "crossformer_small": dict(dim=96, depths=(2, 2, 6, 2), heads=3),
    "crossformer_base": dict(dim=96, depths=(2, 2, 18, 2), heads=3),
    "crossformer_large": dict(dim=128, depths=(2, 2, 18, 2), heads=4),
    "crossformer_pp_small": _PP | dict(dim=64, depths=(2, 2, 18, 2), heads=2),
    "crossformer_pp_base": _PP | dict(dim=96, depths=(2, 2, 18, 2), heads=3),
    "crossformer_pp_large": _PP | dict(dim=128, depths=(2, 2, 18, 2), heads=4),
    "crossformer_pp_huge": _PP | dict(dim=128, depths=(6, 6, 18, 2), heads=4),
    "crossformer_nano": dict(dim=32, depths=(1, 2, 2), heads=1, groups=(4, 4, 4), intervals=(4, 2, 1),
                             patches=(2, 4, 8), img_size=32),
}


def crossformer(
    dim: int,
    depths: Sequence[int],
    heads: int,
    groups: Sequence[int] = (7, 7, 7, 7),
    intervals: Sequence[int] = (8, 4, 2, 1),
    patches: Sequence[int] = (4, 8, 16, 32),
    merges: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
    ratios: Sequence[float] = (4, 4, 4, 4),
    qkv_bias: bool = True,
    cooled: bool = False,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A CrossFormer, or with `cooled` a CrossFormer++; width and heads double from stage to stage."""

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        third = site.index % 3 == 2 and site.index < depths[site.stage] - 1
        kind: Callable[..., Block] = CooledBlock if cooled and third else Block
        mlp = partial(Mlp, ratio=ratios[site.stage])
        return kind(site, mixer, drop_path=drop_path, norm=nn.LayerNorm, mlp=mlp)

    doubling = [2**stage for stage in range(len(depths))]
    return Pyramid(
        [dim * times for times in doubling], depths, [heads * times for times in doubling],
        stem=partial(CrossScaleEmbedding, kernels=patches), stride=patches[0],
        downsample=[partial(CrossScaleMerging, kernels=merges[stage]) for stage in range(len(depths) - 1)],
        block=block,
        mixer=[partial(LongShortDistance, group=group, interval=interval, qkv_bias=qkv_bias)
               for group, interval in zip(groups, intervals, strict=True)],
        norm=nn.LayerNorm, replace=mixer, **common,
    )


MIXER: KeyMap = (*within(DYNAMIC_BIAS, r"pos\.", "bias."), (r"(.*)", r"\1"))
BLOCK: KeyMap = (
    *within(MIXER, r"attn\.", "mixer."),
    (r"ex_conv\.(.*)", r"cooling.0.\1"),
    (r"ex_ln\.(.*)", r"cooling.1.\1"),
    (r"(.*)", r"\1"),
)
AUTHORS: KeyMap = (
    (r"patch_embed\.projs\.(.*)", r"stem.scales.\1"),
    (r"patch_embed\.(.*)", r"stem.\1"),
    *within(BLOCK, r"layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."),
    *((rf"layers\.{stage}\.downsample\.{theirs}(.*)", rf"stages.{stage + 1}.downsample.{ours}\1")
      for stage in range(3) for theirs, ours in ((r"reductions\.", "scales."), ("", ""))),
    (r"head\.(.*)", r"head.fc.\1"),
)
# The authors' stage outputs are taken after the merging that follows.
TAPS = {r"stage([123])": r"stages.\1.downsample", "stage4": "stages.3"}
