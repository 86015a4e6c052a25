"""Attentive WaveBlock: two networks that learn from each other are kept different by what they are made to overlook.

In training, a wave block multiplies all rows of a map by 1.5, but for a band of three tenths of them at a random place:
    wave(x)[i] = x[i] where s <= i < s + round(0.3 H), else 1.5 x[i].
Two networks with bands of their own differ, and attention enlarges the difference: CBAM before the wave (pre-attention,
x + CBAM(x)), or a non-local block after it (post-attention). Both stand after the second and third stage of a ResNet
for re-identification, whose last stage has no stride.

Wang, Zhao, Liao, Zeng, Liu, "Attentive WaveBlock: Complementarity-enhanced Mutual Networks for Unsupervised Domain
Adaptation in Person Re-identification and Beyond", 2022, section 3.

Any grid, without padding but the convolutions' own; bands lie across the first axis. The output without classes is the
normed feature of length 1; with classes, their scores.
Quirks kept: the stem has no ReLU; the non-local scores are divided by the number of tokens, without a softmax; the band
is one for the whole batch; the first network of a pair has no wave (its checkpoints load here, eval is the same).
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import KeyMap, pointwise, within
from saccade.core.record import note
from saccade.core.site import Site
from saccade.parts.convolution import conv_norm
from saccade.parts.head import pool, pooling
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.resnet import BLOCK_NAMES, Bottleneck, resnet_pyramid, resnet_stem

CARD = Card(
    "Attentive WaveBlock: Complementarity-enhanced Mutual Networks for Unsupervised Domain Adaptation in Person "
    "Re-identification and Beyond",
    authors="Wang, Zhao, Liao, Zeng, Liu",
    year=2022,
    systems=("attentive_waveblock",),
    arxiv="2006.06525",
    code="WangWenhao0716/Attentive-WaveBlock@740bcfd",
    licence="MIT",
    read="paper, code",
    keywords="wave block, CBAM, non-local block, mutual learning, domain adaptation, person re-identification",
    params={"awb_resnet50_pre_a": 23675752},
    # Of the authors' six pairs of sets this is the one of their examples.
    weights={
        f"awb_resnet50_{kind}_a": Weights(f"https://drive.google.com/open?id={file}", data="DukeMTMC-reID, Market-1501",
                                          licence="MIT")
        for kind, file in (("pre", "1c9JvTO45ltNlSYHAC99vB4CMmYfqED8V"), ("post", "1hzgXCNhNQdfFn-_CiEzEVik_X7_W_CVT"))
    },
    goldens=("awb_resnet50_pre_a", "op_awb_post", "op_awb_pre", "op_awb_waveblock"),
    tests=("tests/papers/test_attentive_waveblock.py",),
)


class WaveBlock(nn.Module):
    """In training, all rows of (B, *grid, C) times 1.5 but a band of round(0.3 H), one for the batch."""

    def __init__(self, waved: bool = True) -> None:
        super().__init__()
        self.waved = waved

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.waved):
            return x
        rows = x.shape[1]
        return wave(x, torch.randint(0, rows - round(0.3 * rows) + 1, (), device=x.device))


def wave(x: Tensor, start: int | Tensor) -> Tensor:
    """x with its rows times 1.5 but for round(0.3 H) of them from `start` on."""
    row = torch.arange(x.shape[1], device=x.device)
    band = (row >= start) & (row < start + round(0.3 * x.shape[1]))
    return x * torch.where(band, 1.0, 1.5).to(x.dtype).view(-1, *[1] * (x.ndim - 2))


class Cbam(nn.Module):
    """y = x sigmoid(mlp(mean x) + mlp(max x)), then y sigmoid(conv_7x7([max_c y, mean_c y])): (B, *grid, C), same.

    (Woo et al., "CBAM: Convolutional Block Attention Module", 2018, section 3.)
    """

    def __init__(self, rank: int, dim: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim // reduction), nn.Linear(dim // reduction, dim)
        self.spatial = nn.Sequential(*conv_norm(rank, 2, 1, 7))

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.stack([pool(x, "avg"), pool(x, "max")])
        gate = self.fc2(F.relu(self.fc1(pooled))).sum(0).sigmoid()
        x = x * gate.view(x.shape[0], *[1] * (x.ndim - 2), -1)
        place = self.spatial(torch.cat([x.amax(-1, keepdim=True), x.mean(-1, keepdim=True)], -1)).sigmoid()
        note(place)
        return x * place


class NonLocal(nn.Module):
    """x + norm(fc(theta(x) (phi(x)^T g(x)) / N)): scores are dot products over the number N of tokens.

    Without a softmax the product is associative: keys and values meet first, and no N x N scores are made.
    (Wang et al., "Non-local Neural Networks", 2018, section 3.2.)
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = max(dim // 2, 1)
        self.theta, self.phi, self.g = (nn.Linear(dim, inner) for _ in range(3))
        self.proj = nn.Linear(inner, dim)
        self.norm = BatchNorm(dim)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        mixed = self.phi(tokens).transpose(1, 2) @ self.g(tokens) / tokens.shape[1]
        return x + self.norm(self.proj(self.theta(tokens) @ mixed)).view(x.shape)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds in the explicit form, with N x N scores: 2 N C^2 + N^2 C."""
        tokens = prod(grid)
        return 2 * tokens * self.theta.out_features * (2 * site.dim + tokens)


class PreAttention(nn.Module):
    """wave(x + CBAM(x))."""

    def __init__(self, rank: int, dim: int, waved: bool = True) -> None:
        super().__init__()
        self.attention = Cbam(rank, dim)
        self.wave = WaveBlock(waved)

    def forward(self, x: Tensor) -> Tensor:
        return self.wave(self.attention(x) + x)


class PostAttention(nn.Module):
    """The non-local block of wave(x)."""

    def __init__(self, rank: int, dim: int, waved: bool = True) -> None:
        super().__init__()
        self.wave = WaveBlock(waved)
        self.attention = NonLocal(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.wave(x))


class Neck(nn.Module):
    """fc(norm(pool(x))); without classes, the normed feature of length 1. The norm's shift is not trained."""

    def __init__(self, dim: int, num_classes: int, global_pool: str) -> None:
        super().__init__()
        self.pool = pooling(global_pool, dim)
        self.norm = BatchNorm(dim)
        del self.norm.bias
        self.norm.register_buffer("bias", torch.zeros(dim))
        self.fc = nn.Linear(dim, num_classes, bias=False) if num_classes else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.pool(x))
        return F.normalize(x, dim=-1) if self.fc is None else self.fc(x)


