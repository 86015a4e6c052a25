"""OverLoCK: overview first, look closely next, with kernels that mix context.

A Base-Net encodes the image; its last stage, coarse and cheap, is the overview. A Focus-Net then runs over the middle
map once more with the overview joined to the channels, and its dynamic convolution (ContMix) writes a k x k kernel for
every token from that token's affinity to a 7 x 7 summary of the context,
    A_i = q_i . pool7x7(k)^T,   w_i = softmax(W A_i + b[j - i]),   out_i = sum_{j in N(i)} w_ij v_j,
one half of the heads with 5 x 5 kernels, the other with large ones. Depthwise convolutions have UniRepLKNet's dilated
branches, which merge for deployment (`reparameterize(model)`).

Lou, Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", 2025.

Any grid: one with a side under the kernel is enlarged (bilinear) for the dynamic convolution and averaged back, as in
the authors' code. Quirks kept: `num_heads` is doubled inside; layer scale has a bias and stands on the shortcut; the
auxiliary head on the overview exists for training alone (`forward_auxiliary`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.core.names import matching
from saccade.core.site import Site
from saccade.parts.block import LAYER_NORM, Affine, residual_tail
from saccade.parts.contmix import ContMix, linear_norm
from saccade.parts.convolution import conv_norm, depthwise
from saccade.parts.dilated import DILATED, DilatedBranches
from saccade.parts.head import Head, pool
from saccade.parts.mlp import Gelu
from saccade.parts.norm import BatchNorm, GlobalResponse
from saccade.parts.position import resample
from saccade.parts.pyramid import Pyramid, drop_path_rates
from saccade.parts.squeeze import SqueezeExcite
from saccade.parts.stem import ConvStem

_ADDRESS = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/"
_PUBLISHED = ("overlock_xt", "overlock_t", "overlock_s", "overlock_b")

CARD = Card(
    "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
    authors="Lou, Yu",
    year=2025,
    systems=("overlock",),
    arxiv="2502.20087",
    code="LMMMEng/OverLoCK@2c8ab3b",
    licence="Apache-2.0",
    read="code",
    keywords="top-down attention, overview net, focus net, context-mixing dynamic convolution, ContMix, large kernel",
    kinds=("backbone", "mixer"),
    mixers={"contmix": "ContMix"},
    # Of the form that trains, with its auxiliary head; the paper counts the merged one without: 16, 33, 56, 95 million.
    params=dict(zip(_PUBLISHED, (17.3e6, 35.0e6, 58.3e6, 98.0e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (2.6e9, 5.5e9, 9.7e9, 16.7e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (82.7, 84.2, 84.8, 85.1), strict=True)),
    weights={name: Weights(f"{_ADDRESS}{name}_in1k_224.pth") for name in _PUBLISHED},
    goldens=("overlock_xt", "op_contmix", "op_contmix_enlarged", "op_overlock_dynamic_conv_block"),
    tests=("tests/papers/test_overlock.py",),
)

# kernel: ((kernel, dilation) of each branch beside it)
BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def large_kernel(site: Site, kernel: int) -> DilatedBranches:
    """A depthwise convolution with the paper's dilated branches."""
    if kernel not in BRANCHES:
        raise SaccadeError(f"kernel={kernel}: dilated branches are known for {sorted(BRANCHES)}")
    return DilatedBranches(site, kernel, BRANCHES[kernel])


