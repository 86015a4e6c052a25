"""Hyena N-D: gates and convolutions as wide as the map, whose filters are functions of position.

The input makes M gates and a value v by a linear layer and a 3x3 depthwise convolution; then, for m = M - 1, ..., 1,
    v <- h_m * (g_m v) + b_m g_m v,      out = proj(g_0 v),
with h_m[t] = f_m(e(t_1), ..., e(t_n)) decay(t), f a small MLP with sine activations of an embedding e of each axis'
step: no weight belongs to a place, and Fourier transforms convolve in N log N. h looks one way along every axis. To see
all of the map, blocks turn it round in turn ("seq"), or one block takes all 2^n directions ("4dir").

Zimerman, Wolf, "Multi-Dimensional Hyena for Spatial Inductive Bias", 2024, section 4.

Any grid: embeddings belong to the longest side of the native grid and are resampled (linear, ends kept) to each axis.
Quirks kept: convolutions are divided by twice the longest side; "parallel" mixes the four outputs of the short
convolution with the gates' channels; the networks have no class token and classify their first patch.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from math import log, pi, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.sizes import larger
from saccade.ops.spectral import convolve, on_circle, turned
from saccade.ops.tables import table
from saccade.parts.attention import Attention
from saccade.parts.convolution import grid_conv
from saccade.parts.head import Pooling
from saccade.parts.plain import Plain
from saccade.parts.position import is_native, resample

DIRECTIONS = ("standard", "seq", "4dir", "4dirp", "parallel")

CARD = Card(
    "Multi-Dimensional Hyena for Spatial Inductive Bias",
    authors="Zimerman, Wolf",
    year=2024,
    systems=("hyena_nd",),
    arxiv="2309.13600",
    code="Itamarzimm/HyenaND@e8b875e",
    licence="Apache-2.0",
    read="paper, code",
    keywords="Hyena, long convolution, implicit filter, gated convolution, FFT, attention-free, state space",
    kinds=("backbone", "mixer"),
    mixers={"hyena_nd": "HyenaNd"},
    goldens=("hyena2d_deit_tiny", "op_hyena2d", "op_hyena2d_4dir", "op_hyena2d_product"),
    tests=("tests/papers/test_hyena_nd.py",),
)


@table
def decays(count: int, device: torch.device) -> Tensor:
    """(count,) rates of decay: a hundredth is left after 1.5 to 0.3 of an axis."""
    return -torch.linspace(log(1e-2) / 1.5, log(1e-2) / 0.3, count, device=device)


@table
def elapsed(side: int, device: torch.device) -> Tensor:
    """(side, 1) places of an axis from 0 to 1."""
    last = larger(side - 1, 1)
    return torch.arange(side, device=device)[:, None] / last


class Filter(nn.Module):
    """forward(grid) -> (*grid, channels): one MLP of all axes' embeddings, or (`joint` False) a product of one an axis.

    `window` is the decay: "standard", "learn" (rates and a shift are parameters) or "no"; `root` takes its square root.
    """

    undecayed = ("position",)

    def __init__(
        self, channels: int, grid: tuple[int, ...], width: int, *, joint: bool = True, window: str = "standard",
        root: bool = False, bands: int = 1, depth: int = 2,
    ) -> None:
        super().__init__()
        if window not in ("standard", "learn", "no"):
            raise SaccadeError(f'window={window!r}: choose "standard", "learn" or "no"')
        self.channels, self.joint, self.window, self.root = channels, joint, window, root
        rank, side = len(grid), max(grid)
        angle = 2 * pi * torch.arange(side)[:, None] / side * torch.linspace(1e-4, bands - 1, bands)
        self.position = nn.Parameter(torch.cat([elapsed(side, angle.device), angle.cos(), -angle.sin()], -1))
        self.frequency = nn.Parameter(torch.ones(1, width))
        widths = [(1 + 2 * bands) * (rank if joint else 1), *[width] * (depth + 1), channels]
        self.mlps = nn.ModuleList(
            nn.ModuleList(nn.Linear(before, after, bias=number <= depth)
                          for number, (before, after) in enumerate(pairwise(widths)))
            for _ in range(1 if joint else rank))
        learned = window == "learn"
        self.rate = nn.Parameter(decays(channels, angle.device).repeat(rank, 1)) if learned else None
        self.shift = nn.Parameter(torch.rand(1 if joint else rank, channels)) if learned else None

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        steps = on_axes([self.embedding(side) for side in grid])
        if self.joint:
            whole = self.values(torch.cat([step.expand(*grid, -1) for step in steps], -1), 0)
            return whole if self.window == "no" else whole * self.decay(grid)
        values = [self.values(step, axis) for axis, step in enumerate(steps)]
        if self.window != "no":
            falls = [self.fall(side, axis) for axis, side in enumerate(grid)]
            if self.shift is not None:
                falls = [fall + shift for fall, shift in zip(falls, self.shift, strict=True)]
            values = [value * fall for value, fall in zip(values, on_axes(falls), strict=True)]
        return reduce(torch.mul, values)

    def embedding(self, side: int) -> Tensor:
        """(side, features) of the steps of an axis."""
        if is_native((side,), (self.position.shape[0],)):
            return self.position
        return F.interpolate(self.position.T[None], size=(side,), mode="linear", align_corners=True)[0].T

    def values(self, x: Tensor, number: int) -> Tensor:
        """The `number`-th MLP, a sine after each layer but the last."""
        layers = list(self.mlps[number])  # type: ignore[call-overload]
        for layer in layers[:-1]:
            x = (self.frequency * layer(x)).sin()
        return layers[-1](x)

    def fall(self, side: int, axis: int) -> Tensor:
        """(side, channels) decay along one axis."""
        device = self.position.device
        rate = decays(self.channels, device) if self.rate is None else self.rate[axis].abs()
        return (-elapsed(side, device) * rate).to(self.position.dtype).exp()

    def decay(self, grid: tuple[int, ...]) -> Tensor:
        """(*grid, channels) product of the axes' decays."""
        fall = reduce(torch.mul, on_axes([self.fall(side, axis) for axis, side in enumerate(grid)]))
        fall = fall.sqrt() if self.root else fall
        return fall if self.shift is None else fall + self.shift[0]

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The embeddings of another native side."""
        if parameter != "position":
            return value
        return F.interpolate(value.T[None], size=len(self.position), mode="linear", align_corners=True)[0].T

    def cost(self, grid: tuple[int, ...]) -> int:
        places = [prod(grid)] if self.joint else list(grid)
        weights = [sum(weight.numel() for weight in mlp.parameters() if weight.ndim == 2) for mlp in self.mlps]
        return sum(count * each for count, each in zip(places, weights, strict=True))


class Table(nn.Module):
    """forward(grid) -> (*grid, channels): a filter with a weight a place, resampled from the native grid."""

    undecayed = ("weight",)

    def __init__(self, channels: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*grid, channels))

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        return resample(self.weight[None], grid, linear=True)[0]

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The filter of another native grid."""
        return resample(value[None], tuple(self.weight.shape[:-1]), linear=True)[0]

    def cost(self, grid: tuple[int, ...]) -> int:
        return 0


