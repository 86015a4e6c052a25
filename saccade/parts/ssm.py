"""What state space mixers share: projections that choose steps, inputs and readouts; scans of maps; a norm; a block."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.ops.attend import in_cache
from saccade.ops.scan import selective_scan
from saccade.ops.window import crop
from saccade.parts.block import LAYER_NORM, Norm, residual_tail
from saccade.parts.convolution import GridConv1d, depthwise
from saccade.parts.tokens import join

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def step_rank(dim: int) -> int:
    """Width of the bottleneck from which the steps dt of all channels are projected."""
    return ceil(dim / 16)


def log_rates(dim: int, states: int) -> nn.Parameter:
    """log(-a), (dim, states), for decays of rates 1, 2, ..., `states` in every channel."""
    return nn.Parameter(torch.arange(1, states + 1).float().log().repeat(dim, 1))


def step_bias(*shape: int, shortest: float = 1e-3, longest: float = 0.1) -> nn.Parameter:
    """Biases whose softplus, the step of a token that says nothing, lies log-uniformly between the two."""
    steps = torch.exp(torch.rand(shape) * log(longest / shortest) + log(shortest))
    return nn.Parameter(steps + torch.log(-torch.expm1(-steps)))


class CausalConv(GridConv1d):
    """A depthwise convolution that looks at a token and the `kernel` - 1 before it: (B, L, C) -> (B, L, C)."""

    def __init__(self, dim: int, kernel: int, bias: bool = True) -> None:
        super().__init__(dim, dim, kernel, padding=kernel - 1, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not in_cache(x) or torch.is_autocast_enabled(x.device.type):
            return crop(super().forward(x), (x.shape[1],))
        taps = self.weight.squeeze(1).mT.contiguous()  # on a CPU a pass for each is several times as fast (measured)
        out = x * taps[-1] if self.bias is None else torch.addcmul(self.bias, x, taps[-1])
        for back in range(1, min(len(taps), x.shape[1])):
            out[:, back:].addcmul_(x[:, :-back], taps[-1 - back])
        return out


class StepProjection(nn.Linear):
    """(..., rank) -> (..., dim), what the softplus of gives steps; a host leaves its start as it is."""

    own_start = True

    def __init__(self, rank: int, dim: int) -> None:
        super().__init__(rank, dim)
        nn.init.uniform_(self.weight, -(rank**-0.5), rank**-0.5)
        self.bias = step_bias(dim)


class Selection(nn.Module):
    """A scan whose steps, inputs and readouts are projections of its tokens: (B, L, E) -> (B, L, E).

        u = silu(conv(x)),  (r, b, c) = x_proj(u),  dt = softplus(dt_proj(r)),  y = scan(u, dt, a, b, c) + D u

    `rank` is the width of r, `states` the numbers of state a channel. (Gu, Dao, "Mamba", 2023, section 3.2 and 3.4.)
    """

    undecayed = ("A_log", "D")

    def __init__(self, dim: int, rank: int, states: int = 16, kernel: int = 4) -> None:
        super().__init__()
        self.split = (rank, states, states)
        self.conv = CausalConv(dim, kernel)
        self.x_proj = nn.Linear(dim, sum(self.split), bias=False)
        self.dt_proj = StepProjection(rank, dim)
        self.A_log = log_rates(dim, states)
        self.D = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return scan_together([self], [x])[0]

    def arguments(self, x: Tensor) -> Arguments:
        """What `selective_scan` takes, from the tokens (B, L, E)."""
        u = F.silu(self.conv(x))
        r, b, c = self.x_proj(u).split(self.split, -1)
        return u, F.softplus(self.dt_proj(r)), -self.A_log.exp(), b, c

    def cost(self, tokens: int) -> int:
        """Multiply-adds: convolution (also of the tokens that start it), projections, readout n E a token."""
        kernel = self.conv.kernel_size[0]
        dim, rank = self.dt_proj.weight.shape
        return dim * (kernel * (tokens + kernel - 1) + tokens * (sum(self.split) + rank + self.split[-1]))


def scan_together(selections: Sequence[Selection], sequences: Sequence[Tensor]) -> list[Tensor]:
    """Each selection on its own sequence, all of one length, in a single scan."""
    arguments = [selection.arguments(x) for selection, x in zip(selections, sequences, strict=True)]
    if len(arguments) == 1:
        scanned = [selective_scan(*arguments[0])]
    else:
        u, dt, a, b, c = (torch.stack(values, 0 if values[0].ndim == 2 else 1)
                          for values in zip(*arguments, strict=True))
        scanned = list(selective_scan(u, dt, a, b, c).unbind(1))
    return [torch.addcmul(y, each.D, u) for each, y, (u, *_) in zip(selections, scanned, arguments, strict=True)]


def selection_names(theirs: str, ours: str) -> KeyMap:
    """The authors' names of a selection; `theirs` is what ends each of them ("", "_b", "_0")."""
    return (
        (rf"conv1d{theirs}\.(.*)", rf"{ours}.conv.\1"),
        (rf"(x_proj|dt_proj){theirs}\.(.*)", rf"{ours}.\1.\2"),
        (rf"(A_log|D){theirs}", rf"{ours}.\1"),
    )


