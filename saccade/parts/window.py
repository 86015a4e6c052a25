"""Self-attention inside windows: the module that Swin and its kin share."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.record import Where
from saccade.core.site import Site
from saccade.ops.attend import attend, in_cache
from saccade.ops.sizes import modulo
from saccade.ops.tables import table
from saccade.ops.window import (
    crop,
    merge,
    pad_to_multiple,
    partition,
    relative_position_index,
    shifted,
    window_tokens,
)
from saccade.parts.attention import check_heads

LAID = 2**21  # numbers of masked biases that are laid out at once, in evaluation


class RelativeBias(nn.Module):
    """A learned bias a head and offset between two tokens of a window: () -> (heads, N, N).

    The table (prod(2 w - 1), heads) is indexed by query - key; one from another window is resampled (bicubic over the
    offsets) when it is loaded, as Swin's own code does.
    """

    undecayed = ("table",)

    def __init__(self, window: tuple[int, ...], heads: int) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros(torch.Size(2 * side - 1 for side in window).numel(), heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self) -> Tensor:
        index = relative_position_index(self.window, self.table.device)
        return self.table[index].permute(2, 0, 1)

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The table of square windows of another side, for this window."""
        side = round(value.shape[0] ** (1 / len(self.window)))
        if len(self.window) != 2 or side**2 != value.shape[0]:
            return value
        square = value.T.reshape(1, -1, side, side)
        sides = [2 * part - 1 for part in self.window]
        return F.interpolate(square, size=sides, mode="bicubic", align_corners=False)[0].flatten(1).T


class WindowAttention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d) + bias) v) among the tokens of each window: (B, *grid, C) -> (B, *grid, C).

    A grid that is no multiple of the window is zero-padded at its end, before qkv and without a mask.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")

    def __init__(self, site: Site, window: int | tuple[int, ...] = 7, qkv_bias: bool = True, bias: bool = True) -> None:
        super().__init__()
        check_heads(site)
        self.heads = site.heads
        self.window = (window,) * site.rank if isinstance(window, int) else tuple(window)
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.bias = RelativeBias(self.window, site.heads) if bias else None
        self.proj = nn.Linear(site.dim, site.dim)

    def attend(
        self, windows: Tensor, grid: tuple[int, ...], shift: tuple[int, ...], mask: Tensor | None = None
    ) -> Tensor:
        """Attention inside windows (B x G, N, C); `mask` (G, N, N) is added to the logits of each window."""
        G, N, C = windows.shape
        q, k, v = self.qkv(windows).view(G, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)

        def where() -> tuple[Tensor, Tensor]:
            tokens = window_tokens(grid, self.window, shift, windows.device)
            return tokens, tokens

        bias = self.bias() if self.bias is not None else None
        out = attend_windows(q, k, v, bias, mask, where)
        return self.proj(out.transpose(1, 2).reshape(G, N, C))

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        x = pad_to_multiple(x, self.window)
        out = self.attend(partition(x, self.window), grid, (0,) * len(grid))
        return crop(merge(out, self.window, tuple(x.shape[1:-1])), grid)

    def attend_shifted(self, x: Tensor, shift: int) -> Tensor:
        """The same in windows that are moved by `shift` tokens along each axis, regions that the roll joined apart.

        (Liu et al., Swin Transformer, 2021, section 3.2.)
        """
        grid = tuple(x.shape[1:-1])
        x = pad_to_multiple(x, self.window)
        padded, shifts = tuple(x.shape[1:-1]), (shift,) * len(grid)
        x = shifted(x, (-shift,) * len(grid))
        mask = region_mask(padded, self.window, shifts, x.device)
        windows = self.attend(partition(x, self.window), grid, shifts, mask)
        return crop(shifted(merge(windows, self.window, padded), shifts), grid)

    def reach(self, site: Site) -> tuple[int, ...]:
        """From one end of a window to the other."""
        return tuple(side - 1 for side in self.window)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 + 2 N |window| C over the N tokens of the padded grid."""
        tokens = torch.Size(side + (-side) % part for side, part in zip(grid, self.window, strict=True)).numel()
        return 4 * tokens * site.dim**2 + 2 * tokens * torch.Size(self.window).numel() * site.dim


class ShiftingAttention(WindowAttention):
    """Window attention whose windows are moved by `shift`, always."""

    def __init__(self, site: Site, window: int, shift: int) -> None:
        super().__init__(site, window)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return self.attend_shifted(x, self.shift) if self.shift else super().forward(x)


def attend_windows(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, where: Where | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + mask) v in windows: q (B x G, heads, N, d), bias (heads, N, N), mask (G, N, N).

    Masked biases of all windows take as much memory as the weights that fused attention never writes. So where no
    gradient is taken they are laid out for some windows at a time, on a CPU.
    """
    if mask is None:
        return attend(q, k, v, bias, where=where)
    mask, bias = mask.to(q.dtype), None if bias is None else bias.contiguous()  # else their sum has the heads inside
    some = LAID // (q.shape[1] * q.shape[2] ** 2) or 1
    if not in_cache(q) or len(q) <= some:
        return attend(q, k, v, masked(bias, mask, q.shape[0]), where=where)  # len() would fix a size left open
    images = zip(*(x.split(len(mask)) for x in (q, k, v)), strict=True)
    parts = [part for image in images for part in zip(*(x.split(some) for x in (*image, mask)), strict=True)]
    out = [attend(q, k, v, masked(bias, mask, len(q))).transpose(1, 2) for q, k, v, mask in parts]
    return torch.cat(out).transpose(1, 2)


