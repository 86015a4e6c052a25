"""PatchDropout: patches dropped at random, the baseline that every choice of tokens has to beat.

Before a block the grid tokens become a random ceil(keep N) of them, positions and prefix tokens unchanged,
    x <- [prefix, x_i : i in S],   S a uniform random subset of the N tokens.

Liu, Matsoukas, Strand, Azizpour, Smith, "PatchDropout: Economizing Vision Transformers Using Patch Dropout", 2023,
section 3.

In training each picture draws its own S, which makes training cheaper; the published use undoes it before evaluation.
Where it stays, all pictures of a grid size lose the same tokens, drawn once from a fixed seed.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.swap import Handle
from saccade.ops.tables import table
from saccade.parts.host import HostBlock, check_rate, chosen_layers, gathered, open_blocks

CARD = Card(
    "PatchDropout: Economizing Vision Transformers Using Patch Dropout",
    authors="Liu, Matsoukas, Strand, Azizpour, Smith",
    year=2023,
    arxiv="2208.07220",
    read="paper",
    keywords="patch dropout, random token dropping, efficient training, baseline",
    kinds=("token reduction",),
    methods={"patch_dropout": "patch_dropout"},
    tests=("tests/papers/test_patch_dropout.py",),
)


class DroppingBlock(HostBlock):
    """A block before which, where `here`, a random share `keep` of the grid tokens stays, in their order."""

    def __init__(self, here: bool, keep: float, **host: Any) -> None:
        super().__init__(**host)
        self.here, self.keep = here, keep

    def drops(self) -> bool:
        return self.here and self.keep < 1

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        self.start(tokens)
        if self.drops():
            tokens = self.drop(tokens)
        return self.add_mlp(self.add_attention(tokens))

    def drop(self, tokens: Tensor) -> Tensor:
        """(B, P + N, C) -> (B, P + ceil(keep N), C)."""
        count = tokens.shape[1] - self.prefix
        kept = ceil(self.keep * count)
        if self.training:
            places = torch.rand(len(tokens), count, device=tokens.device).argsort(1)[:, :kept].sort(1).values
        else:
            places = fixed_places(count, kept, tokens.device).expand(tokens.shape[0], -1)
        index = self.after_prefix(places)
        self.kept.choose(index)
        return gathered(tokens, index)


@table
def fixed_places(count: int, kept: int, device: torch.device) -> Tensor:
    """`kept` of `count` places, drawn from a fixed seed, in order: (1, kept)."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:kept]
    return drawn.sort().values[None].to(device)


def patch_dropout(model: nn.Module, keep: float = 0.5, layer: int = 0) -> Handle:
    """Keep a random share `keep` of the grid tokens before the block `layer`."""
    check_rate("patch_dropout", "keep", keep)
    chosen = chosen_layers(model, "patch_dropout", (layer,))
    return open_blocks(model, "patch_dropout", lambda number, **host: DroppingBlock(number in chosen, keep, **host))
