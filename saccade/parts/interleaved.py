"""FIT's blocks: local layers on groups of tokens, global layers on a few latents of every group, in turns.

(Chen, Li, "FIT: Far-reaching Interleaved Transformers", 2023.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.errors import SaccadeError
from saccade.core.site import Site
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.ops.window import crop, merge, pad_to_multiple, partition
from saccade.parts.attention import Attention
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.position import resample
from saccade.parts.pyramid import drop_path_rates
from saccade.parts.window import WindowAttention


def hidden(x: Tensor, window: tuple[int, ...], causal: bool = False) -> Tensor | None:
    """What hides the padding of the groups of x, and later tokens where `causal`; None where there is neither."""
    grid = tuple(x.shape[1:-1])
    whole = all(isinstance(side, int) and side % part == 0 for side, part in zip(grid, window, strict=True))
    return None if whole and not causal else group_mask(grid, window, causal, x.dtype, x.device)


@table
def group_mask(
    grid: tuple[int, ...], window: tuple[int, ...], causal: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(groups, 1 or n, n) to add to scores: -inf for keys that are padding and, where `causal`, for later ones."""
    tokens = pad_to_multiple(torch.ones(1, *grid, 1, device=device), window)
    padding = partition(tokens, window).mT == 0
    if causal:
        padding = padding | torch.ones(prod(window), prod(window), dtype=torch.bool, device=device).triu(1)
    return torch.zeros(padding.shape, dtype=dtype, device=device).masked_fill(padding, -torch.inf)


class GroupAttention(WindowAttention):
    """Attention among the tokens of each group, a `window` of the grid: (B, *grid, C) -> (B, *grid, C).

    Padding is masked. `causal`: a token sees those before it, in row-major order of the group.
    """

    def __init__(self, site: Site, window: int | tuple[int, ...] = 8, causal: bool = False) -> None:
        super().__init__(site, window, bias=False)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        grid, mask = tuple(x.shape[1:-1]), hidden(x, self.window, self.causal)
        x = pad_to_multiple(x, self.window)
        windows = self.attend(partition(x, self.window), grid, (0,) * len(grid), mask)
        return crop(merge(windows, self.window, tuple(x.shape[1:-1])), grid)


