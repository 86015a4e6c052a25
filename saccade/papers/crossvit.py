"""CrossViT: two ViTs, of small and of large patches, that talk through their class tokens.

Each branch has its own patches, width and blocks. After some of them, the class token of a branch goes to the other as
the only query of a cross-attention, and comes back with what it saw there:
    c' = f(c_i),    c' += proj(softmax(q(c') k([c', X_j])^T / sqrt(d)) v([c', X_j])),    c_i = g(c'),
f and g norm-GELU-linear from width to width, X_j the patch tokens of the other branch; linear in their number. The
scores of the two class tokens are averaged.

Chen, Fan, Panda, "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", 2021, section 3.

Any grid: both branches see the same image, resized (bicubic) so that their patches fit: at 224 pixels the branch of 12
pixels a patch sees 240. Other images are resized in that proportion, up to whole patches, and the position tables
resampled (bicubic); `fixed=True` resizes every image to the native sides, as the authors' code does.
Quirks kept: an image of 240 pixels is what one of 224 is, for the branches resize it alike; no MLP follows the
cross-attention; the class token that comes back replaces the one that left, with no shortcut between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.keymap import KeyMap, within, without_first_axis
from saccade.core.site import Site
from saccade.ops.sizes import ceil_div
from saccade.parts.attention import Attention
from saccade.parts.block import LAYER_NORM, DropPath, Norm
from saccade.parts.class_attention import ClassAttention
from saccade.parts.convolution import grid_conv
from saccade.parts.head import pool_tokens, pooling
from saccade.parts.mlp import Mlp
from saccade.parts.plain import TokenBlock, beside_prefix, initialise
from saccade.parts.position import MODES, is_native, resample
from saccade.parts.pyramid import check_sizes, drop_path_rates, undecayed
from saccade.parts.stem import ConvStem, PatchEmbed
from saccade.parts.tokens import join

_ADDRESS = "https://github.com/IBM/CrossViT/releases/download/weights-0.1/"
_PUBLISHED = {  # parameters, multiply-adds, top-1
    "crossvit_tiny": (6.9e6, 1.6e9, 73.4),
    "crossvit_small": (26.7e6, 5.6e9, 81.0),
    "crossvit_base": (104.7e6, 21.2e9, 82.2),
    "crossvit_9": (8.6e6, 1.8e9, 73.9),
    "crossvit_15": (27.4e6, 5.8e9, 81.5),
    "crossvit_18": (43.3e6, 9e9, 82.5),
    "crossvit_9_dagger": (8.8e6, 2e9, 77.1),
    "crossvit_15_dagger": (28.2e6, 6.1e9, 82.3),
    "crossvit_18_dagger": (44.3e6, 9.5e9, 82.8),
    "crossvit_15_dagger_384": (28.5e6, 21.4e9, 83.5),
    "crossvit_18_dagger_384": (44.6e6, 32.4e9, 83.9),
}
_AT_224 = tuple(name for name in _PUBLISHED if not name.endswith("384"))

CARD = Card(
    "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
    authors="Chen, Fan, Panda",
    year=2021,
    systems=("crossvit",),
    arxiv="2103.14899",
    code="IBM/CrossViT@3f7ab77",
    licence="Apache-2.0",
    weights_licence="Apache-2.0",
    read="paper, code",
    keywords="two branches, multi-scale, cross-attention between branches, class token as query, token fusion",
    kinds=("backbone",),
    params={name: row[0] for name, row in _PUBLISHED.items()},
    macs={name: row[1] for name, row in _PUBLISHED.items()},
    top1={name: row[2] for name, row in _PUBLISHED.items()},
    aliases={
        **{f"{name}_{side}": name for name in _AT_224 for side in (224, 240)},
        **{f"crossvit_{depth}_dagger_408": f"crossvit_{depth}_dagger_384" for depth in (15, 18)},
    },
    weights={
        name: Weights(f"{_ADDRESS}{name}{'_224' if name in _AT_224 else ''}.pth", licence="Apache-2.0",
                      crop=0.875 if name in _AT_224 else 1.0)
        for name in _PUBLISHED
    },
    goldens=("crossvit_tiny", "op_crossvit_cross_attention", "op_crossvit_multi_scale_block"),
    tests=("tests/papers/test_crossvit.py",),
)


def conv_patches(rank: int, in_chans: int, dim: int, patch: int) -> ConvStem:
    """Three convolutions in place of one, for patches of 12 or 16: the models with a dagger."""
    steps: dict[int, list[tuple[int, int]]] = {12: [(3, 0), (1, 1)], 16: [(2, 1), (2, 1)]}  # stride, padding
    if patch not in steps:
        raise SaccadeError(f"patch={patch}: convolutional patches are known for {sorted(steps)} pixels")
    (stride1, border1), (stride2, border2) = steps[patch]
    return ConvStem(
        grid_conv(rank, in_chans, dim // 4, 7, stride=4, padding=3), nn.ReLU(),
        grid_conv(rank, dim // 4, dim // 2, 3, stride=stride1, padding=border1), nn.ReLU(),
        grid_conv(rank, dim // 2, dim, 3, stride=stride2, padding=border2),
    )


class Branch(nn.Module):
    """What a branch sees of an image: (B, C, *size) -> tokens (B, 1 + N, dim), class token first, and their grid.

    The image is resized by side / base. A side of `twin` pixels, the other branch's own, counts as one of `base`.
    """

    undecayed = ("prefix", "position")

    def __init__(
        self, size: tuple[int, ...], in_chans: int, dim: int, patch: int, side: int, base: int, twin: int,
        convolutions: bool, fixed: bool,
    ) -> None:
        super().__init__()
        self.patch, self.side, self.base, self.twin = patch, side, base, twin
        native = self.resized(size)
        self.fixed = native if fixed else None
        self.grid = tuple(length // patch for length in native)
        if convolutions:
            self.embed: nn.Module = conv_patches(len(size), in_chans, dim, patch)
        else:
            self.embed = PatchEmbed(len(size), in_chans, dim, stride=patch)
        self.prefix = nn.Parameter(torch.empty(1, dim))
        self.position = nn.Parameter(torch.empty(1, 1 + prod(self.grid), dim))
        nn.init.trunc_normal_(self.prefix, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)

    def resized(self, size: Sequence[int]) -> tuple[int, ...]:
        """The size at which this branch sees an image. (A size that export leaves open is not taken for the twin.)"""
        sides = []
        for length in size:
            if isinstance(length, int) and length == self.twin:
                length = self.base
            sides.append(ceil_div(length * self.side, self.base * self.patch) * self.patch)
        return tuple(sides)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        size = tuple(image.shape[2:])
        wanted = self.resized(size) if self.fixed is None else self.fixed
        if not is_native(size, wanted):
            image = F.interpolate(image, size=wanted, mode=MODES[len(size)], align_corners=False)
        x = self.embed(image)
        grid = tuple(x.shape[1:-1])
        position = self.position if is_native(grid, self.grid) else self._position_at(self.position, self.grid, grid)
        return join(x, self.prefix.expand(x.shape[0], -1, -1)) + position, grid

    def _position_at(self, table: Tensor, native: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
        moved = resample(table[:, 1:].unflatten(1, native), grid).flatten(1, -2)
        return torch.cat([table[:, :1], moved], 1)

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The position table of a square grid of another side, for this grid."""
        if parameter != "position":
            return value
        side = round((value.shape[1] - 1) ** (1 / len(self.grid)))
        square = (side,) * len(self.grid)
        return self._position_at(value, square, self.grid) if prod(square) == value.shape[1] - 1 else value


