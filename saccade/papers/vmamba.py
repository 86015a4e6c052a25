"""VMamba: an image scanned along four ways that cross (SS2D).

A scan orders tokens in a line and neighbours of a picture are not neighbours there. Four sequences of the same map, row
by row, column by column and both from their ends, each with steps, inputs, readouts and decays of its own, bring every
token what lies in each quadrant around it,
    out = out_proj(norm(sum over ways w of back_w(scan_w(u ordered by w))) silu(z)),
where (x, z) = in_proj(tokens) and u = silu(depthwise convolution(x)). The published networks are pyramids without the
gate, of one state a channel: x += SS2D(norm(x)), x += mlp(norm(x)). (The first release had the gate, 16 states and no
MLP.)

Liu et al., "VMamba: Visual State Space Model", 2024, sections 4.2-4.3. Names say the expansion and the third stage's
depth: s2l15 is 2 and 15.

Any grid. Sequences have two ways, volumes six: each axis in turn runs fastest. Convolutions with stride pad with zeros.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, pointwise, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.block import Block
from saccade.parts.convolution import grid_conv
from saccade.parts.merging import ConvMerging
from saccade.parts.pyramid import Pyramid
from saccade.parts.ssm import GRID_SCAN, GridScan
from saccade.parts.stem import ConvStem

_ADDRESS = "https://github.com/MzeroMiko/VMamba/releases/download/%2320240316/vssm_"
_LATER = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm"

CARD = Card(
    "VMamba: Visual State Space Model",
    authors="Liu, Tian, Zhao, Yu, Xie, Wang, Ye, Jiao, Liu",
    year=2024,
    systems=("survey_ssm_medical",),
    arxiv="2401.10166",
    code="MzeroMiko/VMamba@2ed52ea",
    licence="MIT",
    read="paper, code",
    keywords="cross-scan, SS2D, visual state space, selective scan, four directions",
    kinds=("backbone", "mixer"),
    mixers={"cross_scan": "CrossScan"},
    params={"vmamba_tiny_s1l8": 30e6, "vmamba_tiny_s2l5": 31e6, "vmamba_small_s2l15": 50e6, "vmamba_small_s1l20": 49e6,
            "vmamba_base_s2l15": 89e6, "vmamba_base_s1l20": 87e6},
    top1={"vmamba_tiny_s1l8": 82.6, "vmamba_tiny_s2l5": 82.5, "vmamba_small_s2l15": 83.6, "vmamba_small_s1l20": 83.3,
          "vmamba_base_s2l15": 83.9, "vmamba_base_s1l20": 83.8},
    aliases={"vmamba_tiny": "vmamba_tiny_s1l8", "vmamba_small": "vmamba_small_s2l15",
             "vmamba_base": "vmamba_base_s2l15"},
    weights={
        "vmamba_tiny_s1l8": Weights(f"{_LATER}1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_tiny_s2l5": Weights(f"{_ADDRESS}tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_small_s2l15": Weights(f"{_ADDRESS}small_0229_ckpt_epoch_222.pth",
                                      mirrors=(f"{_LATER}_small_0229_ckpt_epoch_222.pth",)),
        "vmamba_base_s2l15": Weights(f"{_ADDRESS}base_0229_ckpt_epoch_237.pth",
                                     mirrors=(f"{_LATER}_base_0229_ckpt_epoch_237.pth",)),
    },
    goldens=("op_ss2d", "op_vss_block"),
    tests=("tests/papers/test_vmamba.py",),
)


class CrossScan(GridScan):
    """Scans along every axis and from both ends, summed, normed and, with `gate`, gated: (B, *grid, C) -> the same.

    `rank` is the width from which the steps are projected (C / 16 unless given), `kernel` the convolution's.
    """

    template = Template(
        "selective scans C_i A_(i..j) B_j along four ways", "decays A in (0, 1)", "sum of x over the ways, normed"
    )

    def __init__(
        self, site: Site, states: int = 16, kernel: int = 3, expand: float = 2, rank: int | None = None,
        bias: bool = False, conv_bias: bool = True, gate: bool = True,
    ) -> None:
        super().__init__(site, 2 * site.rank, states, kernel, expand, rank, bias, conv_bias, gate)

    def scanned(self, u: Tensor, chosen: Tensor) -> Tensor:
        lines = self.scan(ordered(u.unsqueeze(-2), shared=True), ordered(chosen, shared=False))
        skip = self.D.unflatten(0, (self.ways, -1)).sum(0)  # D u is the same tokens whatever their order
        return torch.addcmul(put_back(lines, tuple(u.shape[1:-1])), u, skip)


def ordered(x: Tensor, shared: bool) -> Tensor:
    """(B, *grid, ways, C) -> (B, ways, N, C): way w's part (the one part, where it is `shared`) in the order of w.

    The last axis runs fastest in the first way, the first axis in the last of the first half; the second half has the
    same orders from their ends.
    """
    rank = x.ndim - 3
    parts = x.unbind(-2) * (2 * rank) if shared else x.unbind(-2)
    lines = [parts[way].movedim(rank - way % rank, -2).flatten(1, -2) for way in range(2 * rank)]
    return torch.stack([*lines[:rank], *(line.flip(1) for line in lines[rank:])], 1)


def put_back(y: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Undo `ordered` and sum over the ways: (B, ways, N, C) -> (B, *grid, C)."""
    rank = len(grid)
    there, back = y.chunk(2, 1)
    both = there + back.flip(2)
    total = both[:, 0].unflatten(1, grid)
    for way in range(1, rank):
        axis = rank - 1 - way
        order = (*grid[:axis], *grid[axis + 1:], grid[axis])
        total = total + both[:, way].unflatten(1, order).movedim(-2, axis + 1)
    return total.contiguous()


