"""Agent attention: a few agent tokens look for all queries, and all queries ask the agents.

Agents A are the queries, pooled to a small grid. They gather from all keys, then spread what they gathered,
    out = softmax(q A^T / sqrt(d) + B2) softmax(A k^T / sqrt(d) + B1) v + conv(v),
two softmax attentions of N x n instead of one of N x N: generalised linear attention. B1 and B2 know places: each agent
has a coarse 7 x 7 map of biases, interpolated to the grid, and a bias for every row and column. A 3x3 depthwise
convolution of the values gives back the diversity that low rank takes away.

Han, Ye, Han, Xia, Pan, Wan, Song, Huang, "Agent Attention: On the Integration of Softmax and Linear Attention", 2024,
sections 3-4.

Any grid: agents are adaptive means and attend over the whole grid; the biases of rows and columns are interpolated
(linear). Quirks kept: the class token of Agent-DeiT is a query and a key with biases of its own, and no part of the
agents or the convolution; Agent-DeiT-B has agents in its first four blocks alone; windows smaller than the grid shift
without a mask.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import create_model, hybrid_mixer, mixer_factory
from saccade.core.card import Card, Weights
from saccade.core.features import Backbone
from saccade.core.keymap import KeyMap, Rule, pvt_names, within
from saccade.core.load import key_maps
from saccade.core.record import Where
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.pooling import adaptive_mean
from saccade.ops.tables import table
from saccade.ops.window import crop, merge, pad_to_multiple, partition, shifted
from saccade.parts.attention import check_heads
from saccade.parts.block import Block
from saccade.parts.convolution import at_least, depthwise, grid_conv
from saccade.parts.merging import ConvMerging
from saccade.parts.mlp import Mlp
from saccade.parts.position import LINEAR, Position, resample
from saccade.parts.pyramid import Pyramid
from saccade.parts.stem import PatchEmbed
from saccade.parts.tokens import join, split, strided_tokens, token_numbers

_PUBLISHED = ("agent_deit_t", "agent_deit_s", "agent_deit_b", "agent_deit_s_448", "agent_swin_t", "agent_swin_s",
              "agent_swin_b", "agent_swin_s_288", "agent_swin_b_384", "agent_pvt_t", "agent_pvt_s", "agent_pvt_m",
              "agent_pvt_m_256", "agent_pvt_l")

CARD = Card(
    "Agent Attention: On the Integration of Softmax and Linear Attention",
    authors="Han, Ye, Han, Xia, Pan, Wan, Song, Huang",
    year=2024,
    systems=("agent_attention",),
    arxiv="2312.08874",
    code="LeapLabTHU/Agent-Attention@207ce3e",
    read="paper",
    keywords="agent tokens, agent bias, generalized linear attention, agent swin, agent pvt, agent deit",
    kinds=("backbone", "mixer"),
    mixers={"agent": "Agent"},
    params=dict(zip(_PUBLISHED, (6.0e6, 22.7e6, 87.2e6, 23.1e6, 29e6, 50e6, 88e6, 50e6, 88e6, 11.6e6, 20.6e6, 35.9e6,
                                 36.1e6, 48.7e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (1.2e9, 4.4e9, 17.6e9, 17.7e9, 4.5e9, 8.7e9, 15.4e9, 14.6e9, 46.3e9, 2.0e9, 4.0e9, 7.0e9,
                               9.2e9, 10.4e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (74.9, 80.5, 82.0, 83.1, 82.6, 83.7, 84.0, 84.1, 84.9, 78.4, 82.2, 83.4, 83.8, 83.7),
                  strict=True)),
    weights={name: Weights(f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1")
             for name, share in (
                 ("agent_deit_t", "57e0904221824ee7b7af"), ("agent_deit_s", "fdd43304372541db8ea7"),
                 ("agent_deit_s_448", "a228f86241c445f1969b"), ("agent_deit_b", "5115f15fdd7e4ab58fbc"),
                 ("agent_pvt_t", "13fdf0e0a7c5498c934f"), ("agent_pvt_s", "36b8be9a8863456685a3"),
                 ("agent_pvt_m", "4d00ecacf18b45f9b88c"), ("agent_pvt_m_256", "654df734121643b19c52"),
                 ("agent_pvt_l", "040cfe0cfbbe4762ad09"), ("agent_swin_t", "a2ddc1190c224f768a41"),
                 ("agent_swin_s", "f607172c9fea4d6e99bb"), ("agent_swin_s_288", "09760394e93b4046a25e"),
                 ("agent_swin_b", "4fcd2d0114bb490483c3"), ("agent_swin_b_384", "bb84ee9058954706a557"))},
    goldens=("agent_deit_t", "agent_pvt_t", "agent_swin_t", "op_agent_attention", "op_agent_attention_cls",
             "op_agent_attention_pvt"),
    tests=("tests/papers/test_agent_attention.py",),
)

Grid = tuple[int, ...]


class AgentBias(nn.Module):
    """A bias a head, agent and place of a grid: grid -> (heads, agents, N), a coarse map and a bias along each axis."""

    def __init__(self, heads: int, agents: int, grid: Grid, coarse: int = 7) -> None:
        super().__init__()
        self.grid = grid
        self.coarse = nn.Parameter(torch.zeros(heads, agents, *[coarse] * len(grid)))
        for axis, side in enumerate(grid):
            self.register_parameter(f"axis{axis}", nn.Parameter(torch.zeros(heads, agents, side)))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)
        self.undecayed = tuple(name for name, _ in self.named_parameters())

    def forward(self, grid: Grid) -> Tensor:
        rank = len(grid)
        bias = F.interpolate(self.coarse, size=grid, mode=LINEAR[rank], align_corners=False)
        for axis, side in enumerate(grid):
            strip = _along(getattr(self, f"axis{axis}"), side)
            bias = bias + strip.view(*strip.shape[:2], *[1] * axis, side, *[1] * (rank - axis - 1))
        return bias.flatten(2)

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The biases along an axis of another length."""
        return _along(value, getattr(self, parameter).shape[-1]) if parameter.startswith("axis") else value