class Crossing(nn.Module):
    """g(c' + attention(norm([c', X]))), c' = f(c): a class token (B, 1, dim) among tokens X (B, N, other) and back.

    (Chen et al., CrossViT, 2021, equations 2-5.)
    """

    def __init__(
        self, dim: int, other: int, heads: int, qkv_bias: bool = True, drop_path: float = 0.0, norm: Norm = LAYER_NORM
    ) -> None:
        super().__init__()
        self.go = nn.Sequential(norm(dim), nn.GELU(), nn.Linear(dim, other))
        self.norm = norm(other)
        self.attention = ClassAttention(other, heads, qkv_bias)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.back = nn.Sequential(norm(other), nn.GELU(), nn.Linear(other, dim))

    def forward(self, token: Tensor, others: Tensor) -> Tensor:
        token = self.go(token)
        seen = self.attention(self.norm(torch.cat([token, others], 1)))
        return self.back(token + self.drop_path(seen))


class MultiScale(nn.Module):
    """Blocks in every branch, then the class token of each through the branch after it.

    Tokens (B, 1 + N_i, C_i), a tuple of one a branch, in and out; `grids` tells the grid of each.
    """

    def __init__(self, branches: Sequence[Sequence[nn.Module]], crossings: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.ModuleList(blocks) for blocks in branches)
        self.crossings = nn.ModuleList(crossings)

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        mixed = []
        for blocks, x, grid in zip(self.branches, tokens, grids, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, 1, grid)
            mixed.append(x)
        return tuple(
            torch.cat([crossing(x[:, :1], mixed[(number + 1) % len(mixed)][:, 1:]), x[:, 1:]], 1)
            for number, (crossing, x) in enumerate(zip(self.crossings, mixed, strict=True))
        )


