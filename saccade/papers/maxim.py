"""MAXIM: a multi-stage U-Net for image restoration whose spatial mixing is two fixed-size gated MLPs, local and global.

Channels are split in two heads. One mixes the tokens inside each b x b block (local), the other the tokens that lie at
the same place of each cell of a g x g grid (dilated, global); both are gated MLPs, with weights free of the image size:
    gmlp(x) = x + W2 (u * (mix(norm(v)) + 1)),   u, v = split(gelu(W1 norm(x))).
Cross gating lets two maps gate each other: y <- Wy (y * g(x)) + y0, x <- Wx (x * g(y)) + x0 + y, g mixing the same way.
Each stage is a U-Net fed with the picture at several scales; supervised attention hands features to the next stage.

Tu, Talebi, Zhang, Yang, Milanfar, Bovik, Li, "MAXIM: Multi-Axis MLP for Image Processing", 2022, section 3.

Any grid: a map is zero-padded at the end to multiples of block and grid and cropped; pictures are reflected to 64.
Quirks kept: low-resolution levels use the block's size as their grid's; pictures are subsampled, not filtered.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm, prod

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import KeyMap, pointwise
from saccade.core.site import Site
from saccade.ops.window import crop, merge, pad_to_multiple, partition
from saccade.parts.convolution import on_grid

CARD = Card(
    "MAXIM: Multi-Axis MLP for Image Processing",
    authors="Tu, Talebi, Zhang, Yang, Milanfar, Bovik, Li",
    year=2022,
    systems=("maxim",),
    arxiv="2201.02973",
    code="google-research/maxim@31853b9",
    licence="Apache-2.0",
    read="abstract, code (JAX); operators also in the unlicensed vztu/maxim-pytorch (its first fifth)",
    keywords="multi-axis gated MLP, cross gating, spatial gating unit, block and grid, multi-stage U-Net, restoration",
    kinds=("restoration", "mixer"),
    mixers={"multi_axis_gmlp": "MultiAxisGmlp"},
    goldens=("op_maxim_multi_axis_gmlp", "op_maxim_cross_gating"),
)


def tanh_gelu() -> nn.GELU:
    """JAX's default GELU."""
    return nn.GELU(approximate="tanh")


def norm(dim: int) -> nn.LayerNorm:
    """Flax's default layer norm."""
    return nn.LayerNorm(dim, eps=1e-6)


class BlockMix(nn.Linear):
    """A linear layer over the tokens of each block: (B, *grid, C) -> (B, *grid, C), sides multiples of the block's."""

    def __init__(self, sides: tuple[int, ...], bias: float = 0.0) -> None:
        super().__init__(prod(sides), prod(sides))
        self.sides = sides
        nn.init.normal_(self.weight, std=0.02)
        nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        blocks = partition(x, self.sides)
        return merge(super().forward(blocks.mT).mT.contiguous(), self.sides, tuple(x.shape[1:-1]))


