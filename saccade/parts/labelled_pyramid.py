"""Pyramids trained with a label a token; Wave-ViT's, which SpectFormer and SVT fill with mixers of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, Rule, pvt_names, within
from saccade.core.site import MixerFactory, Site
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.class_attention import ClassBlock
from saccade.parts.convolution import conv_norm, grid_conv
from saccade.parts.head import grid_pooling, pool_tokens
from saccade.parts.merging import ConvMerging
from saccade.parts.mlp import ConvMlp
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem
from saccade.parts.tokens import join


class TokenLabelled(Pyramid):
    """A pyramid whose class token joins after the last stage, with heads that read every token.

    A subclass gives `class_token(x)`, the token (B, 1, C) for a last map x, and sets `class_blocks`, what mixes it with
    the grid tokens; `norm` comes after them. Scores are head(class token) + max over the grid tokens of
    head_aux(token) / 2. `label_scores` gives the two apart, for training with a label a token. `global_pool` is "token"
    (as said), a pooling (head of the pooled grid tokens) or "" (of every token); these have no head_aux.
    (Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", 2021, section 3.2.)
    """

    class_blocks: nn.Module

    def __init__(self, *args: Any, global_pool: str = "token", **options: Any) -> None:
        super().__init__(*args, head=self._linear, global_pool=global_pool, **options)

    def _linear(self, dim: int, num_classes: int, global_pool: str) -> nn.Module:
        return nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.pool = grid_pooling(self.global_pool, self.num_features)
        labels = num_classes and self.global_pool == "token"
        self.head_aux = nn.Linear(self.num_features, num_classes) if labels else None
        self.removed = () if labels else ("head_aux",) if num_classes else ("head", "head_aux")

    def class_token(self, x: Tensor) -> Tensor:
        """The token (B, 1, C) that joins a last map (B, *grid, C)."""
        raise NotImplementedError

    def forward_features(self, image: Tensor) -> Tensor:
        """The sequence (B, 1 + N, C): the class token, then the grid of the last stage, after the final norm."""
        return self.after_stem(self.stem(image))

    def after_stem(self, x: Tensor) -> Tensor:
        """`forward_features` from the stem's map (B, *grid, C) on: training may mix the tokens of images before."""
        for stage in self.stages:
            x = stage(x)
        return self.norm(self.class_blocks(join(x, self.class_token(x))))

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Class scores from what `forward_features` gives."""
        if self.head_aux is not None:
            scores, labels = self.label_scores(tokens)
            return scores + 0.5 * labels.amax(1)
        return self.head(pool_tokens(tokens, self.global_pool, 1, self.pool))

    def label_scores(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the class token (B, classes) and of each grid token (B, N, classes)."""
        if self.head_aux is None:
            raise SaccadeError('no head labels the tokens: build the model with classes and global_pool="token"')
        return self.head(tokens[:, 0]), self.head_aux(tokens[:, 1:])


class LabelledPyramid(TokenLabelled):
    """Stem of four convolutions, PVT v2's stages, one class-attention block, heads that read every token.

    The class token starts as the mean of the last map. `hidden` is the stem's width, `patch` its stride (even),
    `ratios` the MLPs' a stage.
    (Yao et al., "Wave-ViT: Unifying Wavelet and Transformers for Visual Representation Learning", 2022, section 3.4.)
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        *,
        mixer: MixerFactory | Sequence[MixerFactory],
        ratios: Sequence[float],
        hidden: int,
        patch: int = 4,
        **common: Any,
    ) -> None:
        if patch % 2:
            raise SaccadeError(f"patch={patch}: the stem's stride is even")

        def stem(rank: int, in_chans: int, dim: int) -> ConvStem:
            start = stem_layers(rank, in_chans, hidden, patch // 2)
            return ConvStem(*start, grid_conv(rank, hidden, dim, 3, stride=2, padding=1), nn.LayerNorm(dim))

        def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
            return Block(site, mixer, drop_path=drop_path, mlp=partial(ConvMlp, site.rank, ratio=ratios[site.stage]))

        super().__init__(
            dims, depths, heads, stem=stem, stride=patch, downsample=ConvMerging, block=block, mixer=mixer,
            norm=LAYER_NORM, stage_norm=LAYER_NORM, **common,
        )
        last: Any = self.stages[-1]
        last.norm = nn.Identity()  # the last norm comes after the class block
        self.class_blocks = ClassBlock(dims[-1], heads[-1], ratios[-1])

    def class_token(self, x: Tensor) -> Tensor:
        """The mean of the map."""
        return x.flatten(1, -2).mean(1, keepdim=True)


def stem_layers(rank: int, in_chans: int, hidden: int, stride: int) -> list[nn.Module]:
    """A 7x7 convolution with stride and two of 3x3, each with batch norm and ReLU: the start of a convolutional stem.

    (Jiang et al., LV-ViT, 2021, section 3.3, and those who build on its code.)
    """
    layers = [*conv_norm(rank, in_chans, hidden, 7, stride), nn.ReLU()]
    for _ in range(2):
        layers += [*conv_norm(rank, hidden, hidden), nn.ReLU()]
    return layers


def wavevit_names(mixer: KeyMap) -> list[Rule]:
    """The names of Wave-ViT's code, which others build on; `mixer` has the rules of what stands at `attn`."""
    block = (*within((*mixer, (r"(.*)", r"\1")), r"attn\.", "mixer."), (r"mlp\.dwconv\.dwconv\.(.*)", r"mlp.local.\1"))
    return [
        (r"patch_embed1\.conv\.(.*)", r"stem.\1"),
        (r"patch_embed1\.proj\.(.*)", r"stem.9.\1"),
        (r"patch_embed1\.norm\.(.*)", r"stem.10.\1"),
        (r"post_network\.0\.attn\.(.*)", r"class_blocks.attention.\1"),
        (r"post_network\.0\.(.*)", r"class_blocks.\1"),
        (r"norm4\.(.*)", r"norm.\1"),
        (r"aux_head\.(.*)", r"head_aux.\1"),
        (r"(head\..*)", r"\1"),
        *pvt_names(block),
    ]
