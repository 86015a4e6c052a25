"""FIT: local layers on groups of tokens, global layers on a few latents of every group, in turns.

The data tokens x are cut into t groups of n (blocks of an image, pieces of a sequence). Each has m latents z, which
start as codes of its position. A block of the string "(a)b(a)b(a)", a local and b global layers, is
    x = a transformer layers within each group,
    z += attention(norm(z) -> norm(x)) in each group,    z = b transformer layers on all t m latents,
    x += attention(norm(x) -> norm(z)) in each group,
the last line only where another block follows. Attention costs t n^2 + (t m)^2 + 2 t n m instead of (t n)^2.

Chen, Li, "FIT: Far-reaching Interleaved Transformers", 2023.

Any grid: images are zero-padded at their end to whole patches, their tokens to whole groups, where padding is masked;
the latents' start is resampled (bicubic) to the groups that come.
Quirks kept: positions of tokens are those within the group alone; no MLP follows the attention between x and z, whose
heads have the width of the narrower side. Ours: the classifier, on the mean of what the last layers made (x, or z where
the string ends in global layers); the paper's own sizes were not to be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.site import Site
from saccade.ops.window import crop
from saccade.parts.block import LAYER_NORM
from saccade.parts.head import Head
from saccade.parts.interleaved import Positions, interleaved, parse_layers
from saccade.parts.mlp import Mlp
from saccade.parts.pixels import image_of
from saccade.parts.plain import initialise
from saccade.parts.pyramid import check_sizes, undecayed
from saccade.parts.stem import PatchEmbed

CARD = Card(
    "FIT: Far-reaching Interleaved Transformers",
    authors="Chen, Li",
    year=2023,
    systems=("fit",),
    arxiv="2305.12689",
    code="google-research/pix2seq@eabd4e9",
    licence="Apache-2.0",
    read="paper, code",
    keywords="interleaved local and global layers, latent tokens, cross-attention, long sequences, high resolution",
    kinds=("backbone",),
    tests=("tests/papers/test_fit.py",),
)


class FIT(Backbone):
    """Patches of an image through interleaved blocks: (B, C, *size) -> scores (B, classes).

    `latents` of width `latent_dim` stand for each group, a window of `window` patches a side of the image.
    """

    def __init__(
        self, dim: int, latent_dim: int, heads: int, latent_heads: int, layers: str, *, latents: int = 8,
        window: int = 8, patch: int = 16, mixer: Any = None, num_classes: int = 1000, in_chans: int = 3,
        img_size: int | Sequence[int] = 224, drop_path_rate: float = 0.0, global_pool: str = "avg",
    ) -> None:
        super().__init__()
        size = check_sizes(num_classes, in_chans, img_size)
        self.in_chans = in_chans
        grid, sides = tuple(-(-side // patch) for side in size), (window,) * len(size)
        self.stem = PatchEmbed(len(size), in_chans, dim, stride=patch, norm=LAYER_NORM)
        self.positions = Positions(dim, latent_dim, latents, sides, tuple(-(-side // window) for side in grid))
        site = Site(dim, heads, stride=patch, grid=grid)
        latent = Site(latent_dim, latent_heads, stride=patch * window, grid=(latents,))
        self.blocks = interleaved(layers, site, latent, sides, drop_path_rate, mixer=mixer)
        self.reads_latents = bool(parse_layers(layers)[-1][1])
        self.num_features = latent_dim if self.reads_latents else dim
        self.norm = LAYER_NORM(self.num_features)
        self.global_pool = global_pool
        self.reset_classifier(num_classes)
        self.feature_info = FeatureInfo(dict(num_chs=dim, reduction=patch, module=f"blocks.{number}")
                                        for number in range(len(self.blocks)))
        self.default_out_indices = tuple(range(len(self.blocks)))
        self.apply(partial(initialise, spread=0.02))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head of `num_classes` (0: none) in place."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head = Head(self.num_features, num_classes, self.global_pool)
        self.removed = () if num_classes else ("head.fc",)

    def features(self, image: Tensor) -> list[Tensor]:
        """The map of data tokens after each block, (B, C, *grid)."""
        maps, (x, z) = [], self.positions(self.stem(image))
        for block in self.blocks:
            x, z = block(x, z)
            maps.append(x.movedim(-1, 1))
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """The normed data tokens (B, C, *grid), or latents (B, C', t, m) where the last layers are global."""
        x, z = self.positions(self.stem(image))
        for block in self.blocks:
            x, z = block(x, z)
        return self.norm(z if self.reads_latents else x).movedim(-1, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Class scores from what `forward_features` gives."""
        return self.head(features.movedim(1, -1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *size) -> (B, classes)."""
        return self.forward_head(self.forward_features(image))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay shall leave alone: the positions."""
        return undecayed(self)


class AutoregressiveFIT(nn.Module):
    """Scores of every next token: numbers (B, t n) -> (B, t n, vocabulary), each from the tokens up to its place.

    Groups of `group` tokens of a sequence of `length`; local layers are causal within a group, latents see their own
    group and those before, and a group is written to from the group before it. The embedding scores the tokens too.
    """

    def __init__(
        self, vocabulary: int, length: int, dim: int, latent_dim: int, heads: int, latent_heads: int, layers: str, *,
        latents: int = 8, group: int = 64,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.positions = Positions(dim, latent_dim, latents, (group,), (-(-length // group),))
        site, latent = Site(dim, heads, grid=(length,)), Site(latent_dim, latent_heads, grid=(latents,))
        self.blocks = interleaved(layers, site, latent, (group,), causal=True)
        self.norm = LAYER_NORM(dim)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.apply(partial(initialise, spread=0.02))
        nn.init.trunc_normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x, z = self.positions(self.embedding(tokens))
        for block in self.blocks:
            x, z = block(x, z)
        return self.norm(x) @ self.embedding.weight.T + self.bias


class DenoisingFIT(nn.Module):
    """What a diffusion model guesses of a noisy image: (B, C, *size), times (B,) -> (B, C, *size), (B, t, m, C').

    The second are the latents of the t groups. In every block the latents, once they have read, attend to the embedded
    time and to a `condition` (B, S, condition_dim), where the model has one (a class, a text). Latents that the step
    before ended with may be given back as `previous`: z starts as its code + norm(mlp(previous)), a norm that starts at
    zero (self-conditioning; Jabri et al., "Scalable Adaptive Computation for Iterative Generation", 2023). Raises
    SaccadeError where a condition is given and the model has none, or the other way round.
    """

    def __init__(
        self, dim: int, latent_dim: int, heads: int, latent_heads: int, layers: str, *, latents: int = 8,
        window: int = 8, patch: int = 8, condition_dim: int = 0, in_chans: int = 3, img_size: int | Sequence[int] = 256,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        size = check_sizes(0, in_chans, img_size)
        if latent_dim % 8:
            raise SaccadeError(f"latent_dim={latent_dim}: the time's sines and cosines take a multiple of 8")
        self.patch = patch
        grid, sides = tuple(-(-side // patch) for side in size), (window,) * len(size)
        self.stem = PatchEmbed(len(size), in_chans, dim, stride=patch, norm=LAYER_NORM)
        self.positions = Positions(dim, latent_dim, latents, sides, tuple(-(-side // window) for side in grid))
        self.time = nn.Sequential(nn.Linear(latent_dim // 4, latent_dim), nn.SiLU(), nn.Linear(latent_dim, latent_dim))
        self.condition = nn.Linear(condition_dim, latent_dim) if condition_dim else None
        self.before, self.before_norm = nn.Sequential(LAYER_NORM(latent_dim), Mlp(latent_dim)), LAYER_NORM(latent_dim)
        site = Site(dim, heads, stride=patch, grid=grid)
        latent = Site(latent_dim, latent_heads, stride=patch * window, grid=(latents,))
        self.blocks = interleaved(layers, site, latent, sides, drop_path_rate, informed=True)
        self.norm = LAYER_NORM(dim)
        self.guess = nn.Linear(dim, in_chans * patch ** len(size))
        self.apply(partial(initialise, spread=0.02))
        nn.init.zeros_(self.before_norm.weight)  # type: ignore[arg-type]

    def forward(
        self, image: Tensor, time: Tensor, condition: Tensor | None = None, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if (condition is None) != (self.condition is None):
            raise SaccadeError("a condition is given, but condition_dim is 0" if self.condition is None else
                               f"give a condition (B, S, {self.condition.in_features}): the model was built for one")
        x, z = self.positions(self.stem(image))
        previous = torch.zeros_like(z) if previous is None else previous
        z = z + self.before_norm(previous + self.before(previous))
        context = self.time(time_code(time, z.shape[-1] // 4))[:, None]
        if self.condition is not None:
            context = torch.cat([context, self.condition(condition)], 1)
        for block in self.blocks:
            x, z = block(x, z, context)
        guess = image_of(self.guess(self.norm(x)).flatten(1, -2), self.patch, tuple(x.shape[1:-1]))
        return crop(guess.movedim(1, -1), tuple(image.shape[2:])).movedim(-1, 1), z


def time_code(time: Tensor, dim: int) -> Tensor:
    """(B,) in [0, 1] -> (B, dim): sines and cosines of 1000 time / 10000^(2 i / dim), of mean 0 and variance 1."""
    angles = 1000 * time[:, None] / 10000 ** (torch.arange(0, dim, 2, device=time.device, dtype=time.dtype) / dim)
    code = torch.cat([angles.sin(), angles.cos()], -1)
    return (code - code.mean(-1, keepdim=True)) / code.std(-1, correction=0, keepdim=True)


SIZES: dict[str, dict[str, Any]] = {
    "fit_narrow": dict(dim=64, latent_dim=128, heads=2, latent_heads=4, layers="(2)4(2)4(2)", window=16),
    "fit_nano": dict(dim=32, latent_dim=48, heads=2, latent_heads=3, layers="(1)1(1)1(1)", latents=3, window=2, patch=4,
                     img_size=32),
}


def fit(
    dim: int,
    latent_dim: int,
    heads: int,
    latent_heads: int,
    layers: str,
    latents: int = 8,
    window: int = 8,
    patch: int = 16,
    mixer: Any = None,
    **common: Any,
) -> FIT:
    """A FIT encoder with a classifier; `mixer` replaces the attention of its local layers."""
    return FIT(dim, latent_dim, heads, latent_heads, layers, latents=latents, window=window, patch=patch, mixer=mixer,
               **common)
