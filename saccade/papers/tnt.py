"""TNT: a transformer inside every patch of a transformer.

Patches are sentences, and the small patches that each is cut into are its words. An inner transformer lets the words of
one sentence attend to each other, an outer one the sentences; before the outer one the words are added to their
sentence,
    W += attention(norm(W)),  W += mlp(norm(W)),    S += norm(linear(norm(vec(W)))),    S = outer transformer(S),
with W (B x N, words, c) and S (B, 1 + N, C). The class token is a sentence without words. c is so small that the inner
transformers cost a tenth of the whole.

Han, Xiao, Wu, Guo, Xu, Wang, "Transformer in Transformer", 2021, section 2.

Any grid: the image is zero-padded at its end to whole patches; the positions of sentences are resampled (bicubic),
those of words are the same in every patch.
Quirks kept: words come from a 7x7 convolution inside each patch, which sees zeros beyond its border; the words' way
into the sentence is not subject to drop path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import HALF, Card, Weights
from saccade.core.keymap import Dropped, KeyMap, within, without_first_axis
from saccade.core.site import Site
from saccade.ops.window import partition
from saccade.parts.attention import Attention
from saccade.parts.block import LAYER_NORM, Block, Norm
from saccade.parts.convolution import grid_conv
from saccade.parts.mlp import Mlp
from saccade.parts.plain import Plain, TokenBlock, initialise
from saccade.parts.position import is_native
from saccade.parts.stem import pad_image
from saccade.parts.tokens import join

_ADDRESS = "https://github.com/huawei-noah/Efficient-AI-Backbones/releases/download/tnt/"

CARD = Card(
    "Transformer in Transformer",
    authors="Han, Xiao, Wu, Guo, Xu, Wang",
    year=2021,
    systems=("tnt",),
    arxiv="2103.00112",
    code="huawei-noah/Efficient-AI-Backbones@f90e129",
    read="paper",  # and timm's port (Apache-2.0)
    keywords="inner and outer transformer, visual words and sentences, attention within patches, pixel embedding",
    kinds=("backbone",),
    params={"tnt_ti": 6.1e6, "tnt_s": 23.8e6, "tnt_b": 65.6e6},
    macs={"tnt_ti": 1.4e9, "tnt_s": 5.2e9, "tnt_b": 14.1e9},
    top1={"tnt_ti": 73.9, "tnt_s": 81.5, "tnt_b": 82.9},
    aliases={"tnt_t": "tnt_ti", "tnt_tiny": "tnt_ti", "tnt_s_patch16_224": "tnt_s", "tnt_b_patch16_224": "tnt_b"},
    weights={name: Weights(f"{_ADDRESS}{name}_{score}.pth.tar", mean=HALF, std=HALF, crop=0.9)
             for name, score in (("tnt_s", 81.5), ("tnt_b", 82.9))},
    goldens=("tnt_s", "op_tnt_block"),
    tests=("tests/papers/test_tnt.py",),
)


class Words(nn.Module):
    """image (B, C, *size) -> (B, *grid, *words, dim): each patch, alone, through a 7x7 convolution with stride."""

    def __init__(self, rank: int, in_chans: int, dim: int, patch: int, stride: int) -> None:
        super().__init__()
        self.patch = (patch,) * rank
        self.words = (-(-patch // stride),) * rank
        self.proj = grid_conv(rank, in_chans, dim, 7, stride=stride, padding=3)

    def forward(self, image: Tensor) -> Tensor:
        x = pad_image(image, self.patch[0]).movedim(1, -1)
        grid = [side // part for side, part in zip(x.shape[1:-1], self.patch, strict=True)]
        words = self.proj(partition(x, self.patch).unflatten(1, self.patch))
        return words.unflatten(0, (image.shape[0], *grid))


class WordAttention(Attention):
    """Attention among the words of one sentence: (B x N, *words, c) -> same. No class token stands among them."""

    prefix = False


class Fusion(nn.Sequential):
    """norm(linear(norm(vec(words)))): (B x N, *words, c) -> (B, N, C)."""

    def __init__(self, words: int, dim: int, norm: Norm, bias: bool) -> None:
        super().__init__(norm(words), nn.Linear(words, dim, bias=bias), norm(dim))
        self.width = words

    def forward(self, words: Tensor, batch: int) -> Tensor:  # type: ignore[override]
        return super().forward(words.reshape(batch, -1, self.width))


class NestedBlock(TokenBlock):
    """The inner block on words, the words into their sentences, the outer block (with the mixer) on sentences.

    `inner` is the site of the words of a sentence. (Han et al., TNT, 2021, equations 2-6.)
    """

    def __init__(
        self, site: Site, mixer: nn.Module, *, inner: Site, inner_ratio: float = 4.0, mlp_ratio: float = 4.0,
        qkv_bias: bool = False, drop_path: float = 0.0, norm: Norm = LAYER_NORM,
    ) -> None:
        super().__init__(site, mixer, drop_path=drop_path, norm=norm, mlp=partial(Mlp, ratio=mlp_ratio))
        self.inner = Block(inner, WordAttention(inner, qkv_bias), drop_path=drop_path, norm=norm,
                           mlp=partial(Mlp, ratio=inner_ratio))
        self.fusion = Fusion(prod(inner.grid) * inner.dim, site.dim, norm, bias=False)

    def forward(  # type: ignore[override]
        self, words: Tensor, tokens: Tensor, count: int, grid: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        words = self.inner(words)
        sentences = tokens[:, count:] + self.fusion(words, tokens.shape[0])
        return words, super().forward(torch.cat([tokens[:, :count], sentences], 1), count, grid)


class TNT(Plain):
    """A Plain of sentences whose blocks carry the words of every sentence beside them."""

    undecayed = ("prefix", "position", "word_position")

    def __init__(
        self, *args: Any, inner_dim: int, inner_heads: int, word_stride: int, patch: int,
        block: Callable[..., nn.Module] = NestedBlock, norm: Norm = nn.LayerNorm, in_chans: int = 3,
        img_size: Any = 224, **options: Any,
    ) -> None:
        rank = 2 if isinstance(img_size, int) else len(img_size)
        inner = Site(inner_dim, inner_heads, stride=word_stride, grid=(-(-patch // word_stride),) * rank)
        super().__init__(*args, patch=patch, block=partial(block, inner=inner), norm=norm, in_chans=in_chans,
                         img_size=img_size, **options)
        words = prod(inner.grid)
        self.stem = Words(rank, in_chans, inner_dim, patch, word_stride)  # type: ignore[assignment]
        self.word_position = nn.Parameter(torch.empty(1, words, inner_dim))
        self.fusion = Fusion(words * inner_dim, self.num_features, norm, bias=True)
        self.fusion.apply(partial(initialise, spread=0.02))
        nn.init.trunc_normal_(self.word_position, std=0.02)

    def embed(self, image: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """What enters the first block: words (B x N, *words, c), sentences (B, 1 + N, C); and the grid of sentences."""
        rank = len(self.grid)
        words = self.stem(image)
        grid = tuple(words.shape[1:rank + 1])
        words = words.flatten(0, rank) + self.word_position.unflatten(1, words.shape[rank + 1:-1])
        sentences = self.fusion(words, image.shape[0]).unflatten(1, grid)
        prefix = None if self.prefix is None else self.prefix.expand(image.shape[0], -1, -1)
        position = self.position if is_native(grid, self.grid) else self._position_at(self.position, self.grid, grid)
        return words, join(sentences, prefix) + position, grid

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The sentences (B, 1 + N, C) that enter the first block, and their grid."""
        _, tokens, grid = self.embed(image)
        return tokens, grid

    def features(self, image: Tensor) -> list[Tensor]:
        """The map of sentences after each block, (B, C, *grid), channels-last in memory."""
        words, tokens, grid = self.embed(image)
        maps = []
        for block in self.blocks:
            words, tokens = block(words, tokens, self.prefix_count, grid)
            maps.append(tokens[:, self.prefix_count:].unflatten(1, grid).movedim(-1, 1))
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """The sentences (B, 1 + N, C) after the final norm."""
        words, tokens, grid = self.embed(image)
        for block in self.blocks:
            words, tokens = block(words, tokens, self.prefix_count, grid)
        return self.norm(tokens)


