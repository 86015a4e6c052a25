"""SHViT: one attention head, on a part of the channels, and patches of 16 x 16 from the start.

Many heads compute much the same map, and early stages cost more memory traffic than they are worth. So: a stem of
stride 16, three stages, and in the later two attention with a single head on C_p of the C channels,
    out = W relu(concat(softmax(q k^T / sqrt(d)) v, x_rest)),   (q, k, v) = norm(W_qkv norm(x_part)),
between a depthwise 3x3 convolution and an MLP, all with batch norm, which folds away for deployment
(`reparameterize(model)`).

Yun, Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", 2024, section 3.

Any grid: convolutions pad with zeros. Quirks kept: only the attended channels are normed (group norm with one group);
they join the raw rest before the activation; stages of convolutions alone have no mixer at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, pointwise, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.parts.block import residual_tail
from saccade.parts.convolution import conv_norm
from saccade.parts.head import Head
from saccade.parts.norm import BatchNorm, GroupNorm1
from saccade.parts.pyramid import Pyramid, no_mixer
from saccade.parts.reparameterize import affine_of
from saccade.parts.squeeze import SqueezeExcite, divisible
from saccade.parts.stem import ConvStem
from saccade.parts.tokens import global_tokens

_PUBLISHED = ("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4")

CARD = Card(
    "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
    authors="Yun, Ro",
    year=2024,
    systems=("shvit",),
    arxiv="2401.16456",
    code="ysj9909/SHViT@6a729cc",
    licence="MIT",
    read="paper",
    keywords="single-head self-attention, partial channels, efficient macro design, mobile, reparameterization",
    kinds=("backbone", "mixer"),
    mixers={"single_head": "SingleHeadAttention"},
    params=dict(zip(_PUBLISHED, (6.3e6, 11.4e6, 14.2e6, 16.5e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (0.241e9, 0.366e9, 0.601e9, 0.986e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (72.8, 75.2, 77.4, 79.4), strict=True)),
    aliases={f"{name}_fused": name for name in _PUBLISHED},  # the golden that also holds the deployed form's output
    weights={name: Weights(f"https://github.com/ysj9909/SHViT/releases/download/v1.0/{name}.pth")
             for name in ("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4")},
    goldens=("shvit_s1", "shvit_s2_fused", "op_single_head_attention"),
    tests=("tests/papers/test_shvit.py",),
)


def linear_norm(dim: int, out_dim: int) -> list[nn.Module]:
    """A 1x1 convolution (a linear layer on grids) without bias and a batch norm."""
    return [nn.Linear(dim, out_dim, bias=False), BatchNorm(out_dim)]


class SingleHeadAttention(nn.Module):
    """One head on the first `part` channels, the rest passed by: (B, *grid, C) -> (B, *grid, C).

    `part` is a number of channels or, below 1, a share of them. (Yun and Ro, 2024, equation 2.)
    """

    ranks, weights = (1, 2, 3), True
    template = Template("q k^T / sqrt(d), on part of the channels", "softmax", "sum of v, beside the other channels")

    def __init__(self, site: Site, part: float = 1 / 4.67, qk_dim: int = 16) -> None:
        super().__init__()
        self.part = int(part) if part >= 1 else max(int(site.dim * part), 1)
        if not 1 <= self.part <= site.dim:
            raise SaccadeError(f"part={part}: single-head attention takes 1 to {site.dim} channels of this site")
        self.qk_dim = qk_dim
        self.norm = GroupNorm1(self.part)
        self.qkv = nn.Sequential(*linear_norm(self.part, 2 * qk_dim + self.part))
        self.proj = nn.Sequential(*linear_norm(site.dim, site.dim))

    def forward(self, x: Tensor) -> Tensor:
        part, rest = x.split((self.part, x.shape[-1] - self.part), -1)
        qkv = self.qkv(self.norm(part)).flatten(1, -2)[:, None]  # (B, 1, N, 2 qk + part)
        q, k, v = qkv.split((self.qk_dim, self.qk_dim, self.part), -1)
        out = attend(q, k, v, where=lambda: global_tokens(q.shape[2], x.device))
        return self.proj(torch.cat([out.view(part.shape), rest], -1).relu())

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: N (part (2 qk + part) + C^2) for the projections, N^2 (qk + part) for the products."""
        tokens = torch.Size(grid).numel()
        projections = self.part * (2 * self.qk_dim + self.part) + site.dim**2
        return tokens * projections + tokens**2 * (self.qk_dim + self.part)

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


