"""MedViTV2: Kolmogorov-Arnold layers as feed-forward, neighborhood attention before them.

A Kolmogorov-Arnold layer learns a function on each edge instead of a weight: every input is spread over bumps at the
knots g of a grid, of a width h, and a matrix weighs the bumps (FasterKAN's reflectional switch functions),
    out = W b,   b_(i, g) = 1 - tanh^2((norm(x)_i - g) / h).
Two blocks alternate. The local one (LFP) is neighborhood attention and a convolutional feed-forward with squeeze and
excitation. The global one (GFP) attends with C_a of its C channels to keys that are means of R^2 consecutive tokens,
makes the other channels from those by a grouped convolution, and ends in two Kolmogorov-Arnold layers.

Manzari, Asgariandehkordi, Koleilat, Xiao, Rivaz, "Medical Image Classification with KAN-Integrated Transformers and
Dilated Neighborhood Attention", 2025, section 3. Delis, FasterKAN, 2024.
The layer of splines that it stands for (Liu et al., KAN, 2024) is beside it in `parts/kan.py`.

Any grid: pooling counts no padding; fewer tokens than R^2 make one key; tokens beyond a multiple of R^2 are no keys.
Quirks kept: neighborhood attention and the Kolmogorov-Arnold layers read the memory of (B, C, H, W) as (B, H, W, C), so
that their "tokens" are runs of C pixels of a channel; the dilation is 1; the local feed-forward adds its normed input
as well as the block's; a global block also holds a local feed-forward that its forward passes by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer, mixer_factory
from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, pointwise, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.window import crop
from saccade.parts.attention import check_heads
from saccade.parts.block import residual_tail
from saccade.parts.convolution import conv_norm, depthwise
from saccade.parts.kan import KanLayer
from saccade.parts.mbconv import SamePool
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.squeeze import SqueezeExcite, divisible
from saccade.parts.stem import ConvStem
from saccade.parts.tokens import strided_tokens, token_numbers

CARD = Card(
    "Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood Attention",
    authors="Manzari, Asgariandehkordi, Koleilat, Xiao, Rivaz",
    year=2025,
    systems=("medvit_v2",),
    arxiv="2502.13693",
    code="Omid-Nejati/MedViTV2@8d54f66",
    licence="MIT",
    read="code",
    keywords="Kolmogorov-Arnold network, KAN, FasterKAN, B-spline, neighborhood attention, medical images, MedViT",
    kinds=("backbone", "mixer"),
    mixers={"scrambled_neighborhood": "ScrambledNeighborhood", "run_pooled_attention": "RunPooledAttention"},
    # Of the authors' twelve sets of MedMNIST this is one; its head has 9 classes.
    weights={
        f"medvit_v2_{size}": Weights(f"https://drive.google.com/file/d/{file}/view?usp={how}", data="PathMNIST",
                                     licence="MIT")
        for size, file, how in (("tiny", "1bD3fxpxzlbP3SuC8EDV3oZuBYhs5XpOl", "drive_link"),
                                ("small", "1Q09QdkwSLtb-au_3ip7vYzxo_VKvOyby", "drive_link"),
                                ("base", "1WazBW35P2sD3nnnSkuC9cjQAMH-PAICi", "drive_link"),
                                ("large", "1imY08j2tiBEsQAN_Du9-Ve1AdUeBmiVU", "sharing"))
    },
    goldens=("medvit_v2_tiny", "kan_mlp", "op_faster_kan", "op_kan_linear", "op_medvit_v2_gfp", "op_medvit_v2_lfp"),
    tests=("tests/papers/test_medvit_v2.py", "tests/parts/test_kan.py"),
)


def scrambled(x: Tensor) -> Tensor:
    """The numbers of (B, C, *grid) in the order of its memory, read as (B, *grid, C): a reshape without a permute."""
    return x.movedim(-1, 1).clone(memory_format=torch.contiguous_format).view(x.shape)


def unscrambled(x: Tensor) -> Tensor:
    """Undo `scrambled`, as a view."""
    return x.view(x.shape[0], x.shape[-1], *x.shape[1:-1]).movedim(1, -1)


class ScrambledNeighborhood(nn.Module):
    """Neighborhood attention on the scrambled grid: (B, *grid, C) -> (B, *grid, C).

    What `record` sees stands between scrambled tokens, not between places of the map.
    """

    ranks = (1, 2, 3)
    template = Template("q k^T / sqrt(d) + offset, in the neighbourhood of a scrambled grid", "softmax", "sum of v")

    def __init__(self, site: Site, kernel: int = 7, dilation: int = 1) -> None:
        super().__init__()
        self.attention = mixer_factory("neighborhood", kernel=kernel, dilation=dilation)(site)

    def forward(self, x: Tensor) -> Tensor:
        return unscrambled(self.attention(scrambled(x))).contiguous()

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of neighborhood attention."""
        count: int = self.attention.cost(site, grid)  # type: ignore[operator]
        return count

    def reach(self, site: Site) -> None:
        """The channels of a place lie all over the scrambled grid."""
        return None


