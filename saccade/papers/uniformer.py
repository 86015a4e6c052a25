"""UniFormer: nearby relations are learned once, distant ones are looked up.

Every block adds a convolutional position, relates tokens and mixes channels,
    x += conv(x);   x += relate(norm(x));   x += mlp(norm(x)).
In early stages the affinity of two tokens depends on their offset alone, relate(x) = proj((A * value(x))) with a 5^n
depthwise kernel A (a local relation); in late stages it is softmax attention over all tokens, in a video over space and
time at once. The light models keep in late stages only the tokens that a class token looks at most: the others are
represented by their mean, weighed by the same scores, and receive the updates of that representative.

Li et al., "UniFormer: Unifying Convolution and Self-attention for Visual Recognition", 2022, sections 3 and 4.
Li et al., "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning", 2022 (video).

Any grid: a last odd row or column is left out between stages, as in the authors' dense-prediction code; a side of one
token is zero-padded to two. Video has size (T, H, W): T is halved once, by the stem.
Quirks kept: norms are batch norms before local relations and layer norms of eps 1e-6 before attention; layer scale
stands in attention blocks alone; the divided variant's temporal attention has a residual of its own and reaches the
map only through the input of the spatial one; light models classify by the mean of the map, in training the class
token too. A light block whose mixer the caller replaces keeps all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, Rule, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.window import pad_end
from saccade.parts.attention import Attention
from saccade.parts.axes import AxesAttention
from saccade.parts.block import LAYER_NORM, Block, DropPath
from saccade.parts.convolution import conv_norm, depthwise, grid_conv
from saccade.parts.head import Head, LabelledHead
from saccade.parts.mlp import Gelu, Mlp
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem

_DRIVE = "https://drive.google.com/file/d/"

CARD = Card(
    "UniFormer: Unifying Convolution and Self-attention for Visual Recognition",
    authors="Li, Wang, Zhang, Gao, Song, Liu, Li, Qiao",
    year=2022,
    systems=("uniformer",),
    arxiv="2201.09450, 2201.04676",
    code="Sense-X/UniFormer@52a0415",
    licence="Apache-2.0",
    read="paper, code",
    keywords="local and global relation aggregator, convolution and attention hybrid, dynamic position embedding, "
             "video, divided space-time attention, token pruning",
    kinds=("backbone", "mixer"),
    mixers={"local_relation": "LocalRelation"},
    params={"uniformer_small": 22e6, "uniformer_small_plus": 24e6, "uniformer_small_plus_dim64": 24e6,
            "uniformer_base": 50e6, "uniformer_base_ls": 50e6, "uniformer_large_ls": 100e6, "uniformer_xxs": 10.2e6,
            "uniformer_xs": 16.5e6, "uniformer_video_small": 21.4e6, "uniformer_video_base": 49.8e6},
    macs={"uniformer_small": 3.6e9, "uniformer_small_plus": 4.2e9, "uniformer_small_plus_dim64": 4.2e9,
          "uniformer_base": 8.3e9, "uniformer_base_ls": 8.3e9, "uniformer_xxs": 1.3e9, "uniformer_xs": 2.0e9,
          "uniformer_video_small": 41.8e9, "uniformer_video_base": 96.7e9},
    top1={"uniformer_small": 82.9, "uniformer_small_plus": 83.4, "uniformer_small_plus_dim64": 83.4,
          "uniformer_base": 83.8, "uniformer_base_ls": 83.9, "uniformer_large_ls": 85.6, "uniformer_xxs": 80.6,
          "uniformer_xs": 82.0},
    weights={
        name: Weights(f"hf:Sense-X/uniformer_image/{name}_in1k.pth", licence="MIT")
        for name in ("uniformer_small", "uniformer_small_plus", "uniformer_base")
    } | {  # the large one learnt from token labels
        "uniformer_base_ls": Weights(f"{_DRIVE}10FnwzMVgGL8bPO3EMZ7oG4vDvqnPoBK5/view?usp=sharing", licence="MIT"),
        "uniformer_large_ls": Weights(f"{_DRIVE}173e2qaJhOwbuC_DbNQSH47Oo_04mSfDj/view?usp=sharing", licence="MIT"),
    },
    goldens=("uniformer_small", "uniformer_xxs", "uniformer_video_small", "op_uniformer_c_block",
             "op_uniformer_sa_block", "op_uniformer_video_c_block", "op_uniformer_video_sa_block",
             "op_uniformer_video_split_sa_block"),
    tests=("tests/papers/test_uniformer.py",),
)

Grid = tuple[int, ...]


class LocalRelation(nn.Module):
    """proj(affinity * value(x)): a learned affinity a channel and offset, `kernel` tokens a side, no softmax."""

    ranks = (1, 2, 3)
    template = Template("w[j - i], a number a channel and offset", "none", "sum of v")

    def __init__(self, site: Site, kernel: int = 5) -> None:
        super().__init__()
        self.kernel = kernel
        self.value = nn.Linear(site.dim, site.dim)
        self.affinity = depthwise(site.rank, site.dim, kernel)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.affinity(self.value(x)))

    def cost(self, site: Site, grid: Grid) -> int:
        """Multiply-adds of N tokens: 2 N C^2 + N C kernel^rank."""
        return prod(grid) * site.dim * (2 * site.dim + self.kernel ** len(grid))

    def reach(self, site: Site) -> Grid:
        return (self.kernel // 2,) * site.rank


class DividedBlock(Block):
    """x += position(x); x += in_frames(norm(x + in_time(norm(x)))); x += mlp(norm(x)): time is the first axis."""

    def __init__(self, site: Site, mixer: nn.Module, *, drop_path: float = 0.0, **options: Any) -> None:
        super().__init__(site, mixer, drop_path=drop_path, **options)
        self.norm_time = LAYER_NORM(site.dim)
        self.time = AxesAttention(site, (0,))
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()
        for parameter in (self.time.qkv.weight, self.time.qkv.bias, self.time.proj.bias):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.time.proj.weight)  # not zero too: the gradient of both would be

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.position is not None:
            x = x + self.position(x)
        seen = x + self.drop(self.time(self.norm_time(x)))
        x = x + self.scale1(self.mixer(self.norm1(seen)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class ScoredAttention(Attention):
    """Attention over (B, N, C) that also gives the weights of its first token, the mean over heads: (B, N)."""

    prefix = False

    def forward(self, x: Tensor, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """`numbers` (B, N): which token of the grid stands where, -1 for one that is none (for `record`)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, where=None if numbers is None else lambda: (numbers, numbers))
        logits = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return self.proj(out.transpose(1, 2).flatten(2)), logits.softmax(-1).mean(1).squeeze(1)