SIZES: dict[str, dict[str, Any]] = {
    "tnt_ti": dict(dim=192, depth=12, heads=3, inner_dim=12, inner_heads=2),
    "tnt_s": dict(dim=384, depth=12, heads=6, inner_dim=24, inner_heads=4),
    "tnt_b": dict(dim=640, depth=12, heads=10, inner_dim=40, inner_heads=4),
    "tnt_nano": dict(dim=64, depth=4, heads=2, inner_dim=8, inner_heads=2, patch=4, word_stride=2, img_size=32),
}


def tnt(
    dim: int,
    depth: int,
    heads: int,
    inner_dim: int,
    inner_heads: int,
    patch: int = 16,
    word_stride: int = 4,
    mlp_ratio: float = 4.0,
    inner_ratio: float = 4.0,
    qkv_bias: bool = False,
    mixer: Any = None,
    **common: Any,
) -> TNT:
    """A TNT of a size; `mixer` takes the place of the attention between sentences."""
    block = partial(NestedBlock, inner_ratio=inner_ratio, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias)
    return TNT(dim, depth, heads, inner_dim=inner_dim, inner_heads=inner_heads, patch=patch, word_stride=word_stride,
               mixer=partial(Attention, qkv_bias=qkv_bias), block=block, replace=mixer, **common)