def _along(strip: Tensor, side: int) -> Tensor:
    """(heads, agents, native side) -> (heads, agents, side)."""
    return resample(strip.flatten(0, 1).T[None], (side,)).squeeze(0).T.unflatten(0, strip.shape[:2])


class Agent(nn.Module):
    """Attention through `pool`^rank agents, over the whole grid: (B, *grid, C) -> (B, *grid, C)."""

    ranks, weights = (1, 2, 3), True
    template = Template(
        "q a^T and a k^T, a the pooled q",
        "two softmaxes: tokens to agents, agents to tokens",
        "sum of v, and a convolution of v",
    )
    projections: tuple[str, ...] = ("qkv", "proj")

    def __init__(self, site: Site, pool: int = 7, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(site)
        self.heads, self.pool = site.heads, (pool,) * site.rank
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.gather = AgentBias(site.heads, prod(self.pool), self.keys(site.grid))
        self.spread = AgentBias(site.heads, prod(self.pool), site.grid)
        self.local = depthwise(site.rank, site.dim, 3)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(self.ask(q.flatten(1, -2), k, v, grid, grid) + self.local(v))

    def ask(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, keys: Grid) -> Tensor:
        """Both attentions: q (B, N, C) and its grid, k and v (B, *keys, C) -> (B, *grid, C)."""
        agents = self._split(adaptive_mean(q.unflatten(1, grid), self.pool).flatten(1, -2))
        inward, outward = self.where(grid, keys, q.device)
        k, v = self._split(k.flatten(1, -2)), self._split(v.flatten(1, -2))
        gathered = attend(agents, k, v, self.gather(keys), where=inward)
        out = attend(self._split(q), agents, gathered, self.spread(grid).transpose(1, 2), where=outward)
        return out.transpose(1, 2).flatten(2).unflatten(1, grid)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, grid: Grid) -> Grid:
        """The grid of keys and values."""
        return grid

    def where(self, grid: Grid, keys: Grid, device: torch.device) -> tuple[Where | None, Where | None]:
        """An agent stands for the token in the middle of those that it pools."""
        agents = partial(agent_tokens, grid, self.pool, 0, device)
        every = partial(token_numbers, prod(grid), device)
        return (lambda: (agents(), every())), (lambda: (every(), agents()))

    def reach(self, site: Site) -> None:
        """Every token reaches every other, by way of the agents."""
        return None

    def cost(self, site: Site, grid: Grid, prefix: int = 0) -> int:
        """Multiply-adds of N tokens and n agents: projections 4 N C^2, attentions 4 N n C, convolution 3^rank N C."""
        tokens = prod(grid) + prefix
        return site.dim * (4 * tokens * (site.dim + prod(self.pool)) + prod(grid) * 3**site.rank)