class PruningBlock(Block):
    """A block for a map, a class token (B, 1, C) and the scores (B, N) of the map's tokens, None before the first.

    Without scores, or with `keep` 1, all tokens take part and are scored: s = (1 - pace) s + pace a, with the class
    token's attention a. Else floor(keep N) tokens of the highest scores do, beside r = sum(s x) / sum(s) of the others,
    which all receive what r did.
    """

    def __init__(
        self, site: Site, mixer: nn.Module, *, keep: float = 1, pace: float = 1, drop_path: float = 0.0, **options: Any
    ) -> None:
        super().__init__(site, mixer, **options)
        self.keep, self.pace = Fraction(keep).limit_denominator(1000), pace
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(  # type: ignore[override]
        self, x: Tensor, token: Tensor, scores: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        grid = tuple(x.shape[1:-1])
        if self.position is not None:
            x = x + self.position(x)
        if not isinstance(self.mixer, ScoredAttention):
            x = x + self.drop(self.scale1(self.mixer(self.norm1(x))))
            return x + self.drop(self.scale2(self.mlp(self.norm2(x)))), token, scores
        x = x.flatten(1, -2)
        numbers = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        outside = numbers.new_full((x.shape[0], 1), -1)
        if scores is None or self.keep == 1:
            seen, attention, _ = self.update(torch.cat([token, x], 1), torch.cat([outside, numbers], 1))
            attention = attention[:, 1:]
            scores = attention if scores is None else scores + self.pace * (attention - scores)
            return seen[:, 1:].unflatten(1, grid), seen[:, :1], scores
        count = x.shape[1] * self.keep.numerator // self.keep.denominator
        chosen = scores.topk(count).indices
        rest = scores.scatter(1, chosen, 0.0)
        mean = (rest / rest.sum(1, keepdim=True)).unsqueeze(1).to(x.dtype) @ x
        places = chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        seen = torch.cat([token, x.gather(1, places), mean.to(x.dtype)], 1)
        seen, attention, change = self.update(seen, torch.cat([outside, chosen, outside], 1))
        kept = scores.gather(1, chosen)
        scores = scores.scatter(1, chosen, kept + self.pace * (attention[:, 1:-1].to(kept.dtype) - kept))
        x = x + change[:, -1:].to(x.dtype)
        x = x.scatter(1, places, seen[:, 1:-1].to(x.dtype))
        return x.unflatten(1, grid), seen[:, :1], scores

    def update(self, seen: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both residual branches: the tokens, the class token's attention, the sum of both changes (never dropped)."""
        mixed, attention = self.mixer(self.norm1(seen), numbers)
        first = self.scale1(mixed)
        seen = seen + self.drop(first)
        second = self.scale2(self.mlp(self.norm2(seen)))
        return seen + self.drop(second), attention, first + second


class Patches(nn.Module):
    """norm(conv(x)) on patches of `side`; in a video the time axis has kernel and stride of its own."""

    def __init__(
        self, rank: int, dim: int, out_dim: int, side: int = 2, time_kernel: int = 1, time_stride: int = 1
    ) -> None:
        super().__init__()
        self.side = side
        images = min(rank, 2)
        kernel, stride, padding = (((time,) if rank == 3 else ()) + (each,) * images
                                   for time, each in ((time_kernel, side), (time_stride, side), (time_kernel // 2, 0)))
        self.proj = grid_conv(rank, dim, out_dim, kernel, stride=stride, padding=padding)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        sides = x.shape[1:-1]
        short = [max(0, self.side - side) if isinstance(side, int) else 0 for side in sides[-2:]]
        return self.norm(self.proj(pad_end(x, [0] * (len(sides) - len(short)) + short)))


class LightUniFormer(Pyramid):
    """A UniFormer whose last two stages prune tokens, with a class token beside them that enters the last but one.

    In training, forward returns a dict of the map's `scores` and the class token's `class_scores`.
    """

    undecayed = ("class_token",)

    def __init__(self, dims: Sequence[int], *args: Any, **options: Any) -> None:
        super().__init__(dims, *args, **options)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dims[-2]))
        self.widen = nn.Linear(dims[-2], dims[-1])
        self.norm_class = nn.LayerNorm(dims[-1])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_class = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.removed = () if num_classes else ("head.fc", "head_class")

    def maps(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """The map (B, *grid, C) after each stage, and the class token (B, 1, C)."""
        maps, x = [], self.stem(image)
        for stage in self.stages[:-2]:
            x = stage(x)
            maps.append(x)
        token, scores = self.class_token.repeat(image.shape[0], 1, 1), None
        for stage in self.stages[-2:]:
            if len(maps) == len(self.stages) - 1:
                token = self.widen(token)
                scores = pooled(scores, tuple(x.shape[1:-1])) if scores is not None else None
            x = stage.downsample(x)  # type: ignore[operator]
            for block in stage.blocks:  # type: ignore[union-attr]
                x, token, scores = block(x, token, scores)
            maps.append(x)
        return maps, token

    def features(self, image: Tensor) -> list[Tensor]:
        return [x.movedim(-1, 1) for x in self.maps(image)[0]]

    def forward_features(self, image: Tensor) -> Tensor:
        return self.norm(self.maps(image)[0][-1]).movedim(-1, 1)

    def forward(self, image: Tensor) -> Any:
        if not self.training:
            return super().forward(image)
        maps, token = self.maps(image)
        return {"scores": self.head(self.norm(maps[-1])), "class_scores": self.head_class(self.norm_class(token)[:, 0])}


def pooled(scores: Tensor, grid: Grid) -> Tensor:
    """Scores (B, N) of a grid as those of its 2x2 patches (frames apart), their sum kept."""
    rank = len(grid)
    values = scores.unflatten(1, grid).unsqueeze(-1)
    short = [max(0, 2 - side) if isinstance(side, int) else 0 for side in grid[-2:]]
    values = pad_end(values, [0] * (rank - len(short)) + short).squeeze(-1)
    values = F.avg_pool1d(values, 2) if rank == 1 else F.avg_pool2d(values, 2)
    values = values.flatten(1)
    return values * (scores.sum(1, keepdim=True) / values.sum(1, keepdim=True))


_HALF = (1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
_S: dict[str, Any] = dict(dims=(64, 128, 320, 512), depths=(3, 4, 8, 3))
_PLUS: dict[str, Any] = dict(dims=(64, 128, 320, 512), depths=(3, 5, 9, 3), conv_stem=True, conv_merging=True)
_B: dict[str, Any] = dict(dims=(64, 128, 320, 512), depths=(5, 8, 20, 7))
_XXS: dict[str, Any] = dict(dims=(56, 112, 224, 448), depths=(2, 5, 8, 2), head_dim=28, ratio=3, conv_stem=True,
                            keep=(_HALF[:8], _HALF[1:3]), pace=(_HALF[:8], _HALF[1:3]))
_XS: dict[str, Any] = dict(dims=(64, 128, 256, 512), depths=(3, 5, 9, 3), head_dim=32, ratio=3, conv_stem=True,
                           keep=(_HALF, _HALF[1:4]), pace=(_HALF, _HALF[1:4]))
_VIDEO: dict[str, Any] = dict(num_classes=400, img_size=(16, 224, 224))
_NANO: dict[str, Any] = dict(dims=(32, 64, 128), depths=(1, 2, 2), head_dim=16, local=1, patch=2, img_size=32)
SIZES: dict[str, dict[str, Any]] = {
    "uniformer_small": _S,
    "uniformer_small_plus": _PLUS | dict(head_dim=32),
    "uniformer_small_plus_dim64": _PLUS,
    "uniformer_base": _B,
    "uniformer_base_ls": _B | dict(layer_scale=1e-6),
    "uniformer_large_ls": dict(dims=(128, 192, 448, 640), depths=(5, 10, 24, 7), layer_scale=1e-6, token_labels=True),
    "uniformer_xxs": _XXS,
    "uniformer_xs": _XS,
    "uniformer_video_small": _S | _VIDEO,
    "uniformer_video_base": _B | _VIDEO,
    "uniformer_nano": _NANO,
    "uniformer_light_nano": _NANO | dict(conv_stem=True, keep=((1, 0.5), (0.5, 0.5)), pace=((1, 0.5), (0.5, 0.5))),
}


def uniformer(
    dims: Sequence[int],
    depths: Sequence[int],
    head_dim: int = 64,
    ratio: float = 4,
    local: int = 2,
    patch: int = 4,
    conv_stem: bool = False,
    conv_merging: bool = False,
    layer_scale: float | None = None,
    token_labels: bool = False,
    keep: Sequence[Sequence[float]] | None = None,
    pace: Sequence[Sequence[float]] = (),
    divided: bool = False,
    time_kernel: int = 1,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A UniFormer of a size, its first `local` stages with local relations.

    `keep` and `pace` (one a block of the last two stages) make it a light one. For videos, `divided` takes attention in
    time and in frames apart, and `time_kernel` is that of the merging between stages (1 or 3).
    """
    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        if not conv_stem:
            return ConvStem(Patches(rank, in_chans, dim, patch, time_kernel=3, time_stride=2))
        strides = [(1, 2, 2), (2, 2, 2)] if rank == 3 else [2, 2]
        widths = [in_chans, dim // 2, dim] if patch == 4 else [in_chans, dim]
        layers = [layer for sizes in zip(widths, widths[1:], strict=False)
                  for layer in (*conv_norm(rank, *sizes, stride=strides.pop(0), bias=True), Gelu())]
        return ConvStem(*layers[:-1])

    def merging(rank: int, dim: int, out_dim: int) -> nn.Module:
        if conv_merging:
            return nn.Sequential(*conv_norm(rank, dim, out_dim, stride=2, bias=True))
        return Patches(rank, dim, out_dim, time_kernel=time_kernel)

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        shared: dict[str, Any] = dict(drop_path=drop_path, mlp=partial(Mlp, ratio=ratio),
                                      position=depthwise(site.rank, site.dim, 3))
        if site.stage < local:
            return Block(site, mixer, norm=BatchNorm, **shared)
        if keep is not None:
            place = site.stage - len(depths) + 2
            return PruningBlock(site, mixer, keep=keep[place][site.index], pace=pace[place][site.index],
                                layer_scale=layer_scale, **shared)
        return (DividedBlock if divided else Block)(site, mixer, layer_scale=layer_scale, **shared)

    attention: Any = ScoredAttention if keep is not None else Attention
    if divided:
        attention = partial(AxesAttention, axes=(1, 2))
    return (Pyramid if keep is None else LightUniFormer)(
        dims, depths, [max(dim // head_dim, 1) for dim in dims], stem=stem, stride=patch, downsample=merging,
        block=block, mixer=[LocalRelation if stage < local else attention for stage in range(len(depths))],
        norm=BatchNorm, head=LabelledHead if token_labels else Head, replace=mixer, **common,
    )


def _convolved(theirs: str, ours: str) -> list[Rule]:
    """A 1x1 convolution, or a linear layer already, as a linear layer."""
    return [(theirs + r"\.weight", ours + ".weight", matrix_from_1x1), (theirs + r"\.bias", ours + ".bias")]


BLOCK: KeyMap = (
    (r"pos_embed\.(.*)", r"position.\1"),
    *_convolved("conv1", "mixer.value"),
    *_convolved("conv2", "mixer.proj"),
    *_convolved(r"mlp\.fc1", "mlp.fc1"),
    *_convolved(r"mlp\.fc2", "mlp.fc2"),
    (r"attn\.(weight|bias)", r"mixer.affinity.\1"),
    (r"attn\.(.*)", r"mixer.\1"),
    (r"t_attn\.(.*)", r"time.\1"),
    (r"t_norm\.(.*)", r"norm_time.\1"),
    (r"gamma_(\d)", r"scale\1.0.gamma", torch.flatten),
    (r"(norm\d\..*)", r"\1"),
)
AUTHORS: KeyMap = (
    *(rule for stage in range(4) for rule in (
        *within(BLOCK, rf"blocks{stage + 1}\.(\d+)\.", rf"stages.{stage}.blocks.\1."),
        (rf"patch_embed{stage + 1}\.proj\.(\d+\..*)", rf"stages.{stage}.downsample.\1" if stage else r"stem.\1"),
        (rf"patch_embed{stage + 1}\.(.*)", rf"stages.{stage}.downsample.\1" if stage else r"stem.0.\1"))),
    (r"cls_token", "class_token"),
    (r"cls_upsample\.(.*)", r"widen.\1"),
    (r"norm_cls\.(.*)", r"norm_class.\1"),
    (r"head_cls\.(.*)", r"head_class.\1"),
    (r"aux_head\.(.*)", r"head.fc.tokens.\1"),
    (r"head\.(.*)", r"head.fc.\1"),
)
TAPS = {f"stage{number}": f"stages.{number - 1}" for number in range(1, 5)}
