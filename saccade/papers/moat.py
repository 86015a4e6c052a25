"""MOAT: a Transformer block whose MLP became an inverted residual, standing before attention.

    x = shortcut(x) + mbconv(x);   x = x + attend(norm(x)),
where MBConv (expand to 4C, depthwise 3x3, shrink) replaces the MLP, downsamples at the head of a stage, and lets
neighbouring windows talk, so that windows need no shift. The first two stages are MBConv with squeeze and excitation
and have no attention. The bias a relative offset is a table of 27 x 27 (stage 3) or 13 x 13 (stage 4) offsets,
interpolated to the grid that comes.

Yang et al., "MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision Models", 2023, sections 2-3.

Any grid: attention is global, unless `window` is given; a grid that is no multiple of the window is zero-padded at its
end, before qkv, and padded keys are masked.
Quirks kept: TensorFlow's asymmetric padding, batch norms of eps 1e-3, layer norms of eps 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import HALF, IMAGENET_MEAN, IMAGENET_STD, Card, Weights
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.ops.toeplitz import attend_at_offsets, toeplitz
from saccade.ops.window import crop, merge, pad_to_multiple, partition, window_tokens
from saccade.parts.attention import check_heads
from saccade.parts.block import residual_tail
from saccade.parts.head import Head
from saccade.parts.mbconv import MBConv, SameConv
from saccade.parts.mlp import Gelu
from saccade.parts.norm import BatchNorm
from saccade.parts.position import resample
from saccade.parts.pyramid import Pyramid, no_mixer
from saccade.parts.stem import ConvStem
from saccade.parts.tokens import global_tokens

_ADDRESS = "https://storage.googleapis.com/gresearch/tf-deeplab/checkpoint/"

CARD = Card(
    "MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision Models",
    authors="Yang, Qiao, Yu, Yuan, Zhu, Yuille, Adam, Chen",
    year=2023,
    systems=("moat",),
    arxiv="2210.01820",
    code="google-research/deeplab2@64bc1c1",
    licence="Apache-2.0",
    read="paper, code",
    keywords="mobile convolution, inverted residual, attention, interpolated relative position bias, tiny-MOAT",
    kinds=("backbone", "mixer"),
    mixers={"moat_attention": "MoatAttention"},
    params={"moat_0": 27.8e6, "moat_1": 41.6e6, "moat_2": 73.4e6, "moat_3": 190.0e6, "moat_4": 483.2e6,
            "tiny_moat_0": 3.4e6, "tiny_moat_1": 5.1e6, "tiny_moat_2": 9.8e6, "tiny_moat_3": 19.5e6,
            "moat_0_no_pe": 27.8e6, "moat_1_no_pe": 41.5e6, "moat_2_no_pe": 73.2e6, "moat_3_no_pe": 189.5e6,
            "moat_4_no_pe": 482.5e6, "tiny_moat_0_no_pe": 3.3e6, "tiny_moat_1_no_pe": 5.1e6, "tiny_moat_2_no_pe": 9.7e6,
            "tiny_moat_3_no_pe": 19.5e6},
    macs={"moat_0": 5.7e9, "moat_1": 9.1e9, "moat_2": 54.3e9, "moat_3": 271.0e9, "moat_4": 648.5e9,
          "tiny_moat_0": 1.1e9, "tiny_moat_1": 1.6e9, "tiny_moat_2": 3.0e9, "tiny_moat_3": 6.0e9},
    top1={"moat_0": 83.3, "moat_1": 84.2, "tiny_moat_0": 76.6, "tiny_moat_1": 79.2, "tiny_moat_2": 81.7,
          "tiny_moat_3": 83.3, "moat_2": 87.5, "moat_3": 88.4, "moat_4": 89.1, "moat_2_no_pe": 87.2,
          "moat_3_no_pe": 88.2, "moat_4_no_pe": 88.9,
          "moat_0_no_pe": 83.0, "moat_1_no_pe": 84.1, "tiny_moat_0_no_pe": 76.0,
          "tiny_moat_1_no_pe": 78.9, "tiny_moat_2_no_pe": 81.3, "tiny_moat_3_no_pe": 83.0},
    weights={
        f"{name}{'' if table == 'w' else '_no_pe'}": Weights(
            f"{_ADDRESS}{name.replace('moat_', 'moat')}_imagenet_{run}_{table}_position_embedding.tar.gz",
            layout="tensorflow", data=data, mean=mean, std=std)
        for names, run, data, mean, std in (
            (("moat_0", "moat_1"), "1k_224", "ImageNet-1K", IMAGENET_MEAN, IMAGENET_STD),
            (("moat_2",), "22k_and_1k_384", "ImageNet-22K, ImageNet-1K", HALF, HALF),
            (("moat_3", "moat_4"), "22k_and_1k_512", "ImageNet-22K, ImageNet-1K", HALF, HALF),
            (tuple(f"tiny_moat_{size}" for size in range(4)), "1k_256", "ImageNet-1K", IMAGENET_MEAN, IMAGENET_STD),
        )
        for name in names for table in ("w", "wo")
    },
    goldens=("tiny_moat_0", "op_moat_attention", "op_moat_block"),
)


@table
def padded_keys(grid: tuple[int, ...], window: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(windows, 1, 1, tokens): -inf for padded keys, else 0."""
    padded = window_tokens(grid, window, (0,) * len(grid), device) < 0
    return torch.zeros(padded.shape, dtype=dtype, device=device).masked_fill(padded, -torch.inf)[:, None, None]