_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
SIZES: dict[str, dict[str, Any]] = {
    f"awb_resnet{layers}_{kind}_a": dict(depths=depths, kind=kind, img_size=(256, 128), num_classes=0)
    for layers, depths in _DEPTHS.items() for kind in ("pre", "post")
}
_NANO: dict[str, Any] = dict(depths=(1, 2, 2), dim=16, strides=(1, 2, 1), img_size=32)
SIZES |= {"awb_pre_nano": _NANO | dict(kind="pre"), "awb_post_nano": _NANO | dict(kind="post")}


def attentive_waveblock(
    depths: tuple[int, ...],
    kind: str,
    waved: bool = True,
    dim: int = 64,
    strides: tuple[int, ...] = (1, 2, 2, 1),
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A ResNet with an attentive wave block after the second and third stage; `waved=False`: the attention alone."""
    rank = 2 if isinstance(size := common.get("img_size", 224), int) else len(size)
    widths = [dim * 2**stage for stage in range(len(depths))]

    def end(width: int) -> nn.Module:
        place = PreAttention if kind == "pre" else PostAttention
        return place(rank, width, waved) if width in (8 * dim, 16 * dim) else nn.Identity()

    return resnet_pyramid(
        [4 * width for width in widths], depths, widths=widths, block=Bottleneck, stem_dim=dim, strides=strides,
        stem=partial(resnet_stem, activation=None), stage_norm=end, head=Neck, replace=mixer, **common,
    )


_NON_LOCAL: KeyMap = (
    (r"W\.0\.(.*)", r"proj.\1", pointwise),
    (r"W\.1\.(.*)", r"norm.\1"),
    (r"(theta|phi|g)\.(.*)", r"\1.\2", pointwise),
)
_CBAM: KeyMap = (
    (r"ChannelGate\.mlp\.1\.(.*)", r"fc1.\1"),
    (r"ChannelGate\.mlp\.3\.(.*)", r"fc2.\1"),
    (r"SpatialGate\.spatial\.conv\.(.*)", r"spatial.0.\1"),
    (r"SpatialGate\.spatial\.bn\.(.*)", r"spatial.1.\1"),
)
AUTHORS: KeyMap = (
    (r"base\.0\.(.*)", r"stem.0.\1"),
    (r"base\.1\.(.*)", r"stem.1.\1"),
    *(rule for stage in range(4) for rule in within(BLOCK_NAMES, rf"base\.{stage + 3}\.(\d+)\.",
                                                    rf"stages.{stage}.blocks.\1.")),
    *(rule for stage in (1, 2) for rule in (*within(_CBAM, rf"cbam_{stage}\.", f"stages.{stage}.norm.attention."),
                                            *within(_NON_LOCAL, rf"non_local_{stage}\.",
                                                    f"stages.{stage}.norm.attention."))),
    (r"feat_bn\.(.*)", r"head.norm.\1"),
    (r"classifier\.(.*)", r"head.fc.\1"),
)
TAPS = {r"(?:cbam|non_local)_([12])": r"stages.\1.norm.attention"}