def masked(bias: Tensor | None, mask: Tensor, windows: int) -> Tensor:
    """bias (heads, N, N) + mask (G, N, N) for so many windows, those of an image in a row: (windows, heads, N, N)."""
    both = mask[:, None] if bias is None else bias + mask[:, None]
    if not isinstance(windows, int):  # not by expanding, before which older torch asks whether there is one window
        return both.index_select(0, modulo(torch.arange(windows, device=mask.device), mask.shape[0]))
    images = windows // mask.shape[0]
    return both.expand(images, *both.shape).flatten(0, 1) if images > 1 else both


def some_windows(
    x: Tensor, window: tuple[int, ...], shift: tuple[int, ...], heads: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The windows of a grid (B, *grid, C) of whole windows, some at a time: (rows, tokens, mask).

    Tokens (G, N, C) are the `rows` (G N,) of x.flatten(0, -2): what becomes of them is laid back there. The mask
    (G, N, N) is that of windows that are shifted. As many as a bias for `heads` may be laid out for at once.
    """
    grid, flat = tuple(x.shape[1:-1]), x.flatten(0, -2)
    tokens = window_tokens(grid, window, shift, x.device)
    mask = region_mask(grid, window, shift, x.device).to(x.dtype) if any(shift) else None
    some = LAID // (heads * prod(window) ** 2) or 1
    for image in range(len(x)):
        for first in range(0, len(tokens), some):
            rows = tokens[first:first + some].flatten() + image * prod(grid)
            windows = flat.index_select(0, rows).view(-1, *tokens.shape[1:], x.shape[-1])
            yield rows, windows, None if mask is None else mask[first:first + some]


@table
def region_mask(
    padded: tuple[int, ...], window: tuple[int, ...], shifts: tuple[int, ...], device: torch.device
) -> Tensor:
    """(windows, N, N): 0 between tokens of one region of the rolled grid, -100 between tokens of two."""
    region = torch.zeros(1, *padded, 1, dtype=torch.long, device=device)
    for axis, (side, part, shift) in enumerate(zip(padded, window, shifts, strict=True)):
        place = torch.arange(side, device=device)
        strip = (place >= side - part).long() + (place >= side - shift).long()
        region = region * 3 + strip.view(-1, *[1] * (len(padded) - axis))
    groups = partition(region, window).squeeze(-1)
    return (groups[:, :, None] != groups[:, None, :]) * torch.tensor(-100.0, device=device)
