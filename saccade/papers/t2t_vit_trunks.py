"""T2T-ViT with trunks borrowed from convolutional networks: squeeze and excitation, ghost, dense.

Which designs of convolutional networks help a vision transformer? Behind the tokens-to-token stem,
    squeeze:  attention(x) * sigmoid(fc2(relu(fc1(mean over all tokens))));
    ghost:    half of every q, k, v, and two thirds of the hidden units of the MLP, are copies of the rest, scaled;
    dense:    x = [x, linear(block(x))] in stages, between them gelu(linear(x)) to half the channels.
The paper keeps the deep and narrow plain trunk.

Yuan, Chen, Wang, Yu, Shi, Jiang, Tay, Feng, Yan, "Tokens-to-Token ViT: Training Vision Transformers from Scratch on
ImageNet", 2021, sections 3.2 and 4.3.

Any grid: as T2T-ViT.
Quirks kept: the class token is squeezed with the others; in the dense trunk drop path grows from stage to stage, by
elevenths of its rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer, create_model, hybrid_mixer
from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.keymap import KeyMap, within
from saccade.core.load import key_maps
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.parts.attention import Attention, check_heads
from saccade.parts.mlp import Mlp
from saccade.parts.plain import Plain, TokenBlock, beside_prefix, initialise
from saccade.parts.pyramid import drop_path_rates
from saccade.parts.squeeze import SqueezeExcite
from saccade.parts.tokens import global_tokens, join, split

_HOST = "t2t_vit_14"

CARD = Card(
    "Tokens-to-Token ViT: the trunks that it compares",
    authors="Yuan, Chen, Wang, Yu, Shi, Jiang, Tay, Feng, Yan",
    year=2021,
    arxiv="2101.11986",
    code="yitu-opensource/T2T-ViT@0f63dc9",
    licence="BSD-3-Clause-Clear",
    read="paper, code",
    keywords="squeeze and excitation, ghost attention, dense connections in a vision transformer",
    kinds=("backbone", "mixer"),
    mixers={"squeezed_attention": "SqueezedAttention", "ghost_attention": "GhostAttention"},
    tests=("tests/papers/test_t2t_vit_trunks.py",),
)


class SqueezedAttention(Attention):
    """Attention, then squeeze and excitation over all tokens, the prefix among them."""

    template = Template("q k^T / sqrt(d)", "softmax", "sum of v, channels weighed by the mean of all")

    def __init__(self, site: Site, qkv_bias: bool = False, reduction: int = 16) -> None:
        super().__init__(site, qkv_bias)
        hidden = max(site.dim // reduction, 1)
        self.squeeze = SqueezeExcite(site.dim, hidden)
        self.squeeze.fc1 = nn.Linear(site.dim, hidden, bias=False)
        self.squeeze.fc2 = nn.Linear(hidden, site.dim, bias=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, prefix: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        mixed = super().forward(x, prefix) if prefix is not None else (super().forward(x), None)
        return split(self.squeeze(join(*mixed)), x, prefix)

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:  # type: ignore[override]
        """Multiply-adds: those of attention, and two small layers an image."""
        return super().cost(site, grid, prefix) + 2 * site.dim * self.squeeze.fc1.out_features


class GhostAttention(nn.Module):
    """Attention whose q, k, v are half projected, half copies of that half with a factor a channel."""

    ranks, prefix, weights = (1, 2, 3), True, True
    template = Template("q k^T / sqrt(d), half of both copied cheaply", "softmax", "sum of v")

    def __init__(self, site: Site, qkv_bias: bool = False) -> None:
        super().__init__()
        check_heads(site)
        if site.dim % 2:
            raise SaccadeError(f"{site.dim} channels: one half of them copies the other, so give an even number")
        self.heads = site.heads
        self.qkv = nn.Linear(site.dim, 3 * (site.dim // 2), bias=qkv_bias)
        self.copies = nn.Parameter(torch.ones(3, site.dim // 2))
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        half = self.qkv(join(x, prefix)).unflatten(-1, (3, -1))
        qkv = torch.cat([half, half * self.copies], -1).unflatten(-1, (self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, where=lambda: global_tokens(q.shape[-2], x.device))
        return split(self.proj(out.transpose(1, 2).flatten(2)), x, prefix)

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds: 2.5 N C^2 for the projections, 1.5 N C for the copies, 2 N^2 C for the products."""
        tokens, half = prod(grid) + prefix, site.dim // 2
        return tokens * (3 * half * (site.dim + 1) + site.dim**2) + 2 * tokens**2 * site.dim

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


class GhostMlp(nn.Module):
    """fc2([h, gelu(a h), gelu(b h)]), h = gelu(fc1(x)): two thirds of the hidden units copy the others, scaled."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.copies = nn.Parameter(torch.ones(2, dim))
        self.fc2 = nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x))
        return self.fc2(torch.cat([hidden, *(F.gelu(hidden * copy) for copy in self.copies)], -1))


class DenseBlock(TokenBlock):
    """[x, linear(block(x))]: each block adds `growth` channels to what came before it."""

    def __init__(self, site: Site, mixer: nn.Module, growth: int, **options: Any) -> None:
        super().__init__(site, mixer, **options)
        self.grow = nn.Linear(site.dim, growth)

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        return torch.cat([tokens, self.grow(super().forward(tokens, count, grid))], -1)


class Transition(nn.Module):
    """gelu(linear(x)) to half the channels, between the stages of a dense trunk."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim // 2)

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:
        return F.gelu(self.linear(tokens))