class PrefixedAgent(Agent):
    """Agent attention beside prefix tokens: queries and keys with a bias of their own, no part of the agents."""

    prefix = True

    def __init__(self, site: Site, pool: int = 7, qkv_bias: bool = True) -> None:
        super().__init__(site, pool, qkv_bias)
        self.gather_prefix = nn.Parameter(torch.zeros(site.heads, prod(self.pool), 1))
        self.spread_prefix = nn.Parameter(torch.zeros(site.heads, prod(self.pool), 1))
        self.undecayed = ("gather_prefix", "spread_prefix")

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Any:
        if prefix is None:
            return super().forward(x)
        grid, count = tuple(x.shape[1:-1]), prefix.shape[1]
        q, k, v = self.qkv(join(x, prefix)).chunk(3, -1)
        agents = self._split(adaptive_mean(q[:, count:].unflatten(1, grid), self.pool).flatten(1, -2))
        inward, outward = (
            torch.cat([own.expand(-1, -1, count), bias(grid)], -1)
            for own, bias in ((self.gather_prefix, self.gather), (self.spread_prefix, self.spread))
        )
        pooled = partial(agent_tokens, grid, self.pool, count, x.device)
        every = partial(token_numbers, prod(grid) + count, x.device)
        gathered = attend(agents, self._split(k), self._split(v), inward, where=lambda: (pooled(), every()))
        out = attend(self._split(q), agents, gathered, outward.transpose(1, 2), where=lambda: (every(), pooled()))
        mixed, own = split(out.transpose(1, 2).flatten(2), x, prefix)
        return self.proj(mixed + self.local(v[:, count:].unflatten(1, grid))), self.proj(own)


