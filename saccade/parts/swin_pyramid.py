"""Swin's network, whatever its mixers: patches, four stages with 2x2 tokens merged between them, plain layer norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from saccade.parts.block import Block
from saccade.parts.merging import PatchMerging
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed

SWIN_BLOCK = partial(Block, norm=nn.LayerNorm)


class SwinPyramid(Pyramid):
    """Patches of `patch` pixels, then stages of `depths` blocks; the sequences have one entry a stage.

    (Liu et al., "Swin Transformer", 2021, section 3.1.)
    """

    def __init__(
        self, dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], patch: int = 4,
        block: Callable[..., nn.Module] = SWIN_BLOCK, **common: Any,
    ) -> None:
        super().__init__(
            dims, depths, heads, stem=partial(PatchEmbed, stride=patch, norm=nn.LayerNorm), stride=patch,
            downsample=PatchMerging, block=block, norm=nn.LayerNorm, **common,
        )
