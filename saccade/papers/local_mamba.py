"""LocalMamba: scans that finish a window before they leave it.

Row by row, a token's neighbour below is a whole row away. Here some of the scans go window by window, row by row inside
each, so that near tokens stay near. A block runs several of these orders: "h" row by row, "v" column by column, "w2",
"w7" window by window, each also from its end ("_flip"); each has a selection of its own. Of every one of them a gate
says which channels count,
    out = out_proj(sum over orders o of gate(y_o) y_o),   y_o = back_o(selection_o(x ordered by o) silu(z)),
with gate(y) = sigmoid(select(gelu(reduce(mean over tokens of norm(y))))) shared by the orders. Which orders a layer
runs is found by a search; its results are the published models.

LocalVim is a plain network of these layers without class token or MLP, x = rotate(x), x += mixer(rms_norm(x)): every
layer turns all channels of a token, in pairs, by angles that grow with its row (first half) and its column.
LocalVMamba (local_vssm_*) is VMamba's first pyramid with such orders: one two-dimensional convolution for all, gated by
z once after the sum, x += mixer(norm(x)), patches of 4 pixels merged 2x2 between stages.

Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan", 2024, sections 3.2-3.4.

Any grid: for windows, (x, z) is zero-padded at its end, after in_proj and before convolution and scan, which padded
tokens take part in, and cropped behind them. Positions, and cosines and sines, are resampled (bicubic).
Quirks kept: LocalVim turns the shortcut as well, what a layer added in every later one; the authors' file defines
local_vim_small twice, and the later, without searched orders, is what runs; the class token keeps its number,
floor(N / 2), in every order, padded ones too; "_flip" turns the padding to the front. The authors' way back from "v" is
right on square grids alone; ours is right on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.sizes import ceil_div
from saccade.ops.tables import table
from saccade.ops.window import crop, merge, pad_to_multiple, partition
from saccade.parts.merging import PatchMerging
from saccade.parts.plain import Plain
from saccade.parts.position import resample
from saccade.parts.pyramid import Pyramid
from saccade.parts.ssm import (
    GRID_SCAN,
    GridScan,
    MixerBlock,
    MixerTokens,
    RMSNorm,
    Selection,
    scan_together,
    selection_names,
    step_rank,
)
from saccade.parts.stem import PatchEmbed

CARD = Card(
    "LocalMamba: Visual State Space Model with Windowed Selective Scan",
    authors="Huang, Pei, You, Wang, Qian, Xu",
    year=2024,
    systems=("survey_ssm_medical",),
    arxiv="2403.09338",
    code="hunto/LocalMamba@75e5d1f",
    licence="Apache-2.0",
    read="paper, code",
    keywords="windowed selective scan, local scan, scan directions, channel gate",
    kinds=("backbone", "mixer"),
    mixers={"local_mamba": "LocalMamba", "local_cross_scan": "LocalCrossScan"},
    params={"local_vim_tiny": 8e6, "local_vim_small": 28e6, "local_vssm_tiny": 26e6, "local_vssm_small": 50e6},
    macs={"local_vssm_tiny": 5.7e9, "local_vssm_small": 11.4e9},
    top1={"local_vim_tiny": 76.2, "local_vim_small": 81.2, "local_vssm_tiny": 82.7, "local_vssm_small": 83.7},
    weights={name: Weights(f"https://github.com/hunto/LocalMamba/releases/download/v1.0.0/{name}.ckpt",
                           licence="Apache-2.0") for name in ("local_vim_tiny", "local_vssm_small")},
    goldens=("op_local_mamba", "op_local_mamba_middle_cls"),
    tests=("tests/papers/test_local_mamba.py",),
)


class LocalMamba(nn.Module):
    """Gated sum of selections in several `orders`: (B, *grid, C) -> (B, *grid, C).

    Prefix tokens stand in the middle of every sequence. Raises SaccadeError for an order that is not known.
    """

    ranks, prefix = (1, 2, 3), True
    projections = ("in_proj", "out_proj")
    template = Template(
        "selective scans C_i A_(i..j) B_j along several orders, local ones among them",
        "decays A in (0, 1)",
        "sum of x over the orders, each by its gate",
    )

    def __init__(
        self, site: Site, orders: Sequence[str] = ("h", "v_flip", "w2", "w7_flip"), states: int = 16, kernel: int = 4,
        expand: float = 2, rank: int | None = None, bias: bool = False,
    ) -> None:
        super().__init__()
        inner, rank = int(expand * site.dim), step_rank(site.dim) if rank is None else rank
        self.orders = [Order(name) for name in orders]
        self.in_proj = nn.Linear(site.dim, 2 * inner, bias=bias)
        self.selections = nn.ModuleList(Selection(inner, rank, states, kernel) for _ in orders)
        self.gate = TokenMeanGate(inner)
        self.out_proj = nn.Linear(inner, site.dim, bias=bias)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        grid = tuple(x.shape[1:-1])
        half, count = prod(grid) // 2, 0 if prefix is None else prefix.shape[1]
        inner, gate = self.in_proj(x).chunk(2, -1)
        gate, beside, beside_gate = F.silu(gate), None, None
        if prefix is not None:
            beside, beside_gate = self.in_proj(prefix).chunk(2, -1)
            beside_gate = F.silu(beside_gate)
        scanned = self._scan([inserted(order.line(inner), beside, half) for order in self.orders])
        total, total_prefix = None, None
        for order, y in zip(self.orders, scanned, strict=True):
            y, y_prefix = taken_out(y, count, half)
            y = order.back(y, grid) * gate
            y_prefix = y_prefix if beside_gate is None else y_prefix * beside_gate
            weights = self.gate(torch.cat([y.flatten(1, -2), y_prefix], 1))
            y_prefix, weights = y_prefix * weights, weights.view(-1, *[1] * len(grid), weights.shape[-1])
            total = y * weights if total is None else torch.addcmul(total, y, weights)
            total_prefix = y_prefix if total_prefix is None else total_prefix + y_prefix
        out = self.out_proj(total)
        return out if prefix is None else (out, self.out_proj(total_prefix))

    def _scan(self, lines: list[Tensor]) -> list[Tensor]:
        """Each selection on its line; orders of one window side have lines of one length and share a scan."""
        outputs: dict[int, Tensor] = {}
        for side in {order.window for order in self.orders}:
            of_side = [number for number, order in enumerate(self.orders) if order.window == side]
            selections = [self.selections[number] for number in of_side]
            results = scan_together(selections, [lines[number] for number in of_side])  # type: ignore[arg-type]
            outputs |= dict(zip(of_side, results, strict=True))
        return [outputs[number] for number in range(len(lines))]

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: 3 N C E for the projections, selections of width E on padded grids, C^2 / 4-wide gates."""
        total = (prod(grid) + prefix) * 3 * self.out_proj.weight.numel()
        for order, selection in zip(self.orders, self.selections, strict=True):
            total += selection.cost(order.length(grid) + prefix)  # type: ignore[operator]
            total += 2 * self.gate.select.weight.numel()
        return total

    def reach(self, site: Site) -> None:
        """The gates see every token."""
        return None


