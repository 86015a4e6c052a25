"""RMT's network, whatever its mixers: stem, stages, projection and head, and the authors' names of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from saccade.core.keymap import Dropped, KeyMap, Rule, within
from saccade.core.site import MixerFactory, Site
from saccade.parts.block import Block
from saccade.parts.convolution import conv_norm, depthwise
from saccade.parts.head import head_on
from saccade.parts.mlp import Gelu, LocalMlp
from saccade.parts.norm import BatchNorm
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import ConvStem


class Stem(ConvStem):
    """Two 3x3 convolutions for each halving, the first of stride 2: (B, C, *size) -> (B, *ceil(size / patch), dim)."""

    def __init__(self, rank: int, in_chans: int, dim: int, patch: int = 4) -> None:
        halvings = patch.bit_length() - 1
        widths = [in_chans, *(dim // 2 ** (halvings - 1 - step // 2) for step in range(2 * halvings))]
        layers = [layer for step, sizes in enumerate(zip(widths, widths[1:], strict=False))
                  for layer in (*conv_norm(rank, sizes[0], sizes[1], stride=2 - step % 2, bias=True), Gelu())]
        super().__init__(*layers[:-1])


class RmtPyramid(Pyramid):
    """The sequences have one entry a stage; `norm` projects the map to `projection` channels before the head pools."""

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        mixers: Sequence[MixerFactory],
        ratios: Sequence[float],
        layer_scales: Sequence[float | None],
        projection: int,
        patch: int,
        **common: Any,
    ) -> None:
        def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
            return Block(
                site, mixer, drop_path=drop_path, mlp=lambda dim: LocalMlp(site.rank, dim, ratios[site.stage]),
                layer_scale=layer_scales[site.stage], position=depthwise(site.rank, site.dim, 3),
            )

        super().__init__(
            dims, depths, heads, stem=partial(Stem, patch=patch), stride=patch,
            downsample=lambda rank, dim, out: nn.Sequential(*conv_norm(rank, dim, out, stride=2, bias=True)),
            block=block, mixer=mixers, head=partial(head_on, projection),
            norm=lambda dim: nn.Sequential(nn.Linear(dim, projection), BatchNorm(projection), nn.SiLU()), **common,
        )
        self.num_features = projection


def rmt_names(mixer: KeyMap) -> list[Rule]:
    """The names of RMT's code, which others build on; `mixer` has the rules of a mixer."""
    block: KeyMap = (
        *within(mixer, r"retention\.", "mixer."),
        (r"retention_layer_norm\.(.*)", r"norm1.\1"),
        (r"final_layer_norm\.(.*)", r"norm2.\1"),
        (r"ffn\.dwconv\.conv\.(.*)", r"mlp.local.\1"),
        (r"ffn\.(.*)", r"mlp.\1"),
        (r"pos\.conv\.(.*)", r"position.\1"),
        (r"gamma_(\d)", r"scale\1.0.gamma", torch.flatten),
    )
    return [
        Dropped(r"layers\.\d+\.Relpos\.(angle|decay)", "derived buffer"),
        *within(block, r"layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."),
        *((rf"layers\.{stage}\.downsample\.{theirs}\.(.*)", rf"stages.{stage + 1}.downsample.{ours}.\1")
          for stage in range(3) for ours, theirs in enumerate(("reduction", "norm"))),
        (r"patch_embed\.proj\.(.*)", r"stem.\1"),
        (r"proj\.(.*)", r"norm.0.\1"),
        (r"norm\.(.*)", r"norm.1.\1"),
        (r"head\.(.*)", r"head.fc.\1"),
    ]