def _qkv(theirs: str, ours: str) -> KeyMap:
    return ((rf"{theirs}\.qk\.(.*)", rf"{ours}.qkv.\1#0"), (rf"{theirs}\.v\.(.*)", rf"{ours}.qkv.\1#1"),
            (rf"{theirs}\.proj\.(.*)", rf"{ours}.proj.\1"))


FUSION: KeyMap = ((r"proj_norm1\.(.*)", r"fusion.0.\1"), (r"proj\.(.*)", r"fusion.1.\1"),
                  (r"proj_norm2\.(.*)", r"fusion.2.\1"))
BLOCK: KeyMap = (
    *_qkv("inner_attn", "inner.mixer"), (r"inner_(.*)", r"inner.\1"), *FUSION,
    *_qkv("outer_attn", "mixer"), (r"outer_(.*)", r"\1"),
)
AUTHORS: KeyMap = (
    Dropped("outer_tokens", "a parameter that no forward uses"),
    (r"patch_embed\.proj\.(.*)", r"stem.proj.\1"),
    (r"cls_token", "prefix", without_first_axis),
    (r"outer_pos", "position"),
    (r"inner_pos", "word_position"),
    *FUSION,
    *within(BLOCK, r"blocks\.(\d+)\.", r"blocks.\1."),
)


def _words_last(table: Tensor) -> Tensor:
    """timm's (1, c, *words) as (1, words, c)."""
    return table.flatten(2).mT


_TIMM_FUSION: KeyMap = ((r"norm1_proj\.(.*)", r"fusion.0.\1"), (r"proj\.(.*)", r"fusion.1.\1"),
                        (r"norm2_proj\.(.*)", r"fusion.2.\1"))
TIMM: KeyMap = (
    (r"pixel_embed\.proj\.(.*)", r"stem.proj.\1"),
    (r"cls_token", "prefix", without_first_axis),
    (r"patch_pos", "position"),
    (r"pixel_pos", "word_position", _words_last),
    *_TIMM_FUSION,
    *within((
        *_qkv("attn_in", "inner.mixer"), (r"norm_in\.(.*)", r"inner.norm1.\1"),
        (r"norm_mlp_in\.(.*)", r"inner.norm2.\1"), (r"mlp_in\.(.*)", r"inner.mlp.\1"), *_TIMM_FUSION,
        *_qkv("attn_out", "mixer"), (r"norm_out\.(.*)", r"norm1.\1"), (r"norm_mlp\.(.*)", r"norm2.\1"),
    ), r"blocks\.(\d+)\.", r"blocks.\1."),
)
TAPS = {f"words{block + 1}": f"blocks.{block}.inner" for block in range(12)}