class Local(nn.Module):
    """x + conv(x), a depthwise 3x3 convolution."""

    def __init__(self, rank: int, dim: int) -> None:
        super().__init__()
        self.conv = depthwise(rank, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def mlp(rank: int, dim: int, hidden: int) -> nn.Sequential:
    """fc2(grn(h + conv(h))), h = gelu(fc1(x))."""
    return nn.Sequential(nn.Linear(dim, hidden), Gelu(), Local(rank, hidden), GlobalResponse(hidden),
                         nn.Linear(hidden, dim))


def squeeze(dim: int) -> SqueezeExcite:
    return SqueezeExcite(dim, max(16, dim // 8), activation=nn.GELU)


class LargeKernelBlock(nn.Module):
    """x = local(x);  x = keep(x) + tail(mlp(se(bn(mixer(norm(x)))))): the Base-Net's."""

    def __init__(
        self, site: Site, mixer: nn.Module, drop_path: float = 0.0, ratio: float = 4.0, scale: float | None = None
    ) -> None:
        super().__init__()
        self.site, self.mixer = site, mixer
        self.local = Local(site.rank, site.dim)
        self.norm = LAYER_NORM(site.dim)
        self.mixer_norm = BatchNorm(site.dim)
        self.squeeze = squeeze(site.dim)
        self.mlp = mlp(site.rank, site.dim, int(site.dim * ratio))
        self.keep = Affine.where(site.dim, scale)
        self.tail = residual_tail(site.dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x)
        return self.keep(x) + self.tail(self.mlp(self.squeeze(self.mixer_norm(self.mixer(self.norm(x))))))


class ContMixBlock(nn.Module):
    """ContMix beside a large static kernel, squeezed, gated, then an MLP: (B, *grid, C) -> (B, *grid, C).

    `context` more channels travel with the C that are mixed (the Focus-Net's; none in the block for use elsewhere).
    """

    def __init__(
        self,
        site: Site,
        mixer: nn.Module,
        drop_path: float = 0.0,
        *,
        kernel: int = 7,
        ratio: float = 4.0,
        scale: float | None = None,
        context: int = 0,
    ) -> None:
        super().__init__()
        dim, rank, wide = site.dim, site.rank, site.dim + context
        self.site = site
        self.local1 = Local(rank, wide)
        self.norm1 = LAYER_NORM(wide)
        self.mixer = mixer
        self.static = nn.Sequential(large_kernel(site, kernel), BatchNorm(dim))
        self.squeeze = squeeze(dim)
        self.gate = nn.Sequential(nn.Linear(dim, dim, bias=False), BatchNorm(dim), nn.SiLU())
        self.out_norm, self.out = BatchNorm(dim), nn.Linear(dim, wide)
        self.keep1 = Affine.where(wide, scale)
        self.local2 = Local(rank, wide)
        self.norm2 = LAYER_NORM(wide)
        self.mlp = mlp(rank, wide, int(dim * ratio))
        self.keep2 = Affine.where(wide, scale)
        self.tail = residual_tail(wide, None, drop_path)

    def values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """What is gated and convolved, and what the mixer makes of it."""
        return normed, self.mixer(normed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local1(x)
        value, mixed = self.values(self.norm1(x))
        branch = self.gate(value) * self.squeeze(mixed + self.static(value))
        x = self.local2(self.keep1(x) + self.tail(self.out(self.out_norm(branch))))
        return self.keep2(x) + self.tail(self.mlp(self.norm2(x)))


class FocusBlock(ContMixBlock):
    """A ContMix block on (map, running context) that a constant overview steers; returns the new pair."""

    def __init__(self, site: Site, mixer: nn.Module, drop_path: float = 0.0, *, context: int, first: bool = False,
                 **options: Any) -> None:
        super().__init__(site, mixer, drop_path, context=context, **options)
        wide = site.dim + context
        self.context_scale = None if first else Affine(context, 1.0)
        self.overview_scale = None if first else Affine(context, 1.0)
        self.fusion = nn.Sequential(depthwise(site.rank, wide, 3), BatchNorm(wide), Gelu(), nn.Linear(wide, site.dim),
                                    GlobalResponse(site.dim))

    def values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        value = self.fusion(normed)
        guided = isinstance(self.mixer, ContMix) and self.mixer.context is not None
        return value, self.mixer(value, normed) if guided else self.mixer(value)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, overview: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.context_scale is not None and self.overview_scale is not None:
            context = self.context_scale(context) + self.overview_scale(overview)
        joined = super().forward(torch.cat([x, context], -1))
        out, context = joined.split((x.shape[-1], context.shape[-1]), -1)
        return out, context


class ProjectedHead(Head):
    """fc(pool(silu(norm(proj(x)))))."""

    def __init__(self, dim: int, num_classes: int, global_pool: str = "avg", width: int = 1024) -> None:
        super().__init__(width if num_classes else dim, num_classes, global_pool)
        self.proj = nn.Sequential(*linear_norm(dim, width), nn.SiLU()) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.proj(x))


class OverLoCK(Pyramid):
    """Base-Net (a pyramid of large kernels) and Focus-Net; `mixer=` puts another mixer in the blocks of both."""

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        focus_depths: Sequence[int],
        heads: Sequence[int],
        kernels: Sequence[int],
        scales: Sequence[float | None],
        patch: int,
        replace: Any,
        drop_path_rate: float = 0.0,
        **common: Any,
    ) -> None:
        total = sum(depths) + sum(focus_depths)
        rates = drop_path_rates(drop_path_rate, total)
        base = [f"stages.{stage}.blocks.{index}" for stage, depth in enumerate(depths) for index in range(depth)]
        focus = [f"focus.{part}.{index}" for part, depth in enumerate(focus_depths) for index in range(depth)]
        check_patterns(replace, base + focus)
        in_base = replace
        if isinstance(replace, Mapping):
            in_base = {pattern: one for pattern, one in replace.items()
                       if matching([*base, *(f"{name}.mixer" for name in base)], pattern)}

        def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
            return ConvStem(
                *conv_norm(rank, in_chans, dim // 2, stride=patch // 2), Gelu(), *conv_norm(rank, dim // 2, dim // 2),
                Gelu(), *conv_norm(rank, dim // 2, dim, stride=2), Gelu(), *conv_norm(rank, dim, dim),
            )

        def downsample(rank: int, dim: int, out_dim: int) -> nn.Sequential:
            return nn.Sequential(*conv_norm(rank, dim, out_dim, stride=2))

        def block(site: Site, mixer: nn.Module, drop_path: float) -> LargeKernelBlock:
            return LargeKernelBlock(site, mixer, drop_path, scale=scales[site.stage])

        self.overview_dim = dims[-1]
        super().__init__(
            dims, depths, [max(dim // 32, 1) for dim in dims], stem=stem, stride=patch, downsample=downsample,
            block=block, mixer=[partial(large_kernel, kernel=kernel) for kernel in kernels],
            head=ProjectedHead, replace=in_base, drop_path_rate=rates[sum(depths) - 1], **common,
        )
        sites = [stage.blocks[0].site for stage in cast(Any, self.stages)]
        rank, context = sites[0].rank, dims[-1] // 4
        own = [partial(ContMix, kernel=kernel, context=context) for kernel in kernels]
        build = choose_mixer(replace, own)
        self.overview = nn.Linear(dims[-1], context)
        parts, rest = [], iter(rates[sum(depths):])
        for part, depth in enumerate(focus_depths):
            stage = len(dims) - 2 + part
            blocks = []
            for index in range(depth):
                site = Site(dims[stage], heads[part], stage, index, sites[stage].stride, sites[stage].grid)
                blocks.append(FocusBlock(
                    site, build(site, f"focus.{part}.{index}"), next(rest), context=context, kernel=kernels[stage],
                    ratio=3, scale=scales[stage], first=part == index == 0,
                ))
            parts.append(nn.ModuleList(blocks))
        self.focus = nn.ModuleList(parts)
        self.lower = downsample(rank, dims[-2], dims[-1])
        self.lower_context = downsample(rank, context, context)
        for entry, module in zip(self.feature_info[-2:], ("focus.0", "norm"), strict=True):
            entry["module"] = module
        self.feature_info[-1]["num_chs"] = self.num_features

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put new heads of `num_classes` (0: none) in place, the auxiliary one too."""
        dim = self.overview_dim
        self.num_features = dim + dim // 4
        super().reset_classifier(num_classes, global_pool)
        self.head_auxiliary = nn.ModuleList([BatchNorm(dim), nn.Linear(dim, num_classes)] if num_classes else [])
        self.removed = () if num_classes else ("head.fc", "head.proj", "head_auxiliary")

    def maps(self, image: Tensor) -> list[Tensor]:
        """The maps that dense heads take, channels last, and the overview that the auxiliary head scores."""
        x, base = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            base.append(x)
        small = self.overview(x)
        overview = resample(small, tuple(base[-2].shape[1:-1]), linear=True)
        y, context = base[-2], overview
        first, second = cast(Any, self.focus)
        for block in first:
            y, context = block(y, context, overview)
        middle = y
        y, context = self.lower(y), self.lower_context(context)
        for block in second:
            y, context = block(y, context, small)
        return [*base[:-2], middle, self.norm(torch.cat([y, context], -1)), x]

    def features(self, image: Tensor) -> list[Tensor]:
        """Maps of the first stages, then of the Focus-Net, (B, C_i, *grid_i)."""
        return [x.movedim(-1, 1) for x in self.maps(image)[:-1]]

    def forward_features(self, image: Tensor) -> Tensor:
        """The Focus-Net's last map with its context, (B, C + C / 4, *grid)."""
        return self.maps(image)[-2].movedim(-1, 1)

    def forward_auxiliary(self, image: Tensor) -> dict[str, Tensor]:
        """Class scores `out` of the whole and `auxiliary` of the overview alone, which the authors train with too."""
        *_, last, overview = self.maps(image)
        norm, fc = cast(Any, self.head_auxiliary)
        return {"out": self.head(last), "auxiliary": fc(pool(norm(overview), "avg"))}


_KERNELS, _SCALES = (17, 15, 13, 7), (None, None, 1.0, 1.0)
SIZES: dict[str, dict[str, Any]] = {
    "overlock_xt": dict(dims=(56, 112, 256, 336), depths=(2, 2, 3, 2), focus_depths=(6, 2), heads=(4, 6)),
    "overlock_t": dict(dims=(64, 128, 256, 512), depths=(4, 4, 6, 2), focus_depths=(12, 2), heads=(4, 8)),
    "overlock_s": dict(dims=(64, 128, 320, 512), depths=(6, 6, 8, 3), focus_depths=(16, 3), heads=(8, 16)),
    "overlock_b": dict(dims=(80, 160, 384, 576), depths=(8, 8, 10, 4), focus_depths=(20, 4), heads=(6, 9)),
    "overlock_nano": dict(dims=(32, 64, 64), depths=(1, 1, 1), focus_depths=(2, 1), heads=(2, 2), kernels=(7, 7, 5),
                          scales=(None, 1.0, 1.0), patch=2, img_size=32),
}


def overlock(
    dims: Sequence[int],
    depths: Sequence[int],
    focus_depths: Sequence[int],
    heads: Sequence[int],
    kernels: Sequence[int] = _KERNELS,
    scales: Sequence[float | None] = _SCALES,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> OverLoCK:
    """An OverLoCK of a size; `heads` are those of the Focus-Net's two parts, `scales` layer scale by stage."""
    return OverLoCK(dims, depths, focus_depths, heads, kernels, scales, patch, mixer, **common)


def _pointwise(theirs: str, ours: str) -> KeyMap:
    return (rf"{theirs}\.weight", f"{ours}.weight", matrix_from_1x1), (rf"{theirs}\.bias", f"{ours}.bias")


def _pair(theirs: str, ours: str, first: int = 0) -> KeyMap:
    """A 1x1 convolution and a batch norm."""
    return (*_pointwise(rf"{theirs}\.{first}", f"{ours}.0"), (rf"{theirs}\.{first + 1}\.(.*)", rf"{ours}.1.\1"))


def _mlp(theirs: str, first: int) -> KeyMap:
    return (
        *_pointwise(rf"{theirs}\.{first}", "mlp.0"), (rf"{theirs}\.{first + 2}\.(.*)", r"mlp.2.conv.\1"),
        (rf"{theirs}\.{first + 3}\.(gamma|beta)", r"mlp.3.\1", torch.flatten),
        *_pointwise(rf"{theirs}\.{first + 4}", "mlp.4"),
    )


BASE: KeyMap = (
    (r"dwconv\.(.*)", r"local.conv.\1"), (r"proj\.0\.(.*)", r"norm.\1"), *within(DILATED, r"proj\.1\.", "mixer."),
    (r"proj\.2\.(.*)", r"mixer_norm.\1"), *_pointwise(r"proj\.3\.proj\.1", "squeeze.fc1"),
    *_pointwise(r"proj\.3\.proj\.3", "squeeze.fc2"), *_mlp("proj", 4), (r"ls\.(.*)", r"keep.\1", torch.flatten),
)
BLOCK: KeyMap = (
    ("rpb1", "mixer.biases.0"), ("rpb2", "mixer.biases.1"), *_pair("weight_query", "mixer.query"),
    *_pair("weight_key", "mixer.key", 1), *_pair("weight_value", "mixer.value"),
    *_pointwise("weight_proj", "mixer.kernel_proj"), *_pair("(?:fusion|dyconv)_proj", "mixer.proj"),
    (r"x_scale\.(.*)", r"context_scale.\1", torch.flatten), (r"h_scale\.(.*)", r"overview_scale.\1", torch.flatten),
    (r"dwconv(\d)\.(.*)", r"local\1.conv.\2"), (r"ls(\d)\.(.*)", r"keep\1.\2", torch.flatten),
    *_pointwise(r"fusion\.3", "fusion.3"), (r"fusion\.4\.(.*)", r"fusion.4.\1", torch.flatten),
    *within(DILATED, r"lepe\.0\.", "static.0."), (r"lepe\.1\.(.*)", r"static.1.\1"),
    *_pointwise(r"se_layer\.proj\.1", "squeeze.fc1"), *_pointwise(r"se_layer\.proj\.3", "squeeze.fc2"),
    *_pair("gate", "gate"), (r"proj\.0\.(.*)", r"out_norm.\1"), *_pointwise(r"proj\.1", "out"), *_mlp("mlp", 0),
    (r"(.*)", r"\1"),
)
AUTHORS: KeyMap = (
    (r"patch_embed1\.(.*)", r"stem.\1"),
    *((rf"patch_embed{stage + 1}\.(.*)", rf"stages.{stage}.downsample.\1") for stage in (1, 2, 3)),
    *(rule for stage in range(4)
      for rule in within(BASE, rf"blocks{stage + 1}\.(\d+)\.", rf"stages.{stage}.blocks.\1.")),
    *(rule for part in range(2) for rule in within(BLOCK, rf"sub_blocks{part + 3}\.(\d+)\.", rf"focus.{part}.\1.")),
    *_pointwise("high_level_proj", "overview"),
    (r"patch_embedx\.x_proj\.(.*)", r"lower.\1"), (r"patch_embedx\.h_proj\.(.*)", r"lower_context.\1"),
    (r"aux_head\.0\.(.*)", r"head_auxiliary.0.\1"), *_pointwise(r"aux_head\.2", "head_auxiliary.1"),
    *_pair("head", "head.proj"), *_pointwise(r"head\.4", "head.fc"),
)


def TAPS(name: str) -> dict[str, str]:  # noqa: N802
    """Where the authors' inner maps are; the middle map's last block differs from size to size."""
    return {"pre1": "stages.0", "pre2": "stages.1", "base3": "stages.2", "base4": "stages.3", "sub3_0": "focus.0.0",
            "sub3_last": f"focus.0.{SIZES[name]['focus_depths'][0] - 1}", "sub4_last": "norm"}