class RunPooledAttention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d)) v), k and v of norm(means of runs of R^n consecutive tokens).

    (B, *grid, C) -> (B, *grid, C); runs follow the row-major order of the grid, R is `reduction`, n the grid's rank.
    """

    ranks, weights = (1, 2, 3), True
    template = Template("q k^T / sqrt(d) to means of runs", "softmax", "sum of v, pooled")

    def __init__(self, site: Site, reduction: int = 2) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.run = site.heads, reduction**site.rank
        self.q = nn.Linear(site.dim, site.dim)
        self.kv = nn.Linear(site.dim, 2 * site.dim)
        self.norm = BatchNorm(site.dim) if reduction > 1 else nn.Identity()
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        count = tokens.shape[1]
        run = min(self.run, count) if isinstance(count, int) else self.run
        means = crop(tokens, (count // run * run,)).unflatten(1, (-1, run)).mean(2) if run > 1 else tokens
        q = self.q(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm(means)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

        def where() -> tuple[Tensor, Tensor]:  # a key stands for the token in the middle of its run
            middle = strided_tokens((count,), (count // run,), run, 0, x.device)
            return token_numbers(count, x.device), middle

        out = attend(q, k, v, where=where)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of N queries and M keys: 2 (N + M) C^2 + 2 N M C."""
        tokens = prod(grid)
        keys = max(tokens // self.run, 1)
        return 2 * site.dim * ((tokens + keys) * site.dim + tokens * keys)

    def reach(self, site: Site) -> None:
        """Every token reaches every other, in the mean of its run."""
        return None


class LocalFeedForward(nn.Sequential):
    """x + norm(shrink(squeeze(act(norm(depthwise(act(norm(expand(x)))))))): (B, *grid, C) -> (B, *grid, C)."""

    def __init__(self, rank: int, dim: int, ratio: float, kernel: int = 3) -> None:
        hidden = int(dim * ratio)
        super().__init__(
            nn.Linear(dim, hidden, bias=False), BatchNorm(hidden), nn.Hardswish(),
            depthwise(rank, hidden, kernel, bias=False), BatchNorm(hidden), nn.Hardswish(),
            SqueezeExcite(hidden, hidden // dim, gate=nn.Hardsigmoid),
            nn.Linear(hidden, dim, bias=False), BatchNorm(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def embed(before: int, dim: int, stride: int = 1) -> nn.Module:
    """norm(linear(2x2 means where it strides)); nothing where neither grid nor width changes."""
    if stride == 1 and before == dim:
        return nn.Identity()
    return nn.Sequential(SamePool() if stride == 2 else nn.Identity(), nn.Linear(before, dim, bias=False),
                         BatchNorm(dim))


class LocalBlock(nn.Module):
    """x = embed(x);  x += tail(mixer(norm(x)));  x += mlp(norm(x)), mlp with a shortcut of its own: LFP."""

    def __init__(
        self, site: Site, mixer: nn.Module, drop_path: float = 0.0, *, before: int, stride: int = 1, kernel: int = 3,
        ratio: float = 3.0,
    ) -> None:
        super().__init__()
        self.site = site
        self.embed = embed(before, site.dim, stride)
        self.norm1 = BatchNorm(site.dim)
        self.mixer = mixer
        self.tail = residual_tail(site.dim, None, drop_path)
        self.norm2 = BatchNorm(site.dim)
        self.mlp = LocalFeedForward(site.rank, site.dim, ratio, kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tail(self.mixer(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class GlobalBlock(nn.Module):
    """a = embed(x);  a += mixer(norm(a));  p = project(a);  p += conv(p);  x = (a, p);  x += kan(norm(x)): GFP.

    `site` is the mixer's: its width is that of a, and the block's is `dim`.
    """

    def __init__(
        self, site: Site, mixer: nn.Module, drop_path: float = 0.0, *, dim: int, before: int, stride: int = 1,
        head_dim: int = 32, ratio: float = 2.0, share: float = 0.75,
    ) -> None:
        super().__init__()
        self.site, rest = site, dim - site.dim
        if rest < head_dim or rest % head_dim:
            raise SaccadeError(f"{dim} channels, {site.dim} of them attending, leave {rest} to a convolution in groups "
                               f"of head_dim={head_dim}: give a multiple of {4 * head_dim} channels")
        self.embed = embed(before, site.dim, stride)
        self.norm1 = BatchNorm(site.dim)
        self.mixer = mixer
        self.tail1 = residual_tail(site.dim, None, drop_path * share)
        self.project = embed(site.dim, rest)
        self.conv = nn.Sequential(*conv_norm(site.rank, rest, rest, groups=rest // head_dim), nn.ReLU(),
                                  nn.Linear(rest, rest, bias=False))
        self.tail2 = residual_tail(rest, None, drop_path * (1 - share))
        self.norm2 = BatchNorm(dim)
        self.kan = nn.Sequential(KanLayer(dim, int(dim * ratio)), KanLayer(int(dim * ratio), dim))
        self.tail3 = residual_tail(dim, None, drop_path)
        self.unused = LocalFeedForward(site.rank, dim, ratio)  # of the authors' checkpoints and counts

    def forward(self, x: Tensor) -> Tensor:
        a = self.embed(x)
        a = a + self.tail1(self.mixer(self.norm1(a)))
        p = self.project(a)
        x = torch.cat([a, p + self.tail2(self.conv(p))], -1)
        return x + self.tail3(unscrambled(self.kan(scrambled(self.norm2(x)))))


_DEEP: dict[str, Any] = dict(depths=(2, 2, 6, 2))
SIZES: dict[str, dict[str, Any]] = {
    "medvit_v2_tiny": dict(dims=(64, 128, 192, 384), depths=(2, 2, 6, 1)),
    "medvit_v2_small": dict(dims=(64, 128, 256, 512)) | _DEEP,
    "medvit_v2_base": dict(dims=(96, 192, 384, 768)) | _DEEP,
    "medvit_v2_large": dict(dims=(96, 256, 512, 1024)) | _DEEP,
    "medvit_v2_nano": dict(dims=(32, 128, 128), depths=(1, 2, 1), stem=(16, 16, 32), periods=(0, 2, 1),
                           reductions=(1, 2, 1), patch=2, img_size=32),
}


def medvit_v2(
    dims: Sequence[int],
    depths: Sequence[int],
    stem: Sequence[int] = (64, 32, 64),
    periods: Sequence[int] = (0, 2, 3, 1),
    reductions: Sequence[int] = (8, 4, 2, 1),
    head_dim: int = 32,
    share: float = 0.75,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A MedViTV2 of a size.

    Of `periods` blocks of a stage the last is a global one (0: none is). `share` of the channels of a global block
    attend, rounded to a multiple of 32; `reductions` are the R of its runs of R^2 tokens.
    """
    def is_global(site: Site) -> bool:
        return periods[site.stage] > 0 and (site.index + 1) % periods[site.stage] == 0

    def narrow(site: Site) -> Site:
        width = divisible(int(site.dim * share), 32)
        return replace(site, dim=width, heads=max(width // head_dim, 1)) if is_global(site) else site

    def own(site: Site) -> nn.Module:
        return RunPooledAttention(site, reductions[site.stage]) if is_global(site) else ScrambledNeighborhood(site)

    def chosen(site: Site) -> nn.Module:  # the caller's mixer too stands at the narrow site
        return choose_mixer(mixer, own)(narrow(site), f"stages.{site.stage}.blocks.{site.index}")

    def block(site: Site, mixer: nn.Module, drop_path: float) -> nn.Module:
        before, stride = (site.dim, 1) if site.index else ((stem[-1], *dims)[site.stage], 2 if site.stage else 1)
        if is_global(site):
            return GlobalBlock(narrow(site), mixer, drop_path, dim=site.dim, before=before, stride=stride,
                               head_dim=head_dim, share=share)
        return LocalBlock(site, mixer, drop_path, before=before, stride=stride, kernel=3 if site.stage else 7)

    def image(rank: int, in_chans: int, _: int) -> ConvStem:
        widths = (in_chans, *stem, stem[-1])
        layers = [[*conv_norm(rank, *pair, stride=stride), nn.ReLU()]
                  for pair, stride in zip(zip(widths, widths[1:], strict=False), (patch // 2, 1, 1, 2), strict=True)]
        return ConvStem(*sum(layers, []))

    check_patterns(mixer, [f"stages.{stage}.blocks.{index}" for stage, depth in enumerate(depths)
                           for index in range(depth)])
    return Pyramid(dims, depths, [max(dim // head_dim, 1) for dim in dims], stem=image, block=block, mixer=chosen,
                   stride=patch, downsample=lambda rank, dim, out_dim: nn.Identity(), norm=BatchNorm, **common)


KAN: KeyMap = (
    (r"layers\.(\d+)\.layernorm\.(.*)", r"\1.norm.\2"),
    (r"layers\.(\d+)\.rbf\.grid", r"\1.grid"),
    (r"layers\.(\d+)\.spline_linear\.weight", r"\1.linear.weight"),
)
SPLINES: KeyMap = ((r"layers\.(\d+)\.(.*)", r"\1.\2"),)  # efficient-kan
FEED_FORWARD: KeyMap = (
    (r"conv\.6\.fc\.0\.(.*)", r"6.fc1.\1"),
    (r"conv\.6\.fc\.2\.(.*)", r"6.fc2.\1"),
    (r"conv\.(\d\..*)", r"\1", pointwise),
)


def _embed(theirs: str, ours: str) -> KeyMap:
    return ((rf"{theirs}\.conv\.weight", f"{ours}.1.weight", pointwise), (rf"{theirs}\.norm\.(.*)", rf"{ours}.2.\1"))


LOCAL: KeyMap = (
    *_embed("patch_embed", "embed"),
    (r"attn\.rpb", "mixer.attention.bias"),
    (r"attn\.(.*)", r"mixer.attention.\1"),
    *within(FEED_FORWARD, r"conv\.", "mlp."),
)
GLOBAL: KeyMap = (
    *_embed("patch_embed", "embed"),
    *_embed("projection", "project"),
    *((rf"e_mhsa\.{letter}\.(.*)", rf"mixer.kv.\1#{number}") for number, letter in enumerate("kv")),
    (r"e_mhsa\.(.*)", r"mixer.\1"),
    (r"mhca\.group_conv3x3\.(.*)", r"conv.0.\1"),
    (r"mhca\.norm\.(.*)", r"conv.1.\1"),
    (r"mhca\.projection\.weight", "conv.3.weight", pointwise),
    *within(FEED_FORWARD, r"conv\.", "unused."),
    *within(KAN, r"kan\.", "kan."),
)


def names(depths: Sequence[int], periods: Sequence[int]) -> KeyMap:
    """The authors' names, who count the blocks through all stages."""
    rules: list[Any] = []
    for stage, (depth, every) in enumerate(zip(depths, periods, strict=True)):
        for index in range(depth):
            block = GLOBAL if every and (index + 1) % every == 0 else LOCAL
            rules += within((*block, (r"(.*)", r"\1")), rf"features\.{sum(depths[:stage]) + index}\.",
                            f"stages.{stage}.blocks.{index}.")
    convolutions = [rule for layer in range(4) for rule in (
        (rf"stem\.{layer}\.conv\.(.*)", rf"stem.{3 * layer}.\1"),
        (rf"stem\.{layer}\.norm\.(.*)", rf"stem.{3 * layer + 1}.\1"))]
    return (*rules, *convolutions, (r"proj_head\.0\.(.*)", r"head.fc.\1"))


def AUTHORS(name: str) -> KeyMap:
    return names(SIZES[name]["depths"], SIZES[name].get("periods", (0, 2, 3, 1)))


TAPS = {f"stage{stage + 1}": f"stages.{stage}" for stage in range(4)}
