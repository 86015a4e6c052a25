"""GLMix: convolutions on the fine grid, attention on a few slots, in parallel.

Convolutions see what is near well enough, so that attention need not work a pixel at a time. Beside a convolution,
every block softly clusters the N tokens into S slots, lets the slots attend to one another, and hands them back:
    L = s norm(z) norm(x)^T,   u = attention(softmax_N(L) x),   out = softmax_S(L)^T u + W_2 conv_5(W_1 x),
with z the slots' seeds: means of the map over a coarse grid (or learned vectors), s a learned scale. In the pyramid,
the third stage takes turns with attention over all tokens, the last has attention alone.

Zhu, Wang, Zhang, Lau, "Revisiting the Integration of Convolution and Attention for Vision Backbone", 2024.

Any grid: the cells of the seeds' means cover any grid (they repeat tokens where there are fewer than slots);
convolutions pad with zeros. Quirks kept: seeds are means of the block's input before its position term and its norm;
no activation between the convolutions; batch norms between stages, layer norms in blocks. Models trained with token
labels (`_tklb`) add half the greatest score of any token; their cut and mix in training is not part of the model.
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
from saccade.core.keymap import KeyMap, matrix_from_1x1, within
from saccade.core.record import note
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.pooling import adaptive_mean
from saccade.parts.attention import Attention
from saccade.parts.block import Block
from saccade.parts.convolution import conv_norm, depthwise, grid_conv
from saccade.parts.head import Head
from saccade.parts.merging import ConvMerging, NormedMerging
from saccade.parts.mlp import EarlyLocalMlp, Gelu, Mlp
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem

_PUBLISHED = ("glnet_4g", "glnet_9g", "glnet_16g", "glnet_4g_tklb", "glnet_9g_tklb", "glnet_stl", "glnet_stl_paramslot")

CARD = Card(
    "Revisiting the Integration of Convolution and Attention for Vision Backbone",
    authors="Zhu, Wang, Zhang, Lau",
    year=2024,
    systems=("glmix",),
    arxiv="2411.14429",
    code="rayleizhu/GLMix@3c93dbf",
    licence="MIT",
    read="code",
    keywords="GLMix, GLNet, semantic slots, soft clustering, soft dispatch, parallel convolution and attention",
    kinds=("backbone", "mixer"),
    mixers={"glmix": "GLMix"},
    params=dict(zip(_PUBLISHED, (27e6, 60e6, 106e6, 27e6, 61e6, 30e6, 30e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (4.5e9, 9.7e9, 16.7e9, 4.5e9, 9.7e9, 4.4e9, 4.4e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (83.7, 84.5, 85.0, 84.4, 85.3, 82.5, 82.1), strict=True)),
    weights={name: Weights(f"https://1drv.ms/u/s!AkBbczdRlZvC{share}")
             for name, share in (
                 ("glnet_4g", "yG9DjS_AMqnJQiX1?e=tOkhHP"), ("glnet_9g", "yEGFQ6kfWV-wVZei?e=wWwR8z"),
                 ("glnet_16g", "yjaBxC3h-B8CHWMm?e=GfR0kg"), ("glnet_4g_tklb", "yAWcOdlTUa2J3vsX?e=wE4ch1"),
                 ("glnet_9g_tklb", "ynPEcg-fC7ZDCMEt?e=bwufeR"), ("glnet_stl", "yBFaAILEMu_dtbbV?e=9Ghhi3"),
                 ("glnet_stl_paramslot", "yG0eat5zCE9upcQR?e=vmbmo1"))},
    goldens=("glnet_4g", "op_glmix_block", "op_glmix_block_paramslot"),
)


class GLMix(nn.Module):
    """out = softmax_S(L)^T attention(softmax_N(L) x) + W_2 conv(W_1 x): (B, *grid, C) -> (B, *grid, C).

    `slots` is S, a whole power of the rank unless the seeds are `learned`; `context` (B, S, C) are seeds from elsewhere
    (a block gives those of its own input). Raises SaccadeError for a number of slots that makes no coarse grid.
    (Zhu et al., GLMix, 2024.)
    """

    ranks, weights, context = (1, 2, 3), True, True
    template = Template(
        "x l^T to semantic slots l, and w[j - i]",
        "softmax over tokens in, over slots out",
        "sum of slots after attention, and of the convolution",
    )
    undecayed = ("scale",)

    def __init__(self, site: Site, slots: int = 64, kernel: int = 5, learned: bool = False) -> None:
        super().__init__()
        side = round(slots ** (1 / site.rank))
        if not learned and side**site.rank != slots:
            raise SaccadeError(f"slots={slots}: pooled seeds stand on a grid, choose {side**site.rank} or another "
                               f"whole number to the power {site.rank}, or learned=True")
        self.coarse, self.count, self.heads = (side,) * site.rank, slots, site.heads
        self.scale = nn.Parameter(torch.tensor(site.dim**-0.5))
        self.learned = nn.Parameter(torch.randn(1, slots, site.dim) * 0.02) if learned else None
        self.attention = Attention(Site(site.dim, site.heads, grid=(slots,)))
        self.local = nn.Sequential(
            nn.Linear(site.dim, site.dim), depthwise(site.rank, site.dim, kernel), nn.Linear(site.dim, site.dim)
        )
        self.kernel = kernel

    def seeds(self, x: Tensor) -> Tensor:
        """Where the slots start for a map (B, *grid, C): (B, S, C), or (1, S, C) learned."""
        return adaptive_mean(x, self.coarse).flatten(1, -2) if self.learned is None else self.learned

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        seeds = F.normalize(self.seeds(x) if context is None else context, dim=-1)
        tokens = x.flatten(1, -2)
        # Rows of logits are divided by the norms of their tokens: no second map of unit tokens.
        logits = tokens @ (self.scale * seeds).mT / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        group, dispatch = logits.softmax(1).mT, logits.softmax(-1)
        note(group[:, None])
        note(dispatch[:, None])
        out = dispatch @ self.attention(group @ tokens)
        return out.view(x.shape) + self.local(x)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: N C (2 C + kernel^rank + 3 S), and attention among S slots."""
        tokens = prod(grid) * site.dim * (2 * site.dim + self.kernel**site.rank + 3 * self.count)
        return tokens + Attention.cost(site, (self.count,))

    def reach(self, site: Site) -> None:
        """Every token reaches every other, through the slots."""
        return None


