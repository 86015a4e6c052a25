"""DuoFormer: attention across the scales of a place, then across places.

A convolutional network gives maps at four scales, which are projected to one width. What all of them know of a place of
the coarsest map, 1 + 4 + 16 + 64 tokens and one scale token before them, attends within itself (scale attention); then
the scale tokens of all places, with a class token, attend to each other (patch attention):
    X[r] = [scale token, s4[r], s3[2 x 2 of r], s2[4 x 4 of r], s1[8 x 8 of r]] + position,  X[r] = blocks(X[r]),
    t = [class token, X[1][0], ..., X[R][0]] + position,  t = attention(t) a few times,  scores = head(t[0]).

Tang, Zhang, Ho, Knudsen, Tasdizen, "DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention
Vision Transformer", 2025.

Any grid: finer maps are zero-padded at their ends to whole places, after their projection, and the padded tokens are
masked; positions of places are resampled.
Quirks kept: the 2 x 2 tokens of the second coarsest map stand column by column, all others row by row; patch attention
has neither norm, shortcut nor MLP; the final norm is not used for the class token (but for global_pool="avg").
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer, create_model
from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.keymap import KeyMap, matrix_from_1x1, within, without_first_axis
from saccade.core.site import Site
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.ops.window import crop, merge, pad_to_multiple, partition
from saccade.parts.attention import Attention, check_heads
from saccade.parts.block import Norm, residual_tail
from saccade.parts.mlp import Mlp
from saccade.parts.plain import beside_prefix, initialise
from saccade.parts.position import is_native, resample
from saccade.parts.pyramid import check_sizes, drop_path_rates, undecayed
from saccade.parts.resnet import BLOCK_NAMES
from saccade.parts.tokens import join

CARD = Card(
    "DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision Transformer",
    authors="Tang, Zhang, Ho, Knudsen, Tasdizen",
    year=2025,
    systems=("duoformer",),
    arxiv="2506.12982",
    code="AliSerwat/duoformer_TCGA@69b7441",
    read="paper",
    keywords="scale attention, patch attention, multi-scale tokens, hybrid, ResNet, medical image classification",
    kinds=("backbone",),
    goldens=("duoformer_r18_depth2", "op_duoformer_scale_block"),
    tests=("tests/papers/test_duoformer.py",),
)


class ScaleBlock(nn.Module):
    """x += tail(attention(norm(x))); x += tail(mlp(norm(x))), attention among the tokens of a place alone.

    (B, R, T, C) -> the same: R places of T tokens each. `mask` (B R or 1, 1, 1, T) is added to the scores.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        norm: Norm = nn.LayerNorm,
    ) -> None:
        super().__init__()
        check_heads(Site(dim, heads))
        self.heads = heads
        self.norm1 = norm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.scale1 = residual_tail(dim, layer_scale, drop_path)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.scale2 = residual_tail(dim, layer_scale, drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.scale1(self.attention(self.norm1(x), mask))
        return x + self.scale2(self.mlp(self.norm2(x)))

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv(x).flatten(0, 1).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(attend(q, k, v, mask).transpose(1, 2).reshape(x.shape))


class PatchBlock(nn.Module):
    """Tokens (B, P + N, C) as the mixer leaves them: no norm, no shortcut, no MLP."""

    def __init__(self, site: Site, mixer: nn.Module) -> None:
        super().__init__()
        self.site, self.mixer = site, mixer

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:
        return join(*self.mixer(tokens[:, count:].unflatten(1, grid), prefix=tokens[:, :count]))


def places_of(x: Tensor, side: int) -> Tensor:
    """(B, *grid, C) -> (B R, side^rank, C): the tokens of each place, row by row; of two tokens a side, by columns."""
    rank = x.ndim - 2
    return by_columns(partition(pad_to_multiple(x, (side,) * rank), (side,) * rank), side, rank)


def by_columns(tokens: Tensor, side: int, rank: int) -> Tensor:
    """The order of two tokens a side, turned (and turned back)."""
    if side != 2:
        return tokens
    return tokens.unflatten(1, (2,) * rank).permute(0, *range(rank, 0, -1), rank + 1).flatten(1, rank)


@table
def padding_mask(
    sizes: tuple[tuple[int, ...], ...], sides: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(R, 1, 1, 1 + T) -inf for the tokens of a place that are padding: of maps of `sizes`, `sides` tokens a place."""
    rows = [places_of(torch.ones(1, *size, 1, device=device, dtype=dtype), side).squeeze(-1)
            for size, side in zip(sizes, sides, strict=True)]
    valid = torch.cat([torch.ones_like(rows[0][:, :1]), *rows], 1)
    return torch.zeros_like(valid).masked_fill(valid == 0, -torch.inf)[:, None, None]


class DuoFormer(Backbone):
    """Scale and patch attention on the last `scales` maps of a backbone `trunk`, each twice as fine as the next.

    `depth` blocks of each kind, `dim` wide. Maps are those of the scale tokens of each scale, from fine to coarse; the
    coarsest is what patch attention makes of the places. `replace` is the caller's mixer across places.
    """

    prefix_count = 1
    undecayed = ("prefix", "position", "scale_token", "scale_position")

    def __init__(
        self,
        trunk: Backbone,
        dim: int,
        depth: int,
        heads: int,
        *,
        scales: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
        prefix_mode: str | None = None,
        replace: Any = None,
    ) -> None:
        super().__init__()
        size = check_sizes(num_classes, in_chans, img_size)
        widths, strides = trunk.feature_info.channels(), trunk.feature_info.reduction()
        if not 1 <= scales <= len(widths):
            raise SaccadeError(f"scales={scales} of a backbone with {len(widths)} maps: give 1 to {len(widths)}")
        widths, strides = widths[-scales:], strides[-scales:]
        self.sides = tuple(strides[-1] // stride for stride in strides)
        if any(stride * side != strides[-1] for stride, side in zip(strides, self.sides, strict=True)):
            raise SaccadeError(f"maps at strides {strides}: each has to divide the last")
        self.in_chans, self.global_pool = in_chans, global_pool
        self.grid = tuple(-(-side // strides[-1]) for side in size)
        self.trunk = trunk
        self.project = nn.ModuleList(nn.Linear(width, dim) for width in widths)
        self.scale_token = nn.Parameter(torch.zeros(1, dim))
        self.scale_position = nn.Parameter(torch.zeros(1 + sum(side ** len(size) for side in self.sides), dim))
        rates = drop_path_rates(drop_path_rate, depth)
        self.scales = nn.ModuleList(
            ScaleBlock(dim, heads, mlp_ratio, qkv_bias, layer_scale, rate) for rate in rates)
        self.prefix = nn.Parameter(torch.zeros(1, dim))
        self.position = nn.Parameter(torch.zeros(1, 1 + prod(self.grid), dim))
        build_mixer = choose_mixer(replace, partial(Attention, qkv_bias=qkv_bias))
        names = [f"blocks.{index}" for index in range(depth)]
        check_patterns(replace, names)
        blocks = []
        for index, name in enumerate(names):
            site = Site(dim, heads, 0, index, strides[-1], self.grid)
            blocks.append(PatchBlock(site, beside_prefix(build_mixer(site, name), 1, prefix_mode)))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.num_features = dim
        self.reset_classifier(num_classes)
        self.feature_info = FeatureInfo(
            dict(num_chs=dim, reduction=stride, module=f"project.{number}") for number, stride in enumerate(strides))
        self.default_out_indices = tuple(range(scales))
        for part in (self.project, self.scales, self.blocks, self.head):
            part.apply(partial(initialise, spread=0.02))
        for parameter in (self.scale_token, self.scale_position, self.prefix, self.position):
            nn.init.trunc_normal_(parameter, std=0.02)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head of `num_classes` (0: none) in place."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        if self.global_pool not in ("token", "avg"):
            raise SaccadeError(f'global_pool={self.global_pool!r}: choose "token" or "avg"')
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.removed = () if num_classes else ("head",)

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The positions of the places of a square image of another size, for this one."""
        if parameter != "position":
            return value
        square = (round((value.shape[1] - 1) ** (1 / len(self.grid))),) * len(self.grid)
        return self._position_at(value, square, self.grid) if prod(square) == value.shape[1] - 1 else value

    def _position_at(self, table: Tensor, native: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
        if is_native(grid, native):
            return table
        return torch.cat([table[:, :1], resample(table[:, 1:].unflatten(1, native), grid).flatten(1, -2)], 1)

    def places(self, image: Tensor) -> tuple[Tensor, list[tuple[int, ...]]]:
        """(B, R, 1 + T, C) after the scale blocks, the scale token first, and the grids of the maps, fine to coarse."""
        maps = [project(x.movedim(1, -1)) for project, x in
                zip(self.project, self.trunk.features(image)[-len(self.project):], strict=True)]
        B, sizes = image.shape[0], [tuple(x.shape[1:-1]) for x in maps]
        parts = [places_of(x, side).unflatten(0, (B, -1)) for x, side in zip(maps, self.sides, strict=True)]
        token = self.scale_token.expand(*parts[-1].shape[:2], 1, -1)
        x = torch.cat([token, *reversed(parts)], 2) + self.scale_position
        whole = all(isinstance(length, int) and length % side == 0
                    for size, side in zip(sizes, self.sides, strict=True) for length in size)
        mask = None
        if not whole:
            mask = padding_mask(tuple(reversed(sizes)), self.sides[::-1], x.device, x.dtype).repeat(B, 1, 1, 1)
        for block in self.scales:
            x = block(x, mask)
        return x, sizes

    def across(self, places: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The scale tokens (B, R, 1 + T, C) of all places through patch attention: (B, 1 + R, C)."""
        tokens = torch.cat([self.prefix.expand(places.shape[0], -1, -1), places[:, :, 0]], 1)
        tokens = tokens + self._position_at(self.position, self.grid, grid)
        for block in self.blocks:
            tokens = block(tokens, 1, grid)
        return tokens

    def features(self, image: Tensor) -> list[Tensor]:
        """Maps (B, C, *grid_i) of each scale from fine to coarse, the coarsest after patch attention."""
        places, sizes = self.places(image)
        tokens = self.across(places, sizes[-1])
        counts = [side ** len(self.grid) for side in reversed(self.sides)]
        pieces = places[:, :, 1:].split(counts, 2)[:0:-1]
        maps = []
        for piece, size, side in zip(pieces, sizes, self.sides, strict=False):
            window, padded = (side,) * len(size), tuple(length * side for length in sizes[-1])
            tokens_of = by_columns(piece.flatten(0, 1), side, len(size)).contiguous()
            maps.append(crop(merge(tokens_of, window, padded), size).movedim(-1, 1))
        return [*maps, tokens[:, 1:].unflatten(1, sizes[-1]).movedim(-1, 1)]

    def forward_features(self, image: Tensor) -> Tensor:
        """The class token and those of the places (B, 1 + R, C)."""
        places, sizes = self.places(image)
        return self.across(places, sizes[-1])

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Class scores from the class token, or from the norm of the mean of the places."""
        return self.head(tokens[:, 0] if self.global_pool == "token" else self.norm(tokens[:, 1:].mean(1)))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *size) -> (B, classes)."""
        return self.forward_head(self.forward_features(image))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay shall leave alone: positions and added tokens."""
        return undecayed(self)


SIZES: dict[str, dict[str, Any]] = {
    "duoformer_r18_depth2": dict(backbone="resnet18", dim=384, depth=2, heads=6, num_classes=10),
    "duoformer_nano": dict(backbone="resnet_nano", dim=32, depth=2, heads=2, scales=3, img_size=32, global_pool="avg"),
}


def duoformer(
    backbone: str,
    dim: int,
    depth: int,
    heads: int,
    scales: int = 4,
    mlp_ratio: float = 4.0,
    mixer: Any = None,
    **common: Any,
) -> DuoFormer:
    """A DuoFormer on the maps of any pyramid that `create_model` knows."""
    given: dict[str, Any] = {key: common[key] for key in ("in_chans", "img_size", "drop_path_rate") if key in common}
    trunk = create_model(backbone, num_classes=0, **given)
    return DuoFormer(trunk, dim, depth, heads, scales=scales, mlp_ratio=mlp_ratio, replace=mixer, **common)


SCALE_BLOCK: KeyMap = (
    (r"attn\.(.*)", r"\1"),
    (r"ls([12])\.(.*)", r"scale\1.0.\2"),
    (r"(norm[12]\..*|mlp\..*)", r"\1"),
)


def _names() -> KeyMap:
    rules: list[Any] = [(r"resnet_projector\.([01])\.(.*)", r"trunk.stem.\1.\2")]
    for stage in range(4):
        rules += within(BLOCK_NAMES, rf"resnet_projector\.{stage + 4}\.(\d+)\.", rf"trunk.stages.{stage}.blocks.\1.")
        rules.append((rf"resnet_projector\.{stage + 4}\.(.*)", rf"trunk.stages.{stage}.blocks.\1"))
    return (
        *rules,
        (r"projection\.proj_heads(\d)\.(weight)", r"project.\1.\2", matrix_from_1x1),
        (r"projection\.proj_heads(\d)\.(.*)", r"project.\1.\2"),
        (r"channel_token", "scale_token", lambda value: value.flatten(0, -2)),
        (r"vision_transformer\.pos_embed_for_scale", "scale_position", lambda value: value.flatten(0, -2)),
        (r"vision_transformer\.cls_token", "prefix", without_first_axis),
        (r"vision_transformer\.pos_embed", "position"),
        *within(SCALE_BLOCK, r"vision_transformer\.scaleBlocks\.(\d+)\.", r"scales.\1."),
        (r"vision_transformer\.blocks\.(\d+)\.attn\.(.*)", r"blocks.\1.mixer.\2"),
        (r"vision_transformer\.fc_norm\.(.*)", r"norm.\1"),
        (r"vision_transformer\.head\.(.*)", r"head.\1"),
    )


AUTHORS: KeyMap = _names()


def TAPS(name: str) -> dict[str, str]:  # noqa: N802 - the name that papers' tables of taps have
    return {r"scale(\d+)": r"scales.\1", "scale_last": f"scales.{SIZES[name]['depth'] - 1}",
            r"patch(\d+)": r"blocks.\1", "patch_last": f"blocks.{SIZES[name]['depth'] - 1}"}