def conv_stem(rank: int, in_chans: int, dim: int) -> ConvStem:
    """Two 3x3 convolutions of stride 2, each with a norm, GELU between them: (B, C, *size) -> (B, *size / 4, dim)."""
    return ConvStem(
        grid_conv(rank, in_chans, dim // 2, 3, stride=2, padding=1), nn.LayerNorm(dim // 2), nn.GELU(),
        grid_conv(rank, dim // 2, dim, 3, stride=2, padding=1), nn.LayerNorm(dim),
    )


_WIDE, _WIDER = (96, 192, 384, 768), (128, 256, 512, 1024)
SIZES: dict[str, dict[str, Any]] = {
    "vmamba_tiny_s1l8": dict(dims=_WIDE, depths=(2, 2, 8, 2), expand=1),
    "vmamba_tiny_s2l5": dict(dims=_WIDE, depths=(2, 2, 5, 2), expand=2),
    "vmamba_small_s2l15": dict(dims=_WIDE, depths=(2, 2, 15, 2), expand=2),
    "vmamba_small_s1l20": dict(dims=_WIDE, depths=(2, 2, 20, 2), expand=1),
    "vmamba_base_s2l15": dict(dims=_WIDER, depths=(2, 2, 15, 2), expand=2),
    "vmamba_base_s1l20": dict(dims=_WIDER, depths=(2, 2, 20, 2), expand=1),
    "vmamba_nano": dict(dims=(16, 32), depths=(1, 2), expand=1, img_size=32),
}


def vmamba(dims: tuple[int, ...], depths: tuple[int, ...], expand: float, mixer: Any = None, **common: Any) -> Pyramid:
    """A VMamba of a size."""
    scan = partial(CrossScan, states=1, expand=expand, conv_bias=False, gate=False)
    return Pyramid(dims, depths, [max(dim // 32, 1) for dim in dims], stem=conv_stem, downsample=ConvMerging,
                   block=partial(Block, norm=nn.LayerNorm), mixer=scan, norm=nn.LayerNorm, replace=mixer, **common)


AUTHORS: KeyMap = (
    *((rf"patch_embed\.{theirs}\.(.*)", rf"stem.{ours}.\1") for theirs, ours in ((0, 0), (2, 1), (5, 3), (7, 4))),
    *within((*GRID_SCAN, (r"((?:in|out)_proj\..*)", r"\1", pointwise)), r"layers\.(\d+)\.blocks\.(\d+)\.op\.",
            r"stages.\1.blocks.\2.mixer."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.norm\.(.*)", r"stages.\1.blocks.\2.norm1.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.(.*)", r"stages.\1.blocks.\2.\3", pointwise),
    *((rf"layers\.{stage}\.downsample\.{theirs}\.(.*)", rf"stages.{stage + 1}.downsample.{ours}.\1")
      for stage in range(3) for theirs, ours in ((1, 0), (3, 1))),
    (r"classifier\.norm\.(.*)", r"norm.\1"),
    (r"classifier\.head\.(.*)", r"head.fc.\1"),
)
