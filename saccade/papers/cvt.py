"""CvT: a pyramid of Transformers whose tokens come from convolutions, and whose queries, keys and values do too.

Each stage begins with overlapping patches, and the linear projections of attention are preceded by depthwise 3x3
convolutions with batch norm, of stride 2 for keys and values:
    out = proj(softmax(q k^T / sqrt(C)) v),   q = W_q norm(conv(x)),   k, v = W_k,v norm(conv_stride 2(x)).
Convolutions tell places apart, so there is no position embedding. A class token joins in the last stage.

Wu et al., "CvT: Introducing Convolutions to Vision Transformers", 2021, section 3.

Any grid, without padding but the convolutions' own. Quirks kept: logits are scaled by the whole width, not a head's;
the stem's 7x7 convolution pads by 2; GELU is x sigmoid(1.702 x); the class token passes the convolutions by.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, within, without_first_axis
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.parts.attention import check_heads
from saccade.parts.block import Block
from saccade.parts.convolution import AveragePool, conv_norm
from saccade.parts.merging import ConvMerging
from saccade.parts.mlp import Mlp
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed
from saccade.parts.token_pyramid import TokenPyramid
from saccade.parts.tokens import join, split, strided_tokens, token_numbers

CARD = Card(
    "CvT: Introducing Convolutions to Vision Transformers",
    authors="Wu, Xiao, Codella, Liu, Dai, Yuan, Zhang",
    year=2021,
    systems=("cvt",),
    arxiv="2103.15808",
    code="microsoft/CvT@f851e68",
    licence="MIT",
    read="paper",
    keywords="convolutional token embedding, convolutional projection, squeezed keys and values, no position embedding",
    kinds=("backbone", "mixer"),
    mixers={"convolutional_projection": "ConvolutionalProjection"},
    params={"cvt_13": 20e6, "cvt_21": 32e6, "cvt_13_384": 20e6, "cvt_21_384": 32e6, "cvt_w24": 277e6},
    macs={"cvt_13": 4.5e9, "cvt_21": 7.1e9, "cvt_13_384": 16.3e9, "cvt_21_384": 24.9e9, "cvt_w24": 193.2e9},
    top1={"cvt_13": 81.6, "cvt_21": 82.5, "cvt_13_384": 83.0, "cvt_21_384": 83.3},
    aliases={"cvt_w24_384": "cvt_w24"},
    weights={  # one folder
        name: Weights(f"https://1drv.ms/u/s!AhIXJn_J-blW9RzF3rMW7SsLHa8h?e=blQ0Al#{name}", data=data, top1=top1)
        for name, data, top1 in (
            ("cvt_13", "ImageNet-1K", None), ("cvt_21", "ImageNet-1K", None), ("cvt_13_384", "ImageNet-1K", None),
            ("cvt_21_384", "ImageNet-1K", None), ("cvt_w24", "ImageNet-22K, ImageNet-1K", 87.6),
        )
    },
    goldens=("cvt_13", "op_cvt_conv_attention", "op_cvt_conv_attention_avg"),
)

METHODS = ("dw_bn", "avg", "linear")


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class ConvolutionalProjection(nn.Module):
    """out = proj(softmax(q k^T / sqrt(C)) v), q, k and v linear after a projection of the map.

    (B, *grid, C) -> (B, *grid, C). The projection is a depthwise convolution with batch norm ("dw_bn"), an average
    pooling ("avg", of keys and values alone) or nothing ("linear"); `stride` thins keys and values. Prefix tokens join
    after it. (Wu et al., CvT, 2021, section 3.2.)
    """

    ranks, prefix, weights = (1, 2, 3), True, True
    template = Template("q k^T / sqrt(C) of convolved tokens", "softmax", "sum of v, convolved")

    def __init__(
        self, site: Site, kernel: int = 3, stride: int = 2, method: str = "dw_bn", qkv_bias: bool = True
    ) -> None:
        super().__init__()
        check_heads(site)
        if method not in METHODS:
            raise SaccadeError(f"method={method!r}: choose one of {METHODS}")
        self.heads, self.kernel, self.stride, self.method = site.heads, kernel, stride, method

        def project(stride: int) -> nn.Module:
            if method == "dw_bn":
                return nn.Sequential(*conv_norm(site.rank, site.dim, site.dim, kernel, stride, groups=site.dim))
            if method == "avg" and stride > 1:
                return AveragePool(kernel, stride, kernel // 2, ceil_mode=True)
            return nn.Identity()

        self.local = nn.ModuleList(project(step) for step in (1, stride, stride))
        self.q, self.k, self.v = (nn.Linear(site.dim, site.dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Any:
        maps = [local(x) for local in self.local]
        q, k, v = (linear(join(part, prefix)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for linear, part in zip((self.q, self.k, self.v), maps, strict=True))
        count = 0 if prefix is None else prefix.shape[1]

        def where() -> tuple[Tensor, Tensor]:
            keys = strided_tokens(tuple(x.shape[1:-1]), tuple(maps[1].shape[1:-1]), self.stride, count, x.device)
            return token_numbers(q.shape[2], x.device), keys

        out = attend(q, k, v, scale=x.shape[-1] ** -0.5, where=where).transpose(1, 2).flatten(2)
        return split(self.proj(out), x, prefix)

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds of N queries and M keys: convolutions (N + 2 M) C k^rank, projections 2 (N + M) C^2, attention
        2 N M C.
        """
        queries, keys = prod(grid), prod(self._thinned(side) for side in grid)
        local = self.kernel**site.rank * (queries + 2 * keys) if self.method == "dw_bn" else 0
        queries, keys = queries + prefix, keys + prefix
        return site.dim * (local + 2 * (queries + keys) * site.dim + 2 * queries * keys)

    def _thinned(self, side: int) -> int:
        """Keys along an axis; the pooling rounds up."""
        if self.method == "linear":
            return side
        steps = side + 2 * (self.kernel // 2) - self.kernel
        return 1 + (-(-steps // self.stride) if self.method == "avg" else steps // self.stride)

    def reach(self, site: Site) -> None:
        """Every token reaches every other, thinned by the stride."""
        return None


_SMALL: dict[str, Any] = dict(dims=(64, 192, 384), depths=(1, 2, 10), heads=(1, 3, 6))
SIZES: dict[str, dict[str, Any]] = {
    "cvt_13": _SMALL,
    "cvt_21": _SMALL | dict(depths=(1, 4, 16)),
    "cvt_13_384": _SMALL | dict(img_size=384),
    "cvt_21_384": _SMALL | dict(depths=(1, 4, 16), img_size=384),
    "cvt_w24": dict(dims=(192, 768, 1024), depths=(2, 2, 20), heads=(3, 12, 16), img_size=384),
    "cvt_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), heads=(1, 2, 4), kernel=3, padding=1, patch=2,
                     img_size=32),
}


def cvt(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    kernel: int = 7,
    patch: int = 4,
    padding: int = 2,
    ratio: float = 4.0,
    method: str = "dw_bn",
    qkv_bias: bool = True,
    class_token: bool = True,
    mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A CvT of a size; `kernel` and `padding` are the stem's. Without a class token the head reads the mean."""

    def block(site: Site, mixer: nn.Module, drop_path: float, kind: type[Block] = Block) -> Block:
        mlp = partial(Mlp, ratio=ratio, activation=QuickGelu)
        return kind(site, mixer, drop_path=drop_path, norm=nn.LayerNorm, mlp=mlp)

    make = TokenPyramid if class_token else Pyramid
    return make(
        dims, depths, heads,
        stem=partial(PatchEmbed, kernel=kernel, stride=patch, padding=padding, norm=nn.LayerNorm),
        stride=patch, downsample=ConvMerging, block=block,
        mixer=partial(ConvolutionalProjection, method=method, qkv_bias=qkv_bias), norm=nn.LayerNorm, replace=mixer,
        **common,
    )


MIXER: KeyMap = (
    *((rf"conv_proj_{letter}\.{theirs}\.(.*)", rf"local.{number}.{ours}.\1")
      for number, letter in enumerate("qkv") for ours, theirs in enumerate(("conv", "bn"))),
    (r"proj_([qkv])\.(.*)", r"\1.\2"),
    (r"proj\.(.*)", r"proj.\1"),
)
AUTHORS: KeyMap = (
    (r"stage0\.patch_embed\.(.*)", r"stem.\1"),
    (r"stage(\d)\.patch_embed\.proj\.(.*)", r"stages.\1.downsample.0.\2"),
    (r"stage(\d)\.patch_embed\.norm\.(.*)", r"stages.\1.downsample.1.\2"),
    (r"stage(\d)\.cls_token", r"stages.\1.class_token", without_first_axis),
    *within(MIXER, r"stage(\d)\.blocks\.(\d+)\.attn\.", r"stages.\1.blocks.\2.mixer."),
    (r"stage(\d)\.(.*)", r"stages.\1.\2"),
)
TAPS = {f"stage{number + 1}": f"stages.{number}" for number in range(3)}