class SeededBlock(Block):
    """A block whose slots start from the means of its input, before the position term and the norm."""

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        if isinstance(self.mixer, GLMix):
            optional["context"] = self.mixer.seeds(x)
        return super().forward(x, **optional)


class TokenLabels(nn.Linear):
    """fc(pooled) + max over tokens of fc'(map) / 2: scores of the image, helped by its most certain token."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        self.tokens = nn.Linear(dim, num_classes)

    def forward(self, pooled: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        best = self.tokens(x).flatten(1, -2).amax(1)
        return super().forward(pooled) + 0.5 * best.view(x.shape[0], *[1] * (pooled.ndim - 2), -1)


class TokenLabelHead(Head):
    """A head trained with token labels: (B, *grid, C) -> (B, classes). (Jiang et al., LV-ViT, 2021.)"""

    def __init__(self, dim: int, num_classes: int, global_pool: str = "avg") -> None:
        super().__init__(dim, num_classes, global_pool)
        if num_classes:
            self.fc = TokenLabels(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x)
        return self.fc(pooled, x) if isinstance(self.fc, TokenLabels) else pooled


def overlapped_stem(rank: int, in_chans: int, dim: int, patch: int) -> ConvStem:
    """Two 3x3 convolutions with stride and batch norms; the first place is the authors' input norm, never used."""
    return ConvStem(nn.Identity(), *conv_norm(rank, in_chans, dim // 2, stride=2, bias=True), Gelu(),
                    *conv_norm(rank, dim // 2, dim, stride=patch // 2, bias=True))


def patch_stem(rank: int, in_chans: int, dim: int, patch: int) -> ConvStem:
    """Patches and a batch norm; sides that are no multiple lose their rest, as in the authors' code."""
    return ConvStem(grid_conv(rank, in_chans, dim, patch, stride=patch), BatchNorm(dim), least=patch)


_DEEP: dict[str, Any] = dict(depths=(4, 4, 18, 4))
_SWIN: dict[str, Any] = dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), swin_layout=True)
SIZES: dict[str, dict[str, Any]] = {
    "glnet_4g": _DEEP | dict(dims=(64, 128, 256, 512)),
    "glnet_9g": _DEEP | dict(dims=(96, 192, 384, 768)),
    "glnet_16g": _DEEP | dict(dims=(128, 256, 512, 1024), layer_scale=1e-4),
    "glnet_4g_tklb": _DEEP | dict(dims=(64, 128, 256, 512), token_labels=True),
    "glnet_9g_tklb": _DEEP | dict(dims=(96, 192, 384, 768), token_labels=True),
    "glnet_stl": _SWIN,
    "glnet_stl_paramslot": _SWIN | dict(learned=True),
    "glmix_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), slots=16, patch=2, img_size=32),
}


def glmix(
    dims: Sequence[int],
    depths: Sequence[int],
    slots: int = 64,
    kernel: int = 5,
    learned: bool = False,
    swin_layout: bool = False,
    layer_scale: float | None = None,
    token_labels: bool = False,
    patch: int = 4,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A GLNet of a size, or with `swin_layout` its plain form: patches, no position term, slots in stages 1 to 3."""
    last = len(dims) - 1

    def own(site: Site) -> nn.Module:
        turns = not swin_layout and site.stage == last - 1 and site.index % 2 == 1
        return Attention(site) if site.stage == last or turns else GLMix(site, slots, kernel, learned)

    def block(site: Site, mixer: nn.Module, drop_path: float) -> SeededBlock:
        wide = partial(Mlp, ratio=4.0) if swin_layout else partial(EarlyLocalMlp, site.rank, ratio=3.0)
        position = None if swin_layout else depthwise(site.rank, site.dim, 3)
        return SeededBlock(site, mixer, drop_path=drop_path, mlp=wide, layer_scale=layer_scale, position=position)

    return Pyramid(
        dims, depths, [max(dim // 32, 1) for dim in dims],
        stem=partial(patch_stem if swin_layout else overlapped_stem, patch=patch), stride=patch,
        downsample=partial(NormedMerging if swin_layout else ConvMerging, norm=BatchNorm), block=block, mixer=own,
        norm=BatchNorm, head=TokenLabelHead if token_labels else Head, replace=mixer, **common,
    )


BLOCK: KeyMap = (
    (r"pos_conv\.(.*)", r"position.\1"),
    (r"slot_scale", "mixer.scale"),
    (r"init_slots", "mixer.learned"),
    (r"relation_mha\.in_proj_(.*)", r"mixer.attention.qkv.\1"),
    (r"relation_mha\.out_proj\.(.*)", r"mixer.attention.proj.\1"),
    (r"mha_op\.in_proj_(.*)", r"mixer.qkv.\1"),
    (r"mha_op\.out_proj\.(.*)", r"mixer.proj.\1"),
    (r"feature_conv\.([02])\.weight", r"mixer.local.\1.weight", matrix_from_1x1),
    (r"feature_conv\.(.*)", r"mixer.local.\1"),
    (r"mlp\.0\.weight", r"mlp.fc1.weight", matrix_from_1x1),
    (r"mlp\.0\.bias", r"mlp.fc1.bias"),
    (r"mlp\.1\.(.*)", r"mlp.local.\1"),
    (r"mlp\.[23]\.weight", r"mlp.fc2.weight", matrix_from_1x1),
    (r"mlp\.[23]\.bias", r"mlp.fc2.bias"),
    (r"ls(\d)\.gamma", r"scale\1.0.gamma", torch.flatten),
    (r"(norm.*)", r"\1"),
)
AUTHORS: KeyMap = (
    *within(BLOCK, r"stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"downsample_layers\.0\.(.*)", r"stem.\1"),
    (r"downsample_layers\.(\d+)\.(.*)", r"stages.\1.downsample.\2"),
    (r"head\.(.*)", r"head.fc.\1"),
    (r"tklb_aux_head\.(.*)", r"head.fc.tokens.\1"),
)
TAPS = {r"stage(\d)": r"stages.\1"}
