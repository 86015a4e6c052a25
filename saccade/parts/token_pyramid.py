"""A pyramid whose last stage has a class token: CvT, PVT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.site import Site
from saccade.parts.head import grid_pooling, pool_tokens
from saccade.parts.plain import TokenBlock, beside_prefix
from saccade.parts.pyramid import Pyramid, Stage
from saccade.parts.tokens import join, split


class TokenStage(Stage):
    """A stage that puts a class token before its tokens: (B, *grid, C) -> its map (B, *grid', C') and the token."""

    undecayed: tuple[str, ...] = ("class_token",)

    def __init__(self, stage: Stage, dim: int) -> None:
        super().__init__(stage.downsample, [*stage.blocks])
        self.class_token = nn.Parameter(torch.zeros(1, dim))
        nn.init.trunc_normal_(self.class_token, std=0.02)

    def enter(self, x: Tensor, prefix: Tensor) -> Tensor:
        """The sequence (B, 1 + N, C) that the first block is given: here without a position."""
        return join(x, prefix)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.downsample(x)
        prefix = self.class_token.expand(x.shape[0], -1, -1)
        tokens = self.enter(x, prefix)
        for block in self.blocks:
            tokens = block(tokens, 1, tuple(x.shape[1:-1]))
        return split(tokens, x, prefix)


class TokenPyramid(Pyramid):
    """A Pyramid with a class token in its last stage; the head reads norm(class token).

    `block(site, mixer, drop_path=rate, kind=Block or TokenBlock)` builds the blocks. `prefix_mode` says what the class
    token receives from a mixer that knows only the grid (see Plain). `global_pool` is "token", "" or a pooling of
    the grid tokens.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        *,
        block: Callable[..., nn.Module],
        global_pool: str = "token",
        prefix_mode: str | None = None,
        **common: Any,
    ) -> None:

        def build(site: Site, mixer: nn.Module, drop_path: float) -> nn.Module:
            if site.stage < len(depths) - 1:
                return block(site, mixer, drop_path=drop_path)
            return block(site, beside_prefix(mixer, 1, prefix_mode), drop_path=drop_path, kind=TokenBlock)

        super().__init__(dims, depths, heads, block=build, head=self._linear, global_pool=global_pool, **common)
        last: Any = self.stages[-1]
        self.stages[-1] = TokenStage(last, dims[-1])

    def _linear(self, dim: int, num_classes: int, global_pool: str) -> nn.Module:
        return nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.pool = grid_pooling(self.global_pool, self.num_features)
        self.removed = () if num_classes else ("head",)

    def features(self, image: Tensor) -> list[Tensor]:
        maps, x = [], self.stem(image)
        for stage in self.stages:
            x = stage(x)
            maps.append((x[0] if isinstance(x, tuple) else x).movedim(-1, 1))
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """The sequence (B, 1 + N, C) of the last stage, the class token first, after the final norm."""
        x = self.stem(image)
        for stage in self.stages:
            x = stage(x)
        return self.norm(join(*x))

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Class scores from the class token (or the pooled grid tokens)."""
        return self.head(pool_tokens(tokens, self.global_pool, 1, self.pool))
