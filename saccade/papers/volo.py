"""VOLO: a token writes down, without looking, how the tokens around it attend to each other.

The centre i of each window of K x K tokens projects its own features to the K^2 x K^2 attention weights of the window;
no query meets a key. Every token then sums what the windows that hold it say of it (d channels a head):
    A_i = softmax(W_a mean(x near i) / sqrt(d)),   out_p = proj(sum over the windows i with p of (A_i v_window(i))_p),
v = W_v x. Centres stand `stride` apart, and what a centre projects is the mean of its stride x stride tokens. The
outlookers work on patches of 8 x 8 pixels; self-attention at half that grid follows, then blocks in which a class token
alone attends. Every token is classified, not the class token alone (`saccade.learn.token_labeling` trains so).

Yuan, Hou, Jiang, Feng, Yan, "VOLO: Vision Outlooker for Visual Recognition", 2021, section 3.

Any grid: windows over the border hold zeros for values, and a mean over a cut-off cell is that of its tokens; where the
patches or the halving leave a rest, it is left out (the authors' code). The position table, added after the halving, is
resampled (bicubic).
Quirks kept: sums over overlapping windows are not normalised; outlookers know no drop path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.tables import table
from saccade.ops.window import merge, pad_ends, pad_to_multiple
from saccade.parts.attention import Attention, check_heads
from saccade.parts.block import Block
from saccade.parts.class_attention import ClassBlock
from saccade.parts.convolution import at_least, grid_conv
from saccade.parts.labelled_pyramid import TokenLabelled, stem_layers
from saccade.parts.mlp import Mlp
from saccade.parts.plain import initialise
from saccade.parts.position import Position
from saccade.parts.pyramid import check_sizes
from saccade.parts.stem import ConvStem

_ADDRESS = "https://github.com/sail-sg/volo/releases/download/volo_1/"
# Parameters, multiply-adds, top-1, file. For volo_d3_448 the paper says 67.9e9, less than four times those at 224.
_TABLE: dict[str, tuple[float, float | None, float, str]] = {
    "volo_d1": (26.6e6, 6.8e9, 84.2, "d1_224_84.2"),
    "volo_d1_384": (26.6e6, 22.8e9, 85.2, "d1_384_85.2"),
    "volo_d2": (58.7e6, 14.1e9, 85.2, "d2_224_85.2"),
    "volo_d2_384": (58.7e6, 46.1e9, 86.0, "d2_384_86.0"),
    "volo_d3": (86.3e6, 20.6e9, 85.4, "d3_224_85.4"),
    "volo_d3_448": (86.3e6, None, 86.3, "d3_448_86.3"),
    "volo_d4": (193e6, 43.8e9, 85.7, "d4_224_85.7"),
    "volo_d4_448": (193e6, 197e9, 86.8, "d4_448_86.79"),
    "volo_d5": (296e6, 69.0e9, 86.1, "d5_224_86.10"),
    "volo_d5_448": (296e6, 304e9, 87.0, "d5_448_87.0"),
    "volo_d5_512": (296e6, 412e9, 87.1, "d5_512_87.07"),
}
_CROPS = {"d1_384": 1.0, "d2_384": 1.0, "d3_448": 1.0, "d4_448": 1.15, "d5_448": 1.15, "d5_512": 1.15}

CARD = Card(
    "VOLO: Vision Outlooker for Visual Recognition",
    authors="Yuan, Hou, Jiang, Feng, Yan",
    year=2021,
    systems=("volo",),
    arxiv="2106.13112",
    code="sail-sg/volo@cf35775",
    licence="Apache-2.0",
    weights_licence="Apache-2.0",
    read="paper, code",
    keywords="outlook attention, outlooker, class attention, token labeling, fine-level features",
    kinds=("backbone", "mixer"),
    mixers={"outlook": "Outlook"},
    params={name: row[0] for name, row in _TABLE.items()},
    macs={name: row[1] for name, row in _TABLE.items() if row[1]},
    top1={name: row[2] for name, row in _TABLE.items()},
    aliases={f"volo_d{size}_224": f"volo_d{size}" for size in range(1, 6)},
    weights={name: Weights(f"{_ADDRESS}{row[3]}.pth.tar", crop=_CROPS.get(name[5:], 0.96), licence="Apache-2.0")
             for name, row in _TABLE.items()},
    goldens=("volo_d1", "op_outlook_attention", "op_outlook_attention_stride1"),
    tests=("tests/papers/test_volo.py", "tests/learn/test_token_labeling.py"),
)


class Outlook(nn.Module):
    """Weights of a window from its centre alone, overlapping windows summed: (B, *grid, C) -> (B, *grid, C).

    `kernel` is the (odd) side of a window, `stride` the distance of centres. Raises SaccadeError for an even kernel.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("v", "proj")
    template = Template("linear in x_i: a number an offset", "softmax over the window", "sum of v, windows overlapping")

    def __init__(self, site: Site, kernel: int = 3, stride: int = 2, qkv_bias: bool = False) -> None:
        super().__init__()
        self.scale = check_heads(site) ** -0.5
        if kernel % 2 == 0:
            raise SaccadeError(f"kernel={kernel}: a window has a centre, choose an odd side")
        self.heads, self.kernel, self.stride = site.heads, kernel, stride
        self.v = nn.Linear(site.dim, site.dim, bias=qkv_bias)
        self.logits = nn.Linear(site.dim, site.heads * kernel ** (2 * site.rank))
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        places = self.kernel ** len(grid)
        logits = self.logits(cell_means(x, self.stride)).unflatten(-1, (self.heads, places, places))
        weights = (logits * self.scale).softmax(-1)  # (B, *centres, heads, places, places)
        if recording():
            self._note(weights, grid)
        out = self._mix(weights, self._blocks(self.v(x)).unflatten(-1, (self.heads, -1)))
        margin = self.kernel // 2
        ends = [(-margin, side + margin - full) for side, full in zip(grid, out.shape[1:-1], strict=True)]
        return self.proj(pad_ends(out, ends))

    def _blocks(self, x: Tensor) -> Tensor:
        """Zero-padded and cut in blocks of `stride`: (B, *grid, C) -> (B, n, stride, n', stride, ..., C).

        Place o of the window of centre i is at block i + o // stride, place o % stride.
        """
        margin, step = self.kernel // 2, self.stride
        more = max((self.kernel - 1) // step, -(-margin // step)) * step - margin
        x = pad_ends(x, [(margin, (-side) % step + more) for side in x.shape[1:-1]])
        return x.view(x.shape[0], *(part for side in x.shape[1:-1] for part in (side // step, step)), x.shape[-1])

    def _mix(self, weights: Tensor, blocks: Tensor) -> Tensor:
        """Weights (B, *centres, heads, places, places) and blocks of values (..., heads, d): a padded map (..., C)."""
        counts, centres = blocks.shape[1:-2:2], weights.shape[1:-3]
        places = list(product(range(self.kernel), repeat=len(centres)))
        said = weights @ torch.stack([self._at(blocks, place, centres) for place in places], -2)  # (..., places, d)
        sums: dict[tuple[int, ...], Tensor] = {}  # (B, *n, heads, d) at each place of a block
        for place, one in zip(places, said.unbind(-2), strict=True):
            ends = [(offset // self.stride, count - centre - offset // self.stride)
                    for offset, count, centre in zip(place, counts, centres, strict=True)]
            at = tuple(offset % self.stride for offset in place)
            one = pad_ends(one, [*ends, (0, 0)])  # not an addition into a slice, whose gradient copies the whole
            sums[at] = sums[at] + one if at in sums else one
        every = product(range(self.stride), repeat=len(centres))
        cells = torch.stack([sums[at] if at in sums else torch.zeros_like(one) for at in every], -3)
        sides = tuple(count * self.stride for count in counts)
        return merge(cells.flatten(-2).flatten(0, -3), (self.stride,) * len(centres), sides)

    def _at(self, blocks: Tensor, place: tuple[int, ...], centres: tuple[int, ...]) -> Tensor:
        """A view of what all windows hold at one place: (B, *centres, heads, d)."""
        for axis, (offset, count) in enumerate(zip(place, centres, strict=True), 1):
            blocks = blocks.select(axis + 1, offset % self.stride).narrow(axis, offset // self.stride, count)
        return blocks

    def _note(self, weights: Tensor, grid: tuple[int, ...]) -> None:
        tokens = window_tokens(grid, self.kernel, self.stride, weights.device)
        each = weights.flatten(1, -4).flatten(0, 1)  # (B x centres, heads, places, places)
        for query, softmax in zip(tokens.split(1, -1), each.split(1, -2), strict=True):  # a token asks once in each
            note(softmax, partial(_pair, query, tokens))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 2 N C^2, and with M centres and P places a window M P^2 heads C + M P^2 C."""
        centres = prod(-(-side // self.stride) for side in grid)
        pairs = self.kernel ** (2 * site.rank)
        return 2 * prod(grid) * site.dim**2 + centres * pairs * site.dim * (site.heads + 1)

    def reach(self, site: Site) -> tuple[int, ...]:
        """From one end of a window to the other, or to the far end of the cell of its centre."""
        return (max(self.kernel - 1, self.kernel // 2 + self.stride - 1),) * site.rank


def _pair(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return query, key


def cell_means(x: Tensor, side: int) -> Tensor:
    """(B, *grid, C) -> (B, *ceil(grid / side), C): means of cells, those at the end of the tokens that they have."""
    if side == 1:
        return x
    grid = tuple(x.shape[1:-1])
    cells = pad_to_multiple(x, (side,) * len(grid))
    cells = cells.view(x.shape[0], *(part for full in cells.shape[1:-1] for part in (full // side, side)), x.shape[-1])
    shares = inverse_counts(grid, tuple(cells.shape[1:-1:2]), side, x.dtype, x.device)
    for axis in range(2, len(grid) + 2):  # a sum of views takes a fraction of the time of sum() over short axes
        cells = sum(cells.unbind(axis)[1:], cells.select(axis, 0))
    return cells * shares


@table
def inverse_counts(
    grid: tuple[int, ...], cells: tuple[int, ...], side: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(*cells, 1) one over the number of tokens in each cell."""
    counts = torch.ones(1, dtype=dtype, device=device)
    for full, count in zip(grid, cells, strict=True):
        left = full - torch.arange(count, device=device) * side
        counts = counts[..., None, :] * left.clamp(max=side).to(dtype)[:, None]
    return 1 / counts


@table
def window_tokens(grid: tuple[int, ...], kernel: int, stride: int, device: torch.device) -> Tensor:
    """(centres, places) number of the token at each place of each window; -1 outside the grid."""
    numbers = torch.zeros(1, 1, dtype=torch.long, device=device)
    for side in grid:
        steps = torch.arange(kernel, device=device) - kernel // 2
        place = torch.arange(0, side, stride, device=device)[:, None] + steps
        outside = (place < 0) | (place >= side)
        moved = numbers[:, None, :, None] * side + place[None, :, None, :]
        gone = (numbers < 0)[:, None, :, None] | outside[None, :, None, :]
        numbers = torch.where(gone, -1, moved).flatten(2).flatten(0, 1)
    return numbers


class HalfGrid(nn.Sequential):
    """A convolution of stride 2 on 2 x 2 tokens, then a learned position; a last odd row or column is left out."""

    def __init__(self, rank: int, dim: int, out_dim: int, grid: tuple[int, ...]) -> None:
        position = Position(out_dim, grid)
        nn.init.trunc_normal_(position.table, std=0.02)
        super().__init__(grid_conv(rank, dim, out_dim, 2, stride=2), position)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(at_least(x, 2, first=1))


class Volo(TokenLabelled):
    """Outlookers in the first stage, self-attention at half their grid in the others, class attention at the end."""

    undecayed = ("first",)

    def __init__(
        self, dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], *, ratio: float, kernel: int,
        stride: int, hidden: int, patch: int, class_depth: int, img_size: int | Sequence[int] = 224,
        num_classes: int = 1000, in_chans: int = 3, **common: Any,
    ) -> None:
        if patch % 2:
            raise SaccadeError(f"patch={patch}: the stem's stride is even")
        size = check_sizes(num_classes, in_chans, img_size)
        grid = tuple(max(-(-side // 2) // (patch // 2) // 2, 1) for side in size)

        def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
            # The first convolution halves; after it a patch has half its pixels.
            last = grid_conv(rank, hidden, dim, patch // 2, stride=patch // 2)
            return ConvStem(*stem_layers(rank, in_chans, hidden, 2), last, least=patch - 1)

        def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
            return Block(site, mixer, norm=nn.LayerNorm, mlp=partial(Mlp, ratio=ratio),
                         drop_path=drop_path if site.stage else 0.0)

        def same_grid(rank: int, dim: int, out_dim: int) -> nn.Module:
            return nn.Identity()

        later = len(dims) - 2
        mixers = [partial(Outlook, kernel=kernel, stride=stride), *[partial(Attention, qkv_bias=False)] * (later + 1)]
        super().__init__(
            dims, depths, heads, stem=stem, stride=patch, block=block, mixer=mixers,
            downsample=[partial(HalfGrid, grid=grid), *[same_grid] * later], downsample_stride=[2, *[1] * later],
            norm=nn.LayerNorm, img_size=size, num_classes=num_classes, in_chans=in_chans, **common,
        )
        self.first = nn.Parameter(torch.empty(1, 1, dims[-1]))
        self.class_blocks = nn.Sequential(*(
            ClassBlock(dims[-1], heads[-1], ratio, qkv_bias=False, norm=nn.LayerNorm) for _ in range(class_depth)
        ))
        self.apply(partial(initialise, spread=0.02))
        nn.init.trunc_normal_(self.first, std=0.02)

    def class_token(self, x: Tensor) -> Tensor:
        """The learned one, whatever the map."""
        return self.first.expand(x.shape[0], -1, -1)


def _sizes() -> dict[str, dict[str, Any]]:
    shapes: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
        "d1": (192, (4, 4, 8, 2), (6, 12, 12, 12), {}),
        "d2": (256, (6, 4, 10, 4), (8, 16, 16, 16), {}),
        "d3": (256, (8, 8, 16, 4), (8, 16, 16, 16), {}),
        "d4": (384, (8, 8, 16, 4), (12, 16, 16, 16), {}),
        "d5": (384, (12, 12, 20, 4), (12, 16, 16, 16), dict(ratio=4.0, hidden=128)),
    }
    table = {f"volo_{size}": dict(dims=(dim, *[2 * dim] * 3), depths=depths, heads=heads) | more
             for size, (dim, depths, heads, more) in shapes.items()}
    for name in _TABLE:
        base, _, side = name.removeprefix("volo_").partition("_")
        if side:
            table[name] = table[f"volo_{base}"] | dict(img_size=int(side))
    return table | {"volo_nano": dict(dims=(32, 64, 64), depths=(1, 2, 2), heads=(1, 2, 2), hidden=16, patch=4,
                                      img_size=32)}


SIZES = _sizes()


def volo(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    ratio: float = 3.0,
    kernel: int = 3,
    stride: int = 2,
    hidden: int = 64,
    patch: int = 8,
    class_depth: int = 2,
    mixer: Any = None,
    **common: Any,
) -> Volo:
    """A VOLO of a size: `hidden` is the stem's width, `class_depth` the number of class-attention blocks."""
    return Volo(dims, depths, heads, ratio=ratio, kernel=kernel, stride=stride, hidden=hidden, patch=patch,
                class_depth=class_depth, replace=mixer, **common)


def _one_axis(position: Tensor) -> Tensor:
    return position.flatten(1, -2)


# timm kept the authors' names.
OUTLOOK: KeyMap = ((r"attn\.(.*)", r"logits.\1"),)
AUTHORS: KeyMap = (
    (r"patch_embed\.conv\.(.*)", r"stem.\1"),
    (r"patch_embed\.proj\.(.*)", r"stem.9.\1"),
    (r"network\.0\.(\d+)\.attn\.attn\.(.*)", r"stages.0.blocks.\1.mixer.logits.\2"),
    (r"network\.0\.(\d+)\.attn\.(.*)", r"stages.0.blocks.\1.mixer.\2"),
    (r"network\.0\.(.*)", r"stages.0.blocks.\1"),
    (r"network\.1\.proj\.(.*)", r"stages.1.downsample.0.\1"),
    ("pos_embed", "stages.1.downsample.1.table", _one_axis),
    *(rule for stage in range(1, 4) for rule in (
        (rf"network\.{stage + 1}\.(\d+)\.attn\.(.*)", rf"stages.{stage}.blocks.\1.mixer.\2"),
        (rf"network\.{stage + 1}\.(.*)", rf"stages.{stage}.blocks.\1"),
    )),
    ("cls_token", "first"),
    (r"post_network\.(\d+)\.attn\.(.*)", r"class_blocks.\1.attention.\2"),
    (r"post_network\.(.*)", r"class_blocks.\1"),
    (r"aux_head\.(.*)", r"head_aux.\1"),
)
# The authors' list of layers counts the halving of the grid, before the position, as one.
TAPS = {"network0": "stages.0", "network1": "stages.1.downsample.0"} | {
    f"network{stage + 1}": f"stages.{stage}" for stage in range(1, 4)
}