class LocalCrossScan(GridScan):
    """Selections along several `orders` of one map, each gated by its channels, summed, normed, gated by z.

    (B, *grid, C) -> (B, *grid, C). Raises SaccadeError for an order that is not known.
    """

    template = Template(
        "selective scans C_i A_(i..j) B_j along several orders, local ones among them",
        "decays A in (0, 1)",
        "sum of x over the orders, each by its gate, normed",
    )

    def __init__(
        self, site: Site, orders: Sequence[str] = ("h", "v_flip", "w2", "w7_flip"), states: int = 16, kernel: int = 3,
        expand: float = 2, rank: int | None = None, bias: bool = False, conv_bias: bool = True,
    ) -> None:
        super().__init__(site, len(orders), states, kernel, expand, rank, bias, conv_bias, gate=True)
        self.orders = [Order(name) for name in orders]
        self.select = TokenMeanGate(self.norm.normalized_shape[0])

    def scanned(self, u: Tensor, chosen: Tensor) -> Tensor:
        grid, total, skips = tuple(u.shape[1:-1]), torch.zeros_like(u), self.D.unflatten(0, (self.ways, -1))
        for window in dict.fromkeys(order.window for order in self.orders):  # lines of one length share a scan
            ways = [number for number, order in enumerate(self.orders) if order.window == window]
            lines = torch.stack([self.orders[way].line(u) for way in ways], 1)
            choices = torch.stack([self.orders[way].line(chosen[..., way, :]) for way in ways], 1)
            for way, line in zip(ways, self.scan(lines, choices, ways).unbind(1), strict=True):
                y = torch.addcmul(self.orders[way].back(line, grid), u, skips[way])
                total = total + y * self.select(y.flatten(1, -2)).view(-1, *[1] * len(grid), y.shape[-1])
        return total

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of a `GridScan`, and of a gate of C^2 / 4 for each order."""
        return super().cost(site, grid) + 2 * self.ways * self.select.select.weight.numel()

    def scanned_tokens(self, grid: tuple[int, ...]) -> int:
        return sum(order.length(grid) for order in self.orders)


class Order:
    """A way through a grid, by its name: "h", "v" or "w7" (windows of 7), with "_flip" from its end."""

    def __init__(self, name: str) -> None:
        kind, _, turned = name.partition("_")
        windowed = kind[:1] == "w" and kind[1:].isdigit() and int(kind[1:]) > 0
        if not (kind in ("h", "v") or windowed) or turned not in ("", "flip"):
            raise SaccadeError(f'local_mamba: no order {name!r}; give "h", "v", "w2", "w7", ..., or one with "_flip"')
        self.columns, self.flip = kind == "v", turned == "flip"
        self.window = int(kind[1:]) if windowed else 1

    def line(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, N, C), N of the padded grid."""
        rank = x.ndim - 2
        if self.columns:
            x = x.permute(0, *range(rank, 0, -1), rank + 1)
        if self.window > 1:
            window = (self.window,) * rank
            x = partition(pad_to_multiple(x, window), window).unflatten(0, (x.shape[0], -1))
        tokens = x.flatten(1, -2)
        return tokens.flip(1) if self.flip else tokens

    def length(self, grid: tuple[int, ...]) -> int:
        """Tokens of a line, padding among them."""
        return prod(ceil_div(side, self.window) * self.window for side in grid)

    def back(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Undo `line`: (B, N, C) -> (B, *grid, C)."""
        tokens = tokens.flip(1) if self.flip else tokens
        if self.window > 1:
            window = (self.window,) * len(grid)
            padded = tuple(ceil_div(side, self.window) * self.window for side in grid)
            return crop(merge(tokens.unflatten(1, (-1, prod(window))).flatten(0, 1), window, padded), grid)
        if self.columns:
            rank = len(grid)
            return tokens.unflatten(1, grid[::-1]).permute(0, *range(rank, 0, -1), rank + 1)
        return tokens.unflatten(1, grid)


class TokenMeanGate(nn.Module):
    """sigmoid(select(gelu(reduce(mean of norm(y))))), hidden width C / 8: (B, N, C) -> (B, 1, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reduce = nn.Linear(dim, dim // 8)
        self.select = nn.Linear(dim // 8, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.select(F.gelu(self.reduce(self.norm(y).mean(1, keepdim=True)))).sigmoid()


def inserted(tokens: Tensor, prefix: Tensor | None, at: int) -> Tensor:
    """The sequence with prefix tokens from number `at` on."""
    return tokens if prefix is None else torch.cat([tokens[:, :at], prefix, tokens[:, at:]], 1)


def taken_out(tokens: Tensor, count: int, at: int) -> tuple[Tensor, Tensor]:
    """Undo `inserted`: the sequence, and the `count` prefix tokens."""
    if not count:
        return tokens, tokens[:, :0]
    return torch.cat([tokens[:, :at], tokens[:, at + count:]], 1), tokens[:, at : at + count]


class TurnedTokens(MixerTokens):
    """x = rotate(x); x += tail(mixer(norm(x))), on grid tokens (B, N, C) without prefix."""

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        turn = rotations(self.site.grid, tokens.shape[-1], tokens.dtype, tokens.device)
        cos, sin = resample(turn, grid).flatten(1, -2).unflatten(-1, (2, -1, 1)).unbind(2)
        a, b = tokens.unflatten(-1, (-1, 2)).split(1, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return super().forward(turned, count, grid)


@table
def rotations(grid: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, *grid, dim): dim / 2 cosines, as many sines, of angles p 10000^(-2 i / d), d = dim / rank channels an axis.

    p is the place on a side of 14, whatever the grid. (Su et al., "RoFormer", 2021; Fang et al., "EVA-02", 2023.)
    """
    rank, angles = len(grid), []
    if dim % (2 * rank):
        raise SaccadeError(f"{dim} channels on {rank} axes: give a multiple of {2 * rank}, a pair an axis")
    rate = 10000 ** (-torch.arange(0, dim // rank, 2, device=device) / (dim // rank))
    for axis, side in enumerate(grid):
        angle = (torch.arange(side, device=device) / side * 14)[:, None] * rate
        shape = [1] * rank
        shape[axis] = side
        angles.append(angle.view(*shape, -1).expand(*grid, -1))
    angle = torch.cat(angles, -1)[None]
    return torch.cat([angle.cos(), angle.sin()], -1).to(dtype)




def _layers(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(layer.split()) for layer in text.split(","))


# The orders of each layer, as searches found them: of LocalVim-T, LocalVMamba-T and LocalVMamba-S.
_TINY = _layers("""
    h v_flip w7 w7_flip,  h_flip w2_flip w7 w7_flip,  h h_flip v w7,  h h_flip v v_flip,  h h_flip v v_flip,
    h h_flip v v_flip,  h_flip v v_flip w7,  h_flip v v_flip w2_flip,  h h_flip v v_flip,  h h_flip v v_flip,
    h v v_flip w2,  h v v_flip w2_flip,  h h_flip v_flip w7,  h_flip v v_flip w2,  h h_flip v v_flip,
    h v w2 w2_flip,  v v_flip w2 w7,  h h_flip v w2,  h h_flip w2_flip w7,  v v_flip w2 w2_flip
""")
_LAYERS_15 = _layers("""
    h h_flip w7 w7_flip,  h_flip v_flip w2 w2_flip,  h_flip v_flip w2_flip w7,  h_flip v v_flip w2,
    h h_flip v_flip w2_flip,  h_flip v_flip w2 w2_flip,  h w2_flip w7 w7_flip,  h h_flip v v_flip,
    h v_flip w7 w7_flip,  h_flip v w2 w7_flip,  v v_flip w2 w7_flip,  h h_flip v_flip w2_flip,
    v_flip w2_flip w7 w7_flip,  h_flip v_flip w2_flip w7_flip,  h_flip v w7 w7_flip
""")
_LAYERS_33 = _layers("""
    h v v_flip w7_flip,  h h_flip v w7,  h_flip v v_flip w7,  h_flip v w2_flip w7,  h_flip v w2_flip w7,
    h_flip v_flip w2 w7_flip,  h_flip v v_flip w7,  h v v_flip w7,  h v v_flip w7,  h v v_flip w7_flip,
    h h_flip v v_flip,  h v v_flip w2,  v v_flip w2_flip w7,  h h_flip v w2,  h_flip v v_flip w7_flip,
    h h_flip v v_flip,  h v v_flip w7_flip,  h v v_flip w7_flip,  h h_flip v_flip w7,  h_flip v_flip w2_flip w7,
    h_flip v v_flip w7_flip,  v v_flip w7 w7_flip,  h v v_flip w7_flip,  h_flip v v_flip w2,  h v v_flip w2_flip,
    h h_flip v w7,  h h_flip w7 w7_flip,  h v_flip w2 w2_flip,  h v_flip w2 w7,  h v v_flip w7_flip,
    h_flip v w2_flip w7,  h_flip v_flip w7 w7_flip,  h v w7 w7_flip
""")
_FIXED = (("h", "h_flip", "w2", "w2_flip"),)
SIZES: dict[str, dict[str, Any]] = {
    "local_vim_tiny": dict(dim=192, orders=_TINY),
    "local_vim_tiny_wo_search": dict(dim=192, orders=_FIXED * 20),
    "local_vim_small": dict(dim=384, orders=_FIXED * 20),
    "local_vim_nano": dict(dim=32, orders=_TINY[1:3], patch=4, img_size=32),
    "local_vssm_tiny": dict(builder="local_vssm", depths=(2, 2, 9, 2), orders=_LAYERS_15),
    "local_vssm_small": dict(builder="local_vssm", depths=(2, 2, 27, 2), orders=_LAYERS_33),
    "local_vssm_nano": dict(builder="local_vssm", dims=(16, 32), depths=(1, 2), orders=_LAYERS_15[:3],
                            patch=2, img_size=32),
}


def local_mamba(
    dim: int, orders: Sequence[Sequence[str]], patch: int = 16, global_pool: Any = "avg", mixer: Any = None,
    **common: Any,
) -> Plain:
    """A LocalVim of a width, a layer for each of the sets of `orders`."""

    def own(site: Site) -> LocalMamba:
        return LocalMamba(site, orders[site.index])

    return Plain(dim, len(orders), max(dim // 64, 1), patch=patch, prefix=0, mixer=own, block=TurnedTokens,
                 norm=RMSNorm, global_pool=global_pool, replace=mixer, **common)


def local_vssm(
    depths: Sequence[int], orders: Sequence[Sequence[str]], dims: Sequence[int] = (96, 192, 384, 768),
    patch: int = 4, mixer: Any = None, **common: Any,
) -> Pyramid:
    """A LocalVMamba of a size, with a set of `orders` for each of its layers."""

    def own(site: Site) -> LocalCrossScan:
        return LocalCrossScan(site, orders[sum(depths[:site.stage]) + site.index])

    return Pyramid(dims, depths, [max(dim // 32, 1) for dim in dims], stride=patch, downsample=PatchMerging,
                   stem=partial(PatchEmbed, stride=patch, norm=nn.LayerNorm),
                   block=partial(MixerBlock, norm=nn.LayerNorm), mixer=own, norm=nn.LayerNorm, replace=mixer, **common)


def mixer_names(orders: int) -> KeyMap:
    """The authors' names in a mixer of so many orders."""
    rules = [rule for number in range(orders) for rule in selection_names(f"_{number}", f"selections.{number}")]
    return (*rules, *_gate_names("attn", "gate"))


def _gate_names(theirs: str, ours: str) -> KeyMap:
    return tuple((rf"{theirs}\.{before}\.(.*)", rf"{ours}.{after}.\1")
                 for before, after in (("norm", "norm"), ("global_reduce", "reduce"), ("channel_select", "select")))


CROSS_SCAN: KeyMap = (*GRID_SCAN, *_gate_names(r"multi_scan\.attn", "select"))
AUTHORS: KeyMap = (
    Dropped(r"rope\.freqs_(cos|sin)", "derived buffer"),
    ("pos_embed", "position"),
    (r"patch_embed\.(proj\..*)", r"stem.\1"),
    *within((*mixer_names(4), (r"(.*)", r"\1")), r"layers\.(\d+)\.mixer\.", r"blocks.\1.mixer."),
    (r"layers\.(\d+)\.norm\.(.*)", r"blocks.\1.norm.\2"),
    (r"norm_f\.(.*)", r"norm.\1"),
    *((rf"patch_embed\.{theirs}\.(.*)", rf"stem.{ours}.\1") for theirs, ours in ((0, "proj"), (2, "norm"))),
    *within((*CROSS_SCAN, (r"(.*)", r"\1")), r"layers\.(\d+)\.blocks\.(\d+)\.op\.",
            r"stages.\1.blocks.\2.mixer."),
    (r"layers\.(\d+)\.(blocks\.\d+\.norm\..*)", r"stages.\1.\2"),
    *((rf"layers\.{stage}\.downsample\.(.*)", rf"stages.{stage + 1}.downsample.\1") for stage in range(3)),
    (r"classifier\.norm\.(.*)", r"norm.\1"),
    (r"classifier\.head\.(.*)", r"head.fc.\1"),
)