class LatentAttention(Attention):
    """Attention among all latents (B, t m, C); with `causal` = m, of a group to its own and to earlier groups."""

    prefix = False

    def __init__(self, site: Site, causal: int = 0) -> None:
        super().__init__(site)
        self.causal = causal

    def forward(self, z: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(z).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = chunk_causal(z.shape[1], self.causal, z.dtype, z.device) if self.causal else None
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


@table
def chunk_causal(count: int, chunk: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count, count): 0 for keys of the own chunk and of those before, -inf for others."""
    number = torch.arange(count, device=device) // chunk
    return torch.zeros(count, count, dtype=dtype, device=device).masked_fill(number[:, None] < number, -torch.inf)


class Exchange(nn.Module):
    """x + attention(norm(x) -> norm(context)): (G, N, C) and (G, M, C') -> (G, N, C), with an optional mask."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        width = min(dim, context_dim) // heads * heads
        self.heads = heads
        self.norm, self.context_norm = LAYER_NORM(dim), LAYER_NORM(context_dim)
        self.q, self.kv = nn.Linear(dim, width), nn.Linear(context_dim, 2 * width)
        self.proj = nn.Linear(width, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self.context_norm(context)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class InterleavedBlock(nn.Module):
    """Local layers on x (B, *grid, C); then read, global layers on z (B, t, m, C'), write, where there are any.

    `inform`: before its global layers, z attends to a `context` (B, S, C') of the whole image (as a denoiser's).
    `causal`: a group is written to from the latents of the group before it, the first from zeros.
    """

    def __init__(
        self, local: Sequence[nn.Module], over: Sequence[nn.Module], read: nn.Module | None, write: nn.Module | None,
        window: tuple[int, ...], causal: bool = False, inform: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.window, self.causal = window, causal
        self.local, self.over = nn.Sequential(*local), nn.Sequential(*over)
        self.read, self.write, self.inform = read, write, inform

    def forward(self, x: Tensor, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.local(x)
        if self.read is None:
            return x, z
        mask, padded = hidden(x, self.window), pad_to_multiple(x, self.window)
        groups = partition(padded, self.window)
        mask = None if mask is None else mask[:, None].repeat(x.shape[0], 1, 1, 1)
        z = self.read(z.flatten(0, 1), groups, mask).unflatten(0, (x.shape[0], -1))
        latents = z.flatten(1, 2)
        if self.inform is not None:
            latents = self.inform(latents, context)
        z = self.over(latents).unflatten(1, tuple(z.shape[1:3]))
        if self.write is None:
            return x, z
        shown = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1) if self.causal else z
        groups = self.write(groups, shown.flatten(0, 1))
        return crop(merge(groups, self.window, tuple(padded.shape[1:-1])), tuple(x.shape[1:-1])), z


class Positions(nn.Module):
    """What tokens and latents start with: a table of the places in a group, and codes of the groups.

    x (B, *grid, C) -> x + position, and latents (B, t, m, C').
    """

    undecayed = ("position", "latents")

    def __init__(
        self, dim: int, latent_dim: int, latents: int, window: tuple[int, ...], groups: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.window, self.groups, self.count = window, groups, latents
        self.position = nn.Parameter(torch.empty(prod(window), dim))
        self.latents = nn.Parameter(torch.empty(1, *groups, latents * latent_dim))
        for values in (self.position, self.latents):
            nn.init.trunc_normal_(values, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        grid = tuple(x.shape[1:-1])
        groups = tuple((side + (-side) % part) // part for side, part in zip(grid, self.window, strict=True))
        places = self.position.unflatten(0, self.window).repeat(*groups, 1)[None]
        latents = resample(self.latents, groups).flatten(1, -2).unflatten(-1, (self.count, -1))
        return x + crop(places, grid), latents.repeat(x.shape[0], 1, 1, 1)

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """Codes of other groups, for these."""
        return resample(value, self.groups) if parameter == "latents" and value.ndim == self.latents.ndim else value


def parse_layers(layers: str) -> list[tuple[int, int]]:
    """"(2)4(2)4(2)" -> [(2, 4), (2, 4), (2, 0)], local and global layers of each block.

    Raises SaccadeError for another form, and where a block before the last has no global layers.
    """
    found = [(int(local), int(over or 0)) for local, over in re.findall(r"\((\d+)\)(\d*)", layers)]
    if not re.fullmatch(r"(\(\d+\)\d*)+", layers) or not all(over for _, over in found[:-1]):
        raise SaccadeError(f'layers={layers!r}: give local layers in parentheses, each followed by global ones, as in '
                           '"(2)4(2)4(2)"; only the last may lack them')
    return found


def interleaved(
    layers: str, site: Site, latent: Site, window: tuple[int, ...], drop_path_rate: float = 0.0,
    causal: bool = False, informed: bool = False, mixer: Any = None,
) -> nn.ModuleList:
    """The blocks of a string; `site` and `latent` have the widths and heads of tokens and latents (t x m of them)."""
    counts = parse_layers(layers)
    build = choose_mixer(mixer, partial(GroupAttention, window=window, causal=causal))
    rates = iter(drop_path_rates(drop_path_rate, sum(map(sum, counts))))
    heads, blocks, names, index = min(site.heads, latent.heads), [], [], 0
    for number, (local, over) in enumerate(counts):
        names += [f"blocks.{number}.local.{layer}" for layer in range(local)]
        sites = [Site(site.dim, site.heads, 0, index + layer, site.stride, site.grid) for layer in range(local)]
        index += local
        blocks.append(InterleavedBlock(
            [Block(at, build(at, name), drop_path=next(rates))
             for at, name in zip(sites, names[len(names) - local:], strict=True)],
            [Block(latent, LatentAttention(latent, latent.grid[-1] * causal), drop_path=next(rates))
             for _ in range(over)],
            Exchange(latent.dim, site.dim, heads) if over else None,
            Exchange(site.dim, latent.dim, heads) if over and number < len(counts) - 1 else None,
            window, causal, Exchange(latent.dim, latent.dim, latent.heads) if informed and over else None,
        ))
    check_patterns(mixer, names)
    return nn.ModuleList(blocks)