class Residual(nn.Module):
    """x + tail(branch(x))."""

    def __init__(self, dim: int, branch: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.branch = branch
        self.tail = residual_tail(dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.branch(x))


def convolution(rank: int, dim: int, drop_path: float = 0.0) -> Residual:
    """A depthwise 3x3 convolution with batch norm, beside a shortcut."""
    return Residual(dim, nn.Sequential(*conv_norm(rank, dim, dim, groups=dim)), drop_path)


def feed_forward(dim: int, drop_path: float = 0.0) -> Residual:
    """An MLP of twice the width with batch norms and ReLU, beside a shortcut."""
    return Residual(dim, nn.Sequential(*linear_norm(dim, 2 * dim), nn.ReLU(), *linear_norm(2 * dim, dim)), drop_path)


class SingleHeadBlock(nn.Module):
    """Convolution, mixer (in stages that have one) and MLP, each beside a shortcut."""

    def __init__(self, site: Site, mixer: nn.Module | None, drop_path: float = 0.0) -> None:
        super().__init__()
        self.site = site
        self.conv = convolution(site.rank, site.dim, drop_path)
        self.mixer = mixer
        self.tail = residual_tail(site.dim, None, drop_path)
        self.mlp = feed_forward(site.dim, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.mixer is not None:
            x = x + self.tail(self.mixer(x))
        return self.mlp(x)


class Downsample(nn.Sequential):
    """Convolution and MLP, an inverted residual of stride 2 with squeeze and excitation, convolution and MLP again."""

    def __init__(self, rank: int, dim: int, out_dim: int) -> None:
        wide = 4 * dim
        merging = nn.Sequential(
            *linear_norm(dim, wide), nn.ReLU(), *conv_norm(rank, wide, wide, stride=2, groups=wide), nn.ReLU(),
            SqueezeExcite(wide, divisible(wide / 4)), *linear_norm(wide, out_dim),
        )
        super().__init__(convolution(rank, dim), feed_forward(dim), merging, convolution(rank, out_dim),
                         feed_forward(out_dim))


class NormedHead(Head):
    """fc(batch norm(mean)), the norm folded into the linear layer when deployed."""

    def __init__(self, dim: int, num_classes: int, global_pool: str = "avg") -> None:
        super().__init__(dim, num_classes, global_pool, norm=BatchNorm)

    def deployed(self) -> NormedHead:
        """The norm stands before the layer: W' = W scale, b' = b + W shift."""
        if isinstance(self.fc, nn.Linear):
            scale, shift = affine_of(self.norm)
            with torch.no_grad():
                self.fc.bias.add_(self.fc.weight @ shift)
                self.fc.weight.mul_(scale)
            self.norm = nn.Identity()
        return self


SIZES: dict[str, dict[str, Any]] = {
    "shvit_s1": dict(dims=(128, 224, 320), depths=(2, 4, 5), parts=(None, 48, 68)),
    "shvit_s2": dict(dims=(128, 308, 448), depths=(2, 4, 5), parts=(None, 66, 96)),
    "shvit_s3": dict(dims=(192, 352, 448), depths=(3, 5, 5), parts=(None, 75, 96)),
    "shvit_s4": dict(dims=(224, 336, 448), depths=(4, 7, 6), parts=(None, 72, 96), img_size=256),
    "shvit_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), parts=(None, 16, 32), patch=2, img_size=32),
}


def shvit(
    dims: Sequence[int],
    depths: Sequence[int],
    parts: Sequence[int | None],
    patch: int = 16,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A SHViT of a size; `parts` are the attended channels a stage, None where it has no attention."""

    def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
        halvings = patch.bit_length() - 1
        widths = [in_chans, *(dim // 2**step for step in reversed(range(halvings)))]
        layers = [layer for pair in zip(widths, widths[1:], strict=False)
                  for layer in (*conv_norm(rank, *pair, stride=2), nn.ReLU())]
        return ConvStem(*layers[:-1])

    mixers: list[Any] = [partial(SingleHeadAttention, part=part) if part else no_mixer for part in parts]
    return Pyramid(
        dims, depths, [1] * len(dims), stem=stem, stride=patch, downsample=Downsample, block=SingleHeadBlock,
        mixer=mixers, head=NormedHead, replace=mixer, **common,
    )


def _conv_norm(theirs: str, ours: str, first: int, second: int) -> KeyMap:
    """A convolution `c` and its norm `bn` as two layers of an nn.Sequential; a 1x1 becomes a matrix."""
    return ((rf"{theirs}\.c\.weight", f"{ours}.{first}.weight", pointwise),
            (rf"{theirs}\.bn\.(.*)", rf"{ours}.{second}.\1"))


_MLP = (*_conv_norm(r"m\.pw1", "branch", 0, 1), *_conv_norm(r"m\.pw2", "branch", 3, 4))
MIXER: KeyMap = (
    (r"pre_norm\.(.*)", r"norm.\1"),
    *_conv_norm("qkv", "qkv", 0, 1),
    *_conv_norm(r"proj\.1", "proj", 0, 1),
)
_BLOCK: KeyMap = (
    *within(_conv_norm("m", "branch", 0, 1), r"conv\.", "conv."),
    *within(MIXER, r"mixer\.m\.", "mixer."),
    *within(_MLP, r"ffn\.", "mlp."),
)
_MERGING: KeyMap = (
    *_conv_norm("conv1", "2", 0, 1), *_conv_norm("conv2", "2", 3, 4), *_conv_norm("conv3", "2", 7, 8),
    (r"se\.(fc\d)\.weight", r"2.6.\1.weight", pointwise),
    (r"se\.(fc\d)\.bias", r"2.6.\1.bias"),
)


def _stage(stage: int) -> KeyMap:
    theirs, ours = rf"blocks{stage + 1}\.", f"stages.{stage}."
    if stage == 0:
        return within(_BLOCK, theirs + r"(\d+)\.", ours + r"blocks.\1.")
    around = [rule for place, first in ((0, 0), (2, 3)) for rule in (
        *within(_conv_norm("m", "branch", 0, 1), rf"{place}\.0\.", f"{first}."),
        *within(_MLP, rf"{place}\.1\.", f"{first + 1}."),
    )]
    blocks = [rule for index in range(10) for rule in within(_BLOCK, rf"{index + 3}\.", f"blocks.{index}.")]
    return [*within((*around, *within(_MERGING, r"1\.", "")), theirs, ours + "downsample."),
            *within(blocks, theirs, ours)]


AUTHORS: KeyMap = (
    *(rule for step in range(4) for rule in _conv_norm(rf"patch_embed\.{2 * step}", "stem", 3 * step, 3 * step + 1)),
    *(rule for stage in range(3) for rule in _stage(stage)),
    (r"head\.bn\.(.*)", r"head.norm.\1"),
    (r"head\.l\.(.*)", r"head.fc.\1"),
)
TAPS = {f"blocks{stage + 1}": f"stages.{stage}" for stage in range(3)}