class GridScan(nn.Module):
    """Selections along several ways through a map, put back and summed, normed and, with `gate`, gated by silu(z).

        (x, z) = in_proj(tokens),  u = silu(conv(x)),  out = out_proj(norm(scanned(u, x_proj(u))) silu(z))

    Projections do not care for the order of tokens: those of all ways are one product. A subclass says what the ways
    are. `rank` is the width from which the steps are projected (C / 16 unless given),
    `kernel` the convolution's. (Liu et al., "VMamba: Visual State Space Model", 2024, section 4.2.)
    """

    ranks = (1, 2, 3)
    projections = ("in_proj", "out_proj")
    undecayed = ("A_log", "D")

    def __init__(
        self, site: Site, ways: int, states: int, kernel: int, expand: float, rank: int | None, bias: bool,
        conv_bias: bool, gate: bool,
    ) -> None:
        super().__init__()
        inner, rank = int(expand * site.dim), step_rank(site.dim) if rank is None else rank
        self.ways, self.kernel, self.split = ways, kernel, (rank, states, states)
        self.gate = gate
        self.in_proj = nn.Linear(site.dim, 2 * inner if gate else inner, bias=bias)
        self.conv = depthwise(site.rank, inner, kernel, bias=conv_bias)
        self.x_proj = nn.Linear(inner, ways * sum(self.split), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(ways, inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.dt_bias = step_bias(ways * inner)
        self.A_log = log_rates(ways * inner, states)
        self.D = nn.Parameter(torch.ones(ways * inner))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, site.dim, bias=bias)

    def scanned(self, u: Tensor, chosen: Tensor) -> Tensor:
        """Scans along all ways, put back and summed: (B, *grid, E), (B, *grid, ways, rank + 2 n) -> (B, *grid, E)."""
        raise NotImplementedError

    def scan(self, u: Tensor, chosen: Tensor, ways: Any = slice(None)) -> Tensor:
        """Lines of `ways` through their scans, without D u: (B, W, L, E), (B, W, L, rank + 2 n) -> (B, W, L, E)."""
        r, b, c = chosen.split(self.split, -1)
        bias, rates = (value.unflatten(0, (self.ways, -1))[ways] for value in (self.dt_bias, self.A_log))
        dt = F.softplus(r @ self.dt_weight[ways].mT + bias.unsqueeze(-2))
        return selective_scan(u, dt, -rates.exp(), b, c)

    def forward(self, x: Tensor) -> Tensor:
        inner, *gate = self.in_proj(x).chunk(2 if self.gate else 1, -1)
        u = F.silu(self.conv(inner))
        chosen = self.x_proj(u).unflatten(-1, (self.ways, -1))
        out = self.norm(self.scanned(u, chosen)).to(inner.dtype)
        return self.out_proj(out * F.silu(gate[0]) if gate else out)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: a token 3 C E (2 C E without gate) for the projections, k^r E for the convolution and
        (rank + 2 n) E for a way; a token of a way's line (rank + n) E.
        """
        inner, (rank, states, _) = self.dt_weight.shape[1], self.split
        each = (3 if self.gate else 2) * site.dim + self.kernel**site.rank + self.ways * (rank + 2 * states)
        return inner * (prod(grid) * each + self.scanned_tokens(grid) * (rank + states))

    def scanned_tokens(self, grid: tuple[int, ...]) -> int:
        """Tokens of all lines, padding among them."""
        return self.ways * prod(grid)

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


# The names that VMamba's authors, and those who build on their code, give the parameters of a `GridScan`.
GRID_SCAN: KeyMap = (
    (r"x_proj_weight", "x_proj.weight", lambda weight: weight.flatten(0, 1)),
    (r"dt_projs_weight", "dt_weight"),
    (r"dt_projs_bias", "dt_bias", Tensor.flatten),
    (r"A_logs", "A_log"),
    (r"Ds", "D"),
    (r"conv2d\.(.*)", r"conv.\1"),
    (r"out_norm\.(.*)", r"norm.\1"),
)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis, in float32 at least."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class MixerBlock(nn.Module):
    """x += tail(mixer(norm(x))), on grids (B, *grid, C): the gate within the mixer stands for an MLP."""

    def __init__(self, site: Site, mixer: nn.Module, *, drop_path: float = 0.0, norm: Norm = LAYER_NORM) -> None:
        super().__init__()
        self.site = site
        self.norm = norm(site.dim)
        self.mixer = mixer
        self.tail = residual_tail(site.dim, None, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.mixer(self.norm(x)))


class MixerTokens(MixerBlock):
    """The same block on prefix and grid tokens kept in one sequence (B, P + N, C); only the mixer sees them apart."""

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        normed = self.norm(tokens)
        x, prefix = normed[:, count:].unflatten(1, grid), normed[:, :count]
        mixed = join(*self.mixer(x, prefix=prefix)) if count else self.mixer(x).flatten(1, -2)
        return tokens + self.tail(mixed)