SIZES: dict[str, dict[str, Any]] = {
    "t2t_vit_14_se": dict(builder="squeezed"),
    "t2t_vit_16_ghost": dict(builder="ghost", depth=16),
    "t2t_vit_dense": dict(builder="dense", dim=128, depths=(3, 6, 6, 4), heads=8, growth=64),
    "t2t_vit_ghost_nano": dict(builder="ghost", host="t2t_vit_nano", depth=4),
    "t2t_vit_dense_nano": dict(builder="dense", host="t2t_vit_nano", dim=32, depths=(1, 2), heads=2, growth=16),
}


def squeezed(host: str = _HOST, mixer: Any = None, **common: Any) -> Backbone:
    """The T2T-ViT `host` with squeeze and excitation behind every attention."""
    return create_model(host, mixer=hybrid_mixer(SqueezedAttention, mixer), **common)


def ghost(depth: int, host: str = _HOST, mixer: Any = None, **common: Any) -> Backbone:
    """The T2T-ViT `host`, of another depth, with ghost attention and ghost MLPs."""
    model = create_model(host, depth=depth, mixer=hybrid_mixer(GhostAttention, mixer), **common)
    assert isinstance(model, Plain)
    for block in model.blocks:
        block.mlp = GhostMlp(model.num_features).apply(partial(initialise, spread=0.02))
    return model


def dense(
    dim: int, depths: Sequence[int], heads: int, growth: int, mlp_ratio: float = 2.0, host: str = _HOST,
    drop_path_rate: float = 0.0, prefix_mode: str | None = None, mixer: Any = None, num_classes: int = 1000,
    **common: Any,
) -> Backbone:
    """`host`'s stem, then blocks that each add `growth` channels, in stages of `depths`; between them transitions."""
    model = create_model(host, dim=dim, depth=1, heads=heads, num_classes=0, **common)
    assert isinstance(model, Plain)
    stride, prefix = model.feature_info.reduction()[0], model.prefix_count
    build_mixer = choose_mixer(mixer, partial(Attention, qkv_bias=False))
    rates = drop_path_rates(drop_path_rate, 12)  # by the stage
    blocks: list[nn.Module] = []
    names: list[str] = []
    ends = []
    model.feature_info = FeatureInfo()

    def append(block: nn.Module, channels: int) -> int:
        model.feature_info.append(dict(num_chs=channels, reduction=stride, module=f"blocks.{len(blocks)}"))
        blocks.append(block)
        return channels

    for stage, depth in enumerate(depths):
        if stage:
            dim = append(Transition(dim), dim // 2)
        for _ in range(depth):
            site = Site(dim, heads, 0, len(names), stride, model.grid)
            names.append(f"blocks.{len(blocks)}")
            built = beside_prefix(build_mixer(site, names[-1]), prefix, prefix_mode)
            dim = append(DenseBlock(site, built, growth, drop_path=rates[stage], norm=nn.LayerNorm,
                                    mlp=partial(Mlp, ratio=mlp_ratio)), dim + growth)
        ends.append(len(blocks) - 1)
    check_patterns(mixer, names)
    model.blocks = nn.ModuleList(blocks).apply(partial(initialise, spread=0.02))
    model.norm, model.num_features, model.default_out_indices = nn.LayerNorm(dim), dim, tuple(ends)
    model.reset_classifier(num_classes)
    return model


def _row(weight: Tensor) -> Tensor:
    """The weight (C, 1, 1) of a depthwise 1x1 convolution as a row of factors."""
    return weight.view(1, -1)


_BLOCK: KeyMap = (
    *((rf"attn\.{part}\.(.*)", rf"mixer.qkv.\1#{place}") for place, part in enumerate("qkv")),
    *((rf"attn\.cheap_operation_{part}\.weight", f"mixer.copies#{place}", _row) for place, part in enumerate("qkv")),
    *((rf"mlp\.cheap_operation{number}\.weight", f"mlp.copies#{number}", _row) for number in (2, 3)),
    (r"attn\.se_layer\.fc\.0\.(.*)", r"mixer.squeeze.fc1.\1"),
    (r"attn\.se_layer\.fc\.2\.(.*)", r"mixer.squeeze.fc2.\1"),
    (r"dense_linear\.(.*)", r"grow.\1"),
)


def AUTHORS(name: str) -> KeyMap:
    """The authors' names: those of T2T-ViT but for the trunks' own."""
    return (*within(_BLOCK, r"blocks\.(\d+)\.", r"blocks.\1."), *key_maps(_HOST)["authors"])


def TAPS(name: str) -> dict[str, str]:
    """Where inner outputs of the authors' model are."""
    depths = SIZES[name].get("depths", (SIZES[name].get("depth", 14),))
    return {"t2t": "stem", "block_last": f"blocks.{sum(depths) + len(depths) - 2}", r"block(\d+)": r"blocks.\1"}