def on_axes(values: list[Tensor]) -> list[Tensor]:
    """(side, C) of each axis, where it broadcasts along the others: (1, ..., side, ..., 1, C)."""
    rank = len(values)
    return [value.view(*[1] * axis, -1, *[1] * (rank - axis - 1), value.shape[-1]) for axis, value in enumerate(values)]


class HyenaNd(nn.Module):
    """`order` gates with long convolutions between them: (B, *grid, C) -> (B, *grid, C).

    `direction`: "standard" filters look back along every axis; "seq" turns the first one round in even blocks; "4dir"
    weighs all 2^rank directions by one number each, "4dirp" by a linear layer of their channels; "parallel" runs four
    sets of gates side by side. `width` is that of the filters' MLP; `direct` gives filters a weight a place instead;
    further options are those of `Filter`. Raises SaccadeError for what is not offered.
    """

    ranks = (1, 2, 3)
    template = Template(
        "w(j - i) of a network of the offset, as long as the map",
        "decay with distance",
        "sum of x, gated before and after",
    )

    def __init__(
        self, site: Site, order: int = 2, width: int = 64, direction: str = "seq", direct: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if direction not in DIRECTIONS:
            raise SaccadeError(f"direction={direction!r}: choose one of {', '.join(DIRECTIONS)}")
        if order < 2:
            raise SaccadeError(f"order={order}: there is a convolution between two gates, so at least 2")
        self.order, self.direction = order, direction
        self.first_round = direction == "seq" and site.index % 2 == 0
        self.copies = 4 if direction == "parallel" else 1
        ways = 2**site.rank if direction.startswith("4dir") else 1
        axes = range(site.rank)
        # As the authors order them: none turned, all, then fewer.
        turns = [tuple(axis for axis in axes if way >> axis & 1) for way in range(2**site.rank)]
        self.turns = sorted(turns, key=lambda turn: (bool(turn), -len(turn), [-axis for axis in turn]))[:ways]
        inner = site.dim * (order + 1)
        self.in_proj = nn.Linear(site.dim, inner)
        self.short = grid_conv(site.rank, inner, inner * self.copies, 3, padding=1, groups=inner)
        channels = site.dim * (order if direct else order - 1)  # the authors' direct filters are one more than are used
        self.filter = Table(channels, site.grid) if direct else Filter(channels, site.grid, width, **options)
        self.bias = nn.Parameter(torch.randn(channels))
        self.mix: nn.Linear | None = None
        if ways > 1:
            self.mix = nn.Linear(ways, 1) if direction == "4dir" else nn.Linear(ways * site.dim, site.dim)
        self.out_proj = nn.Linear(site.dim * self.copies, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        longest = reduce(larger, grid)
        inner = self.short(self.in_proj(x))
        if self.copies > 1:  # their channels, counted through, are cut into as many runs
            inner = inner.unflatten(-1, (self.copies, -1)).movedim(-2, 1).flatten(0, 1)
        *gates, v = inner.chunk(self.order + 1, -1)
        dim = v.shape[-1]
        filters = [on_circle(one) / (2 * longest) for one in self.filter(grid).split(dim, -1)]
        steps = list(zip(reversed(gates[1:]), filters, self.bias.split(dim), strict=False))
        if self.mix is not None:
            return self.out_proj(self.in_all_directions(gates[0], v, steps, self.mix))
        every = tuple(range(len(grid)))
        for number, (gate, kernel, bias) in enumerate(steps):
            v = v * gate
            v = convolve(v, turned(kernel, every) if self.first_round and number == 0 else kernel) + v * bias
        out = gates[0] * v
        if self.copies > 1:
            out = out.unflatten(0, (-1, self.copies)).movedim(1, -2).flatten(-2)
        return self.out_proj(out)

    def in_all_directions(self, last: Tensor, v: Tensor, steps: list[Any], mix: nn.Linear) -> Tensor:
        """The layer `mix` of what filters turned each way give."""
        if self.direction == "4dir" and self.order == 2:  # one convolution with the sum of all filters
            gate, kernel, bias = steps[0]
            share = mix.weight[0]
            whole = torch.stack([part * turned(kernel, turn) for part, turn in zip(share, self.turns, strict=True)])
            v = v * gate
            return last * (convolve(v, whole.sum(0)) + share.sum() * bias * v) + mix.bias
        ways = []
        for turn in self.turns:
            way = v
            for gate, kernel, bias in steps:
                way = way * gate
                way = convolve(way, turned(kernel, turn)) + way * bias
            ways.append(last * way)
        stacked = torch.stack(ways, -1)
        return mix(stacked).squeeze(-1) if self.direction == "4dir" else mix(stacked.flatten(-2))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of an image: the linear layers and the short convolution; Fourier transforms have none."""
        short = 3**site.rank * (self.order + 1) * self.copies * site.dim
        mix = 0 if self.mix is None else self.mix.weight.numel() * (site.dim if self.direction == "4dir" else 1)
        return prod(grid) * ((self.order + 1 + self.copies) * site.dim**2 + short + mix)

    def shared_cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of the filters' MLP, once for the batch."""
        return self.filter.cost(grid)

    def reach(self, site: Site) -> None:
        """A filter is as wide as the map."""
        return None


class FirstPatch(nn.Module):
    """The first patch stands for the image: (B, N, C) -> (B, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def _sizes() -> dict[str, dict[str, Any]]:
    shapes = {"tiny": dict(dim=192, heads=3), "small": dict(dim=384, heads=6), "base": dict(dim=768, heads=12)}
    nano: dict[str, Any] = dict(dim=32, heads=2, depth=3, patch=4, width=16, img_size=32)
    sizes = {f"hyena2d_deit_{size}": shape for size, shape in shapes.items()} | {"hyena2d_deit_nano": nano}
    return sizes | {name.replace("hyena2d_", "hyena2dattn_"): dict(shape, hyena=shape.get("depth", 12) // 2 + 1)
                    for name, shape in sizes.items()}


SIZES = _sizes()


def hyena_nd(
    dim: int,
    heads: int,
    depth: int = 12,
    patch: int = 16,
    hyena: int | None = None,
    mixer: Any = None,
    order: int = 2,
    width: int = 64,
    direction: str = "seq",
    direct: bool = False,
    filters: dict[str, Any] | None = None,
    global_pool: Pooling = FirstPatch,
    **common: Any,
) -> Plain:
    """A DeiT of Hyena blocks, or of so many (`hyena`) before attention; `filters` are options of `Filter`."""

    def built_in(site: Site) -> nn.Module:
        if hyena is not None and site.index >= hyena:
            return Attention(site)
        return HyenaNd(site, order, width, direction, direct, **(filters or {}))

    return Plain(dim, depth, heads, patch=patch, prefix=0, mixer=built_in, global_pool=global_pool, replace=mixer,
                 **common)


def _without_axis(value: Tensor) -> Tensor:
    return value[0]


def _places_first(value: Tensor) -> Tensor:
    """A direct filter (order, C, *grid) as ours (*grid, order C)."""
    return value.flatten(0, 1).movedim(0, -1)


def _as_row(value: Tensor) -> Tensor:
    return value.view(1, -1)


_DERIVED = Dropped(r"filter_fn\.(pos_emb\.t|.*deltas)", "a table of constants")
_SAME = "the one sine module of all layers"
MIXER: KeyMap = (
    (r"short_filter\.(.*)", r"short.\1"),
    (r"linear_mix\.(.*)", r"mix.\1"),
    (r"filter_fn\.bias", "bias"),
    (r"filter_fn\.pos_emb\.z", "filter.position", _without_axis),
    (r"filter_fn\.Y?implicit_filter\.1\.freq", "filter.frequency"),
    Dropped(r"filter_fn\.[XY]?implicit_filter\.\d+\.freq", _SAME),
    *((rf"filter_fn\.{axis}implicit_filter\.{2 * layer}\.(.*)", rf"filter.mlps.{number}.{layer}.\1")
      for axis, number in (("", 0), ("X", 0), ("Y", 1)) for layer in range(9)),
    ("filter", "filter.weight", _places_first),
    ("bias", "bias", torch.flatten),
)
# Rates and shifts of a learned window, before the rules of MIXER.
LEARNED: KeyMap = (
    *((rf"filter_fn\.(?:{name})", f"filter.{ours}#{number}", _as_row)
      for number, axis in enumerate("XY") for ours, name in (
          ("rate", rf"modulation\.{axis}deltas|{axis}modulation\.deltas"), ("shift", rf"{axis}modulation\.shift"))),
    (r"filter_fn\.modulation\.shift", "filter.shift", _as_row),
)
AUTHORS: KeyMap = (
    *within((_DERIVED, *MIXER, (r"(.*)", r"\1")), r"blocks\.(\d+)\.attn\.", r"blocks.\1.mixer."),
    ("pos_embed", "position"),
    (r"patch_embed\.proj\.(.*)", r"stem.proj.\1"),
)
TAPS = {r"block(\d+)": r"blocks.\1"}