class CrossViT(Backbone):
    """Two branches of `patches` pixels a patch, which see `img_size` resized to `sides`, in multi-scale blocks.

    `dims`, `heads`, `mlp_ratios`, `patches`, `sides` have an entry a branch, the finer one first; `depths` one a
    multi-scale block and branch. Maps are those of the finer branch after each multi-scale block, then those of the
    coarser one. The finer one's stride is rounded: 11 for 11.2 pixels.
    """

    prefix_count = 1

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[Sequence[int]],
        heads: Sequence[int],
        *,
        mlp_ratios: Sequence[float],
        patches: Sequence[int],
        sides: Sequence[int],
        convolutions: bool = False,
        qkv_bias: bool = True,
        fixed: bool = False,
        norm: Norm = LAYER_NORM,
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
        self.in_chans, self.global_pool = in_chans, global_pool
        count = range(len(dims))
        stems = [Branch(size, in_chans, dims[i], patches[i], sides[i], sides[-1], sides[0], convolutions, fixed)
                 for i in count]
        self.stem = nn.ModuleList(stems)
        grids = [branch.grid for branch in stems]
        strides = [round(patches[i] * sides[-1] / sides[i]) for i in count]
        rates = drop_path_rates(drop_path_rate, sum(map(max, depths)))
        build_mixer = choose_mixer(replace, partial(Attention, qkv_bias=qkv_bias))
        stages, names = [], []
        for stage, depth in enumerate(depths):
            own = [rates.pop(0) for _ in range(max(depth))]
            branches: list[list[nn.Module]] = [[] for _ in count]
            for i in count:
                for index in range(depth[i]):
                    site = Site(dims[i], heads[i], stage, index, strides[i], grids[i])
                    names.append(f"stages.{stage}.branches.{i}.{index}")
                    mixer = beside_prefix(build_mixer(site, names[-1]), 1, prefix_mode)
                    branches[i].append(TokenBlock(site, mixer, drop_path=own[index], norm=norm,
                                                  mlp=partial(Mlp, ratio=mlp_ratios[i])))
            following = [(i + 1) % len(dims) for i in count]
            stages.append(MultiScale(branches, [
                Crossing(dims[i], dims[j], heads[j], qkv_bias, own[-1], norm) for i, j in enumerate(following)]))
        check_patterns(replace, names)
        self.stages = nn.ModuleList(stages)
        self.norm = nn.ModuleList(norm(dim) for dim in dims)
        self.dims, self.num_features = tuple(dims), sum(dims)
        self.reset_classifier(num_classes)
        self.feature_info = FeatureInfo(
            dict(num_chs=dims[i], reduction=strides[i], module=f"stages.{stage}")
            for i in count for stage in range(len(depths))
        )
        self.default_out_indices = tuple(len(depths) * (i + 1) - 1 for i in count)
        self.apply(partial(initialise, spread=0.02))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put new heads of `num_classes` (0: none; the branches' tokens are then joined) in place."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        if self.global_pool == "":
            raise SaccadeError('global_pool="": choose "token" or a pooling; two branches have two maps')
        token = self.global_pool == "token"
        self.pools = None if token else nn.ModuleList(pooling(self.global_pool, dim) for dim in self.dims)
        self.num_classes = num_classes
        self.head = nn.ModuleList(nn.Linear(dim, num_classes) for dim in self.dims) if num_classes else None
        self.removed = () if num_classes else ("head",)

    def scales(self, image: Tensor) -> tuple[list[tuple[Tensor, ...]], list[tuple[int, ...]]]:
        """The tokens of all branches after each multi-scale block, and their grids."""
        embedded = [branch(image) for branch in self.stem]
        tokens, grids = tuple(x for x, _ in embedded), [grid for _, grid in embedded]
        after = []
        for stage in self.stages:
            tokens = stage(tokens, grids)
            after.append(tokens)
        return after, grids

    def features(self, image: Tensor) -> list[Tensor]:
        """The maps (B, C_i, *grid_i) of the first branch after each multi-scale block, then of the second."""
        after, grids = self.scales(image)
        return [tokens[i][:, 1:].unflatten(1, grid).movedim(-1, 1) for i, grid in enumerate(grids) for tokens in after]

    def forward_features(self, image: Tensor) -> list[Tensor]:
        """The sequence (B, 1 + N_i, C_i) of each branch after its final norm."""
        after, _ = self.scales(image)
        return [norm(x) for norm, x in zip(self.norm, after[-1], strict=True)]

    def forward_head(self, tokens: Sequence[Tensor]) -> Tensor:
        """The mean of the branches' class scores, each from its class token (or its pooled patch tokens)."""
        pooled = [pool_tokens(x, self.global_pool, 1, self.pools[number] if self.pools is not None else None)
                  for number, x in enumerate(tokens)]
        if self.head is None:
            return torch.cat(pooled, -1)
        return torch.stack([fc(x) for fc, x in zip(self.head, pooled, strict=True)]).mean(0)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *size) -> (B, classes)."""
        return self.forward_head(self.forward_features(image))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay shall leave alone: position tables and class tokens."""
        return undecayed(self)