class ReducedAgent(Agent):
    """Agent attention to keys merged `reduction` x `reduction`, as in PVT; conv(v) takes interpolated values."""

    projections = ()

    def __init__(self, site: Site, pool: int = 7, reduction: int = 2, qkv_bias: bool = True) -> None:
        self.reduction = reduction
        super().__init__(site, pool, qkv_bias)
        conv = grid_conv(site.rank, site.dim, site.dim, reduction, stride=reduction)
        self.merge = nn.Sequential(conv, nn.LayerNorm(site.dim))

    def forward(self, x: Tensor) -> Tensor:
        grid, merged = tuple(x.shape[1:-1]), self.merge(at_least(x, self.reduction, first=1))
        weight, bias, width = self.qkv.weight, self.qkv.bias, x.shape[-1]
        q = F.linear(x, weight[:width], None if bias is None else bias[:width])
        k, v = F.linear(merged, weight[width:], None if bias is None else bias[width:]).chunk(2, -1)
        out = self.ask(q.flatten(1, -2), k, v, grid, tuple(merged.shape[1:-1]))
        return self.proj(out + self.local(resample(v, grid, linear=True).contiguous()))

    def keys(self, grid: Grid) -> Grid:
        return tuple(max(side // self.reduction, 1) for side in grid)

    def where(self, grid: Grid, keys: Grid, device: torch.device) -> tuple[Where | None, Where | None]:
        _, outward = super().where(grid, keys, device)
        agents = partial(agent_tokens, grid, self.pool, 0, device)
        return (lambda: (agents(), strided_tokens(grid, keys, self.reduction, 0, device))), outward

    def cost(self, site: Site, grid: Grid, prefix: int = 0) -> int:
        """Multiply-adds: as before with M keys, and M reduction^rank C^2 to merge them."""
        tokens, keys = prod(grid), prod(self.keys(grid))
        projections = (2 * tokens + 2 * keys + keys * self.reduction**site.rank) * site.dim
        return site.dim * (projections + 2 * (tokens + keys) * prod(self.pool) + tokens * 3**site.rank)


class WindowAgent(Agent):
    """Agent attention inside windows, each with its own agents; shifted by half in blocks of odd index, no mask.

    The grid is zero-padded at its end, before qkv. (The paper's table of window sizes.)
    """

    def __init__(self, site: Site, pool: int, window: int, shift: int | None = None, qkv_bias: bool = True) -> None:
        self.window = (min(window, *site.grid),) * site.rank
        super().__init__(replace(site, grid=self.window), pool, qkv_bias)
        self.shift = (window // 2 if site.index % 2 else 0) if shift is None else shift
        if min(site.grid) <= window:
            self.shift = 0

    def forward(self, x: Tensor) -> Tensor:
        grid, rank = tuple(x.shape[1:-1]), x.ndim - 2
        x = shifted(pad_to_multiple(x, self.window), (-self.shift,) * rank)
        padded = tuple(x.shape[1:-1])
        windows = partition(x, self.window).unflatten(1, self.window)
        mixed = super().forward(windows).flatten(1, -2)
        return crop(shifted(merge(mixed, self.window, padded), (self.shift,) * rank), grid)

    def where(self, grid: Grid, keys: Grid, device: torch.device) -> tuple[Where | None, Where | None]:
        """Agents of many windows stand for no one token."""
        return None, None

    def cost(self, site: Site, grid: Grid, prefix: int = 0) -> int:
        """Of the padded grid."""
        return super().cost(site, tuple(side + (-side) % part for side, part in zip(grid, self.window, strict=True)))


@table
def agent_tokens(grid: Grid, pool: Grid, prefix: int, device: torch.device) -> Tensor:
    """(1, n) the token in the middle of each cell of `adaptive_mean`, after `prefix` tokens."""
    numbers = torch.zeros(1, dtype=torch.long, device=device)
    for side, cells in zip(grid, pool, strict=True):
        cell = torch.arange(cells, device=device)
        middle = (cell * side // cells + ((cell + 1) * side + cells - 1) // cells - 1) // 2
        numbers = (numbers[:, None] * side + middle).flatten()
    return numbers[None] + prefix


_PVT: dict[str, Any] = dict(builder="agent_pvt", dims=(64, 128, 320, 512))
SIZES: dict[str, dict[str, Any]] = {
    "agent_deit_t": dict(builder="agent_deit", host="deit_tiny_patch16_224"),
    "agent_deit_s": dict(builder="agent_deit", host="deit_small_patch16_224"),
    "agent_deit_b": dict(builder="agent_deit", host="deit_base_patch16_224", pool=9, blocks=4),
    "agent_deit_s_448": dict(builder="agent_deit", host="deit_small_patch16_224", img_size=448),
    "agent_deit_nano": dict(builder="agent_deit", host="deit_nano", pool=3, blocks=4),
    "agent_swin_t": dict(builder="agent_swin", host="swin_tiny", pools=(3, 4, 7, None)),
    "agent_swin_s": dict(builder="agent_swin", host="swin_small"),
    "agent_swin_b": dict(builder="agent_swin", host="swin_base"),
    "agent_swin_s_288": dict(builder="agent_swin", host="swin_small", plain=9, img_size=288),
    "agent_swin_b_384": dict(builder="agent_swin", host="swin_base", plain=12, img_size=384),
    "agent_swin_nano": dict(builder="agent_swin", host="swin_nano", pools=(2, 3, None), plain=4),
    "agent_pvt_t": _PVT | dict(depths=(2, 2, 2, 2)),
    "agent_pvt_s": _PVT | dict(depths=(3, 4, 6, 3)),
    "agent_pvt_m": _PVT | dict(depths=(3, 4, 18, 3)),
    "agent_pvt_m_256": _PVT | dict(depths=(3, 4, 18, 3), img_size=256),
    "agent_pvt_l": _PVT | dict(depths=(3, 8, 27, 3)),
    "agent_pvt_nano": dict(builder="agent_pvt", dims=(32, 64, 128), depths=(1, 2, 2), heads=(1, 2, 4), pools=(2, 3, 2),
                           patch=2, img_size=32),
}


def agent_deit(host: str, pool: int = 7, blocks: int = 12, mixer: Any = None, **common: Any) -> Backbone:
    """A DeiT whose first `blocks` blocks have agents."""

    def own(site: Site) -> nn.Module:
        return PrefixedAgent(site, pool) if site.index < blocks else mixer_factory("attention")(site)

    return create_model(host, mixer=hybrid_mixer(own, mixer), **common)


def agent_swin(
    host: str, pools: Sequence[int | None] = (3, 4, None, None), window: int | None = None, plain: int = 7,
    mixer: Any = None, **common: Any,
) -> Backbone:
    """A Swin with agents in the stages that have a pool, over the grid or in windows; `plain` windows elsewhere."""

    def own(site: Site) -> nn.Module:
        pool = pools[site.stage]
        if pool is None:
            return mixer_factory("shifted_window", window=plain)(site)
        return Agent(site, pool) if window is None else WindowAgent(site, pool, window)

    return create_model(host, mixer=hybrid_mixer(own, mixer), window=plain, **common)


def agent_pvt(
    dims: Sequence[int], depths: Sequence[int], heads: Sequence[int] = (1, 2, 5, 8),
    ratios: Sequence[float] = (8, 8, 4, 4), pools: Sequence[int] = (3, 4, 7, 7), patch: int = 4, mixer: Any = None,
    **common: Any,
) -> Pyramid:
    """A PVT with agents in every block and without a class token."""

    def block(site: Site, mixer: nn.Module, drop_path: float) -> Block:
        return Block(site, mixer, drop_path=drop_path, mlp=partial(Mlp, ratio=ratios[site.stage]))

    model = Pyramid(
        dims, depths, heads, stem=partial(PatchEmbed, kernel=patch, stride=patch, norm=nn.LayerNorm), stride=patch,
        downsample=partial(ConvMerging, kernel=2), block=block, mixer=[partial(Agent, pool=pool) for pool in pools],
        replace=mixer, **common,
    )
    stages: Any = model.stages
    sites = [stage.blocks[0].site for stage in stages]
    first = Position(sites[0].dim, sites[0].grid, linear=True)
    model.stem = nn.Sequential(OrderedDict(patch=model.stem, position=first))
    for stage, site in zip(stages[1:], sites[1:], strict=True):
        stage.downsample.add_module("position", Position(site.dim, site.grid, linear=True))
    return model


def _agents_first(bias: Tensor) -> Tensor:
    """(1, heads, H, 1, n) or (1, heads, 1, W, n) -> (heads, n, side)."""
    return bias.flatten(2, -2).squeeze(0).transpose(1, 2)


def _side_last(bias: Tensor) -> Tensor:
    """(1, heads, n, H, 1) or (1, heads, n, 1, W) -> (heads, n, side)."""
    return bias.flatten(3).squeeze(0)


MIXER: tuple[Rule, ...] = (
    ("an_bias", "gather.coarse"), ("na_bias", "spread.coarse"),
    ("ah_bias", "gather.axis0", _side_last), ("aw_bias", "gather.axis1", _side_last),
    ("ha_bias", "spread.axis0", _agents_first), ("wa_bias", "spread.axis1", _agents_first),
    ("ac_bias", "gather_prefix", partial(torch.squeeze, dim=0)),
    ("ca_bias", "spread_prefix", _agents_first),
    (r"dwc\.(.*)", r"local.\1"),
    (r"q\.(.*)", r"qkv.\1#0"), (r"kv\.(.*)", r"qkv.\1#1"),
    (r"sr\.(.*)", r"merge.0.\1"), (r"norm\.(.*)", r"merge.1.\1"),
)


def AUTHORS(name: str) -> KeyMap:
    """The names of the host's authors, and those of the agents in its blocks."""
    if name.startswith("agent_pvt"):
        return (
            (r"patch_embed1\.(.*)", r"stem.patch.\1"),
            ("pos_embed1", "stem.position.table"),
            *((f"pos_embed{stage + 1}", f"stages.{stage}.downsample.position.table") for stage in (1, 2, 3)),
            *pvt_names(within((*MIXER, (r"(.*)", r"\1")), r"attn\.", "mixer.")),
        )
    if name.startswith("agent_swin"):
        agents = within(MIXER, r"layers\.(\d+)\.blocks\.(\d+)\.attn\.", r"stages.\1.blocks.\2.mixer.")
    else:
        agents = within(MIXER, r"blocks\.(\d+)\.attn\.", r"blocks.\1.mixer.")
    return (*agents, *key_maps(SIZES[name]["host"])["authors"])


def TAPS(name: str) -> dict[str, str]:
    """Blocks of a DeiT; stages of a Swin after the merging that follows; stages of a PVT."""
    if name.startswith("agent_deit"):
        return {f"block{number + 1}": f"blocks.{number}" for number in range(12)}
    if name.startswith("agent_swin"):
        return {r"stage([123])": r"stages.\1.downsample", "stage4": "stages.3"}
    return {f"stage{number + 1}": f"stages.{number}" for number in range(4)}