class GridMix(BlockMix):
    """A linear layer over the tokens at one place of all cells of a grid: (B, *grid, C) -> (B, *grid, C)."""

    def forward(self, x: Tensor) -> Tensor:
        cell = tuple(size // side for size, side in zip(x.shape[1:-1], self.sides, strict=True))
        cells = partition(x, cell).unflatten(0, (-1, self.in_features)).movedim(1, -1)  # (B, cell, C, G)
        mixed = nn.Linear.forward(self, cells).movedim(-1, 1).flatten(0, 1).contiguous()
        return merge(mixed, cell, tuple(x.shape[1:-1]))


class Gmlp(nn.Module):
    """x + fc2(u * (mix(norm(v)) + 1)), u and v the halves of gelu(fc1(norm(x))): (B, *grid, C) -> (B, *grid, C)."""

    def __init__(self, dim: int, mix: nn.Module) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.activation = tanh_gelu()
        self.gate_norm = norm(dim)
        self.mix = mix
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.activation(self.fc1(self.norm(x))).chunk(2, -1)
        return x + self.fc2(u * (self.mix(self.gate_norm(v)) + 1))


class _TwoAxes(nn.Module):
    """fc2([global(u), local(v)]), u and v the halves of gelu(fc1(norm(x))), on whole blocks and cells."""

    def __init__(self, dim: int, whole: nn.Module, local: nn.Module, multiple: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.activation = tanh_gelu()
        self.whole, self.local, self.multiple = whole, local, multiple
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        padded = pad_to_multiple(x, self.multiple)
        u, v = self.activation(self.fc1(self.norm(padded))).chunk(2, -1)
        out = self.fc2(torch.cat([self.whole(u), self.local(v)], -1))
        return crop(out, tuple(x.shape[1:-1])).contiguous()


def multiples(block: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    """The sides that both whole blocks and whole cells divide."""
    return tuple(map(lcm, block, grid))


class MultiAxisGmlp(_TwoAxes):
    """What the multi-axis gated MLP adds to the map: (B, *grid, C) -> (B, *grid, C).

    `block` and `cells` are the sides of the local blocks and of the global grid (8 each). (Tu et al., 2022, section
    3.2.)
    """

    ranks = (1, 2, 3)

    def __init__(self, site: Site, block: Sequence[int] | None = None, cells: Sequence[int] | None = None) -> None:
        block, cells = tuple(block or (8,) * site.rank), tuple(cells or (8,) * site.rank)
        super().__init__(site.dim, Gmlp(site.dim, GridMix(cells)), Gmlp(site.dim, BlockMix(block)),
                         multiples(block, cells))
        self.tokens = prod(block) + prod(cells)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 10 N C^2 of projections and N C (b^2 + g^2) of token mixing, N counted with the padding."""
        tokens = prod(size + (-size) % side for size, side in zip(grid, self.multiple, strict=True))
        return tokens * site.dim * (10 * site.dim + self.tokens)

    def reach(self, site: Site) -> None:
        """The grid reaches across the whole map."""
        return None


class GatingWeights(_TwoAxes):
    """The gate a map makes for another: (B, *grid, C) -> (B, *grid, C)."""

    def __init__(self, dim: int, block: tuple[int, ...], cells: tuple[int, ...]) -> None:
        super().__init__(dim, GridMix(cells, bias=1.0), BlockMix(block, bias=1.0), multiples(block, cells))


class CrossGating(nn.Module):
    """Two maps gate each other: x (B, H, W, X), y (B, h, w, Y) -> both (B, H, W, C).

    `upsample`: y comes at half the resolution. (Tu et al., 2022, section 3.3.)
    """

    def __init__(
        self, x_dim: int, y_dim: int, dim: int, block: Sequence[int], cells: Sequence[int], upsample: bool = True
    ) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(y_dim, dim, 2, 2) if upsample else None
        self.x_in = nn.Linear(x_dim, dim)
        self.y_in = nn.Linear(dim if upsample else y_dim, dim)
        self.x_norm, self.y_norm = norm(dim), norm(dim)
        self.x_fc, self.y_fc = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.activation = tanh_gelu()
        self.x_gate = GatingWeights(dim, tuple(block), tuple(cells))
        self.y_gate = GatingWeights(dim, tuple(block), tuple(cells))
        self.x_out, self.y_out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.x_in(x)
        y = self.y_in(y if self.up is None else on_grid(self.up, y))
        x_inner, y_inner = self.activation(self.x_fc(self.x_norm(x))), self.activation(self.y_fc(self.y_norm(y)))
        y = y + self.y_out(y_inner * self.x_gate(x_inner))
        return x + y + self.x_out(x_inner * self.y_gate(y_inner)), y


GMLP: KeyMap = (
    (r"LayerNorm_in\.gamma", "norm.weight"), (r"LayerNorm_in\.beta", "norm.bias"),
    (r"in_project\.(.*)", r"fc1.\1"), (r"out_project\.(.*)", r"fc2.\1"),
    *(rule for theirs, ours in (("Grid", "whole"), ("Block", "local")) for rule in (
        (rf"{theirs}GmlpLayer\.LayerNorm\.gamma", f"{ours}.norm.weight"),
        (rf"{theirs}GmlpLayer\.LayerNorm\.beta", f"{ours}.norm.bias"),
        (rf"{theirs}GmlpLayer\.in_project\.(.*)", rf"{ours}.fc1.\1"),
        (rf"{theirs}GmlpLayer\.out_project\.(.*)", rf"{ours}.fc2.\1"),
        (rf"{theirs}GmlpLayer\.{theirs}GatingUnit\.Dense_0\.(.*)", rf"{ours}.mix.\1"),
        (rf"{theirs}GmlpLayer\.{theirs}GatingUnit\.intermediate_layernorm\.gamma", f"{ours}.gate_norm.weight"),
        (rf"{theirs}GmlpLayer\.{theirs}GatingUnit\.intermediate_layernorm\.beta", f"{ours}.gate_norm.bias"))),
)
CROSS: KeyMap = (
    (r"ConvTranspose_0\.(.*)", r"up.\1"),
    (r"Conv_0\.(.*)", r"x_in.\1", pointwise), (r"Conv_1\.(.*)", r"y_in.\1", pointwise),
    (r"LayerNorm_([xy])\.gamma", r"\1_norm.weight"), (r"LayerNorm_([xy])\.beta", r"\1_norm.bias"),
    (r"in_project_([xy])\.(.*)", r"\1_fc.\2"), (r"out_project_([xy])\.(.*)", r"\1_out.\2"),
    *(rule for axis in "xy" for rule in (
        (rf"SplitHeadMultiAxisGating_{axis}\.LayerNorm_in\.gamma", f"{axis}_gate.norm.weight"),
        (rf"SplitHeadMultiAxisGating_{axis}\.LayerNorm_in\.beta", f"{axis}_gate.norm.bias"),
        (rf"SplitHeadMultiAxisGating_{axis}\.in_project\.(.*)", rf"{axis}_gate.fc1.\1"),
        (rf"SplitHeadMultiAxisGating_{axis}\.out_project\.(.*)", rf"{axis}_gate.fc2.\1"),
        (rf"SplitHeadMultiAxisGating_{axis}\.Dense_0\.(.*)", rf"{axis}_gate.whole.\1"),
        (rf"SplitHeadMultiAxisGating_{axis}\.Dense_1\.(.*)", rf"{axis}_gate.local.\1"))),
)