def _sizes() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {
        f"crossvit_{size}": dict(dim=32 * heads, heads=heads, depth=4)
        for size, heads in (("tiny", 3), ("small", 6), ("base", 12))
    }
    for depth, heads in ((9, 4), (15, 6), (18, 7)):
        plain = dict(dim=32 * heads, heads=heads, depth=depth // 3, mlp_ratio=3.0)
        table |= {f"crossvit_{depth}": plain, f"crossvit_{depth}_dagger": plain | dict(convolutions=True)}
        if depth > 9:
            table[f"crossvit_{depth}_dagger_384"] = plain | dict(convolutions=True, sides=(408, 384), img_size=384)
    return table | {
        "crossvit_nano": dict(dim=16, heads=2, depth=1, patches=(3, 4), sides=(60, 40), mlp_ratio=2.0, img_size=40),
    }


SIZES = _sizes()


def crossvit(
    dim: int,
    heads: int,
    depth: int,
    mlp_ratio: float = 4.0,
    patches: tuple[int, int] = (12, 16),
    sides: tuple[int, int] = (240, 224),
    convolutions: bool = False,
    fixed: bool = False,
    mixer: Any = None,
    **common: Any,
) -> CrossViT:
    """A CrossViT of a size: three multi-scale blocks of 1 and `depth` blocks; the coarser branch is twice as wide.

    `convolutions` embed the patches in the models with a dagger; `fixed` resizes every image to the native sides.
    """
    return CrossViT((dim, 2 * dim), ((1, depth),) * 3, (heads, heads), mlp_ratios=(mlp_ratio, mlp_ratio),
                    patches=patches, sides=sides, convolutions=convolutions, fixed=fixed, replace=mixer, **common)


CROSS_ATTENTION: KeyMap = (
    (r"wq\.(.*)", r"q.\1"),
    (r"wk\.(.*)", r"kv.\1#0"),
    (r"wv\.(.*)", r"kv.\1#1"),
    (r"(proj\..*)", r"\1"),
)
MULTI_SCALE: KeyMap = (
    (r"blocks\.(\d+)\.(\d+)\.attn\.(.*)", r"branches.\1.\2.mixer.\3"),
    (r"blocks\.(.*)", r"branches.\1"),
    (r"projs\.(\d+)\.(.*)", r"crossings.\1.go.\2"),
    (r"revert_projs\.(\d+)\.(.*)", r"crossings.\1.back.\2"),
    *within(CROSS_ATTENTION, r"fusion\.(\d+)\.(?:0\.)?attn\.", r"crossings.\1.attention."),
    (r"fusion\.(\d+)\.(?:0\.)?norm1\.(.*)", r"crossings.\1.norm.\2"),
)
# timm's names differ in `cls_token_0`, `pos_embed_0` alone.
AUTHORS: KeyMap = (
    (r"patch_embed\.(\d)\.proj\.(weight|bias)", r"stem.\1.embed.proj.\2"),
    (r"patch_embed\.(\d)\.proj\.(.*)", r"stem.\1.embed.\2"),
    (r"cls_token[._](\d)", r"stem.\1.prefix", without_first_axis),
    (r"pos_embed[._](\d)", r"stem.\1.position"),
    *within(MULTI_SCALE, r"blocks\.(\d+)\.", r"stages.\1."),
)
TAPS = {r"block(\d+)": r"stages.\1"}