class MoatAttention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d) + bias) v) over the grid, or in windows: (B, *grid, C) -> (B, *grid, C).

    The bias is read from a table of the offsets of `size` tokens an axis (the native grid's), resampled (linearly) to
    the offsets of the grid or window that comes; `position=False` leaves it out.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d) + offset", "softmax", "sum of v")
    undecayed = ("table",)

    def __init__(
        self,
        site: Site,
        window: int | Sequence[int] | None = None,
        size: int | Sequence[int] | None = None,
        position: bool = True,
    ) -> None:
        super().__init__()
        check_heads(site)
        self.heads = site.heads
        self.window = None if window is None else _sides(window, site.rank)
        offsets = [2 * side - 1 for side in _sides(size or self.window or site.grid, site.rank)]
        self.qkv = nn.Linear(site.dim, 3 * site.dim)
        self.table = nn.Parameter(torch.zeros(*offsets, site.heads)) if position else None
        self.proj = nn.Linear(site.dim, site.dim)
        if self.table is not None:
            nn.init.normal_(self.table, std=0.02)

    def offsets(self, window: tuple[int, ...]) -> Tensor | None:
        """(heads, *(2 side - 1)) by key - query, for the tokens of a window."""
        if self.table is None:
            return None
        offsets = resample(self.table[None], tuple(2 * side - 1 for side in window), linear=True)[0]
        return offsets.movedim(-1, 0).flip(tuple(range(1, offsets.ndim)))

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        if self.window is None:
            return self.among_all(x)
        window, padded = self.window, pad_to_multiple(x, self.window)
        offsets = self.offsets(window)
        bias = None if offsets is None else toeplitz(offsets, window)
        if not (all(isinstance(side, int) for side in grid) and padded.shape == x.shape):
            mask = padded_keys(grid, window, x.dtype, x.device)
            bias = mask if bias is None else bias + mask
            bias = bias.expand(x.shape[0], -1, -1, -1, -1).flatten(0, 1)

        def where() -> tuple[Tensor, Tensor]:
            tokens = window_tokens(grid, window, (0,) * len(grid), x.device)
            return tokens, tokens

        q, k, v = self.by_heads(partition(padded, window))
        out = self.proj(attend(q, k, v, bias, where=where).transpose(1, 2).flatten(2))
        return crop(merge(out, window, tuple(padded.shape[1:-1])), grid)

    def among_all(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        q, k, v = self.by_heads(x.flatten(1, -2))
        offsets = self.offsets(grid)

        def where() -> tuple[Tensor, Tensor]:
            return global_tokens(prod(grid), x.device)

        out = (attend(q, k, v, where=where) if offsets is None
               else attend_at_offsets(q, k, v, offsets, grid, where=where))
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, grid)

    def by_heads(self, groups: Tensor) -> Tensor:
        """q, k, v (3, B x G, heads, N, d) of the tokens of each group (B x G, N, C)."""
        return self.qkv(groups).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The table of another size, resampled to this one's."""
        if parameter != "table" or self.table is None or value.ndim != self.table.ndim:
            return value
        return resample(value[None], tuple(self.table.shape[:-1]), linear=True)[0]

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 + 2 N |window| C, the window being the grid for global attention."""
        window = self.window or grid
        tokens = prod(side + (-side) % part for side, part in zip(grid, window, strict=True))
        return 4 * tokens * site.dim**2 + 2 * tokens * prod(window) * site.dim

    def reach(self, site: Site) -> tuple[int, ...] | None:
        """Every token, or from one end of a window to the other."""
        return None if self.window is None else tuple(side - 1 for side in self.window)


def _sides(size: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (size,) * rank if isinstance(size, int) else tuple(size)


class MoatBlock(nn.Module):
    """MBConv, which downsamples where the stage begins, then a mixer (in stages that have one) beside a shortcut."""

    def __init__(
        self, site: Site, mixer: nn.Module | None, drop_path: float, before: int, squeeze: float, pool: int = 2
    ) -> None:
        super().__init__()
        self.site = site
        dim, stride = (site.dim, 1) if site.index else (before, 2)
        self.conv = MBConv(site.rank, dim, site.dim, stride=stride, squeeze=squeeze, pool=pool, drop_path=drop_path)
        self.mixer = mixer
        self.norm = nn.LayerNorm(site.dim) if mixer is not None else nn.Identity()
        self.tail = residual_tail(site.dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.mixer is None else x + self.tail(self.mixer(self.norm(x)))


_DEPTHS = ((2, 3, 7, 2), (2, 6, 14, 2), (2, 6, 14, 2), (2, 12, 28, 2), (2, 12, 28, 2))
SIZES: dict[str, dict[str, Any]] = {
    f"moat_{number}": dict(stem=stem, dim=dim, depths=depths, img_size=side)
    for number, (stem, dim, depths, side) in enumerate(
        zip((64, 64, 128, 160, 256), (96, 96, 128, 160, 256), _DEPTHS, (224, 224, 384, 512, 512), strict=True))
}
SIZES |= {f"tiny_moat_{number}": dict(stem=dim, dim=dim, depths=_DEPTHS[0], img_size=256)
          for number, dim in enumerate((32, 40, 56, 80))}
SIZES |= {f"{name}_no_pe": size | dict(position=False) for name, size in SIZES.items()}
SIZES["moat_nano"] = dict(stem=16, dim=32, depths=(1, 2, 2), sizes=(None, 8, 4), patch=2, img_size=32)


def moat(
    stem: int,
    dim: int,
    depths: Sequence[int],
    sizes: Sequence[int | None] = (None, None, 14, 7),
    windows: Sequence[int | Sequence[int] | None] | None = None,
    position: bool = True,
    pool: int = 2,
    patch: int = 4,
    head_dim: int = 32,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A MOAT of a size; width doubles from stage to stage.

    `patch` is the stride of the first stage. `sizes` are the sides of the bias tables a stage, None where it has no
    attention; `windows` the windows, else attention is global; `pool` is the side of the windows that shortcuts are
    pooled over (3 in dense prediction).
    """
    dims = [dim * 2**stage for stage in range(len(depths))]

    def image(rank: int, in_chans: int, _: int) -> ConvStem:
        return ConvStem(SameConv(rank, in_chans, stem, stride=patch // 2), BatchNorm(stem, eps=1e-3), Gelu(),
                        SameConv(rank, stem, stem))

    def block(site: Site, mixer: nn.Module | None, drop_path: float) -> MoatBlock:
        squeeze = 0.25 if sizes[site.stage] is None else 0.0
        return MoatBlock(site, mixer, drop_path, (stem, *dims)[site.stage], squeeze, pool)

    mixers: list[Any] = [
        no_mixer if size is None else partial(MoatAttention, window=window, size=size, position=position)
        for size, window in zip(sizes, windows or [None] * len(sizes), strict=True)
    ]
    return Pyramid(
        dims, depths, [max(width // head_dim, 1) for width in dims], stem=image, stride=patch,
        downsample=lambda rank, dim, out_dim: nn.Identity(), block=block, mixer=mixers,
        head=partial(Head, norm=nn.LayerNorm), replace=mixer, **common,
    )


def _offsets(bias: Tensor) -> Tensor:
    """(heads, *offsets) by key - query as (*offsets, heads) by query - key."""
    return bias.flip(1, 2).movedim(0, -1)


ATTENTION: KeyMap = (
    ("relative_position_embedding", "table", _offsets),
    *((rf"{letter}\.(.*)", rf"qkv.\1#{number}") for number, letter in enumerate("qkv")),
    (r"o\.(.*)", r"proj.\1"),
)
BLOCK: KeyMap = (
    *within(ATTENTION, r"attention\.", "mixer."),
    (r"attention_norm\.(.*)", r"norm.\1"),
    (r"shortcut_conv\.weight", "conv.project.weight", matrix_from_1x1),
    (r"shortcut_conv\.bias", "conv.project.bias"),
    (r"pre_norm\.(.*)", r"conv.norm.\1"),
    (r"expand_conv\.weight", "conv.expand.0.weight", matrix_from_1x1),
    (r"expand_norm\.(.*)", r"conv.expand.1.\1"),
    (r"depthwise_conv\.weight", "conv.depthwise.0.conv.weight"),
    (r"depthwise_norm\.(.*)", r"conv.depthwise.1.\1"),
    *(rule for number, name in ((1, "reduce"), (2, "expand")) for rule in (
        (rf"se\.{name}_conv2d\.weight", f"conv.squeeze.fc{number}.weight", matrix_from_1x1),
        (rf"se\.{name}_conv2d\.bias", f"conv.squeeze.fc{number}.bias"))),
    (r"shrink_conv\.weight", "conv.shrink.weight", matrix_from_1x1),
    (r"shrink_conv\.bias", "conv.shrink.bias"),
)
AUTHORS: KeyMap = (
    (r"stem\.conv_0\.(.*)", r"stem.0.conv.\1"),
    (r"stem\.norm_0\.(.*)", r"stem.1.\1"),
    (r"stem\.conv_1\.(.*)", r"stem.3.conv.\1"),
    *within(BLOCK, r"block_0(\d)_0?(\d+)\.", r"stages.\1.blocks.\2."),
    (r"final_layer_norm\.(.*)", r"head.norm.\1"),
    (r"logits_head\.weight", "head.fc.weight", matrix_from_1x1),
    (r"logits_head\.bias", "head.fc.bias"),
)
TAPS = {f"stage{stage + 1}": f"stages.{stage}" for stage in range(4)}
