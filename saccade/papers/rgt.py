"""RGT: every pixel looks at a whole picture that has been folded into few tokens.

Blocks of local and of global attention take turns. Recursive-generalization attention folds the map by one and the same
depthwise convolution of stride 4 as often as it needs (once more for four times the side), and all pixels look at what
is left, queries and keys in a fraction of the channels,
    m = gelu(norm(conv(dw(fold(...fold(x)))))),   out = proj(softmax(q(x) k(m)^T / sqrt(c d)) (v(m) + dw(v(m)))).
Local attention has windows that lie (8 x 32) for half of the heads and stand (32 x 8) for the others. Each block adds
its own input once more, scaled by a learned factor a channel (hybrid adaptive integration).

Chen, Zhang, Gu, Kong, Yang, "Recursive Generalization Transformer for Image Super-Resolution", 2023, section 3.

Any picture: local attention zero-pads queries, keys and values to multiples of the longer side, without a mask; folding
leaves out what does not fill a last window, and pads what is smaller than one. Quirk kept: in training the map is
folded down to a quarter of what evaluation leaves, but evaluation folds twice at least.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.keymap import Dropped, KeyMap, matrix_from_1x1, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend, in_cache
from saccade.ops.window import crop, merge, pad_end, pad_to_multiple, partition, shifted, window_tokens
from saccade.parts.attention import check_heads
from saccade.parts.block import Block
from saccade.parts.convolution import depthwise, grid_conv
from saccade.parts.dynamic_bias import DYNAMIC_BIAS, DynamicBias
from saccade.parts.mlp import Gelu
from saccade.parts.pyramid import drop_path_rates
from saccade.parts.restoration.body import SKELETON, Group, SuperResolver
from saccade.parts.tokens import strided_tokens, token_numbers
from saccade.parts.window import attend_windows, region_mask, some_windows

CARD = Card(
    "Recursive Generalization Transformer for Image Super-Resolution",
    authors="Chen, Zhang, Gu, Kong, Yang",
    year=2023,
    systems=("rgt",),
    arxiv="2303.06373",
    code="zhengchen1999/RGT@01b4379",
    licence="Apache-2.0",
    read="paper, code",
    keywords="super-resolution, recursive generalization self-attention, rectangle window attention, hybrid adaptive "
             "integration, dynamic position bias",
    kinds=("restoration", "mixer"),
    mixers={"recursive_generalization": "RecursiveGeneralization", "rectangle_window": "RectangleWindow"},
    params={"rgt_s_x4": 10.2e6, "rgt_x4": 13.37e6},
    weights={  # two folders
        f"{name}_x{scale}": Weights(f"https://drive.google.com/drive/folders/{folder}?usp=drive_link#x{scale}",
                                    data="DF2K")
        for name, folder in (("rgt_s", "1j46WHs1Gvyif1SsZXKy1Y1IrQH0gfIQ1"),
                             ("rgt", "1zxrr31Kp2D_N9a-OUAPaJEn_yTaSXTfZ"))
        for scale in (2, 3, 4)
    },
    goldens=("rgt_s_x2", "op_rgt_lsa_shift", "op_rgt_rgsa"),
    tests=("tests/papers/test_rgt.py",),
)

FOLD = 4
PIECE = 1024  # tokens whose hidden state is computed at once on a CPU, where it then stays in the cache


class RectangleWindow(nn.Module):
    """Attention in windows that lie for the first half of the heads and stand for the second: (B, H, W, C) -> the same.

    out = proj(softmax(q k^T / sqrt(d) + bias) v + dw(v)), the windows `window` (height, width) and (width, height),
    moved by half a window where `shift` (by default in every second such block).
    """

    ranks, weights = (2,), True
    projections = ("qkv", "proj")
    template = Template(
        "q k^T / sqrt(d) + offset of a network, in lying and standing windows",
        "softmax",
        "sum of v, and a convolution of v",
    )

    def __init__(
        self, site: Site, window: tuple[int, int] = (4, 16), shift: bool | None = None, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        check_heads(Site(site.dim, 2 * (site.heads // 2) or 2))
        self.heads = max(site.heads // 2, 1)  # of a half
        self.shift = site.index % 4 == 2 if shift is None else shift
        self.windows = (tuple(window), tuple(window[::-1]))
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        hidden = max(site.dim // 2 // 4 // 4, 1)
        self.bias = nn.ModuleList(DynamicBias(window, self.heads, hidden) for window in self.windows)
        self.position = depthwise(2, site.dim, 3)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        if in_cache(x) and not any(side % max(self.windows[0]) for side in grid):
            return self._in_parts(x)
        qkv = self.qkv(x)
        parts = pad_to_multiple(qkv, (max(self.windows[0]),) * 2).unflatten(-1, (3, 2, -1)).movedim(-2, 0)
        halves = [self._half(number, part.flatten(-2), grid) for number, part in enumerate(parts.unbind(0))]
        return self.proj(crop(torch.cat(halves, -1), grid) + self.position(qkv.chunk(3, -1)[2]))

    def _half(self, number: int, qkv: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The attention of one half of the heads, (B, H', W', 3 C / 2) -> (B, H', W', C / 2), H' and W' padded."""
        window, padded, shift = self.windows[number], tuple(qkv.shape[1:-1]), self._shift(number)
        if self.shift:
            qkv = shifted(qkv, tuple(-step for step in shift))
        qkv = partition(qkv, window)  # under one name, so that what came before is freed
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = region_mask(padded, window, shift, qkv.device) if self.shift else None

        def where() -> tuple[Tensor, Tensor]:
            tokens = window_tokens(grid, window, shift, qkv.device, padded)
            return tokens, tokens

        out = attend_windows(q, k, v, self.bias[number](), mask, where).transpose(1, 2).flatten(2)
        out = merge(out, window, padded)
        return shifted(out, shift) if self.shift else out

    def _in_parts(self, x: Tensor) -> Tensor:
        """The same on a grid of whole windows, some of them at a time: q, k and v of all are never laid out."""
        C, half = x.shape[-1], x.shape[-1] // 2
        mixed, values = x.new_empty(x.shape), x.new_empty(x.shape)
        for number, window in enumerate(self.windows):
            weight, offset = (None if part is None else part.unflatten(0, (3, 2, half))[:, number].flatten(0, 1)
                              for part in (self.qkv.weight, self.qkv.bias))
            bias, here = self.bias[number]().contiguous(), slice(number * half, (number + 1) * half)
            for rows, tokens, mask in some_windows(x, window, self._shift(number), self.heads):
                qkv = F.linear(tokens, weight, offset).unflatten(-1, (3, self.heads, -1))
                q, k, v = qkv.permute(2, 0, 3, 1, 4)
                out = attend(q, k, v, bias if mask is None else bias + mask[:, None]).transpose(1, 2)
                for target, part in ((mixed, out), (values, qkv[:, :, 2])):
                    target.view(-1, C)[:, here].index_copy_(0, rows, part.reshape(-1, half).to(x))
        return self.proj(mixed.add_(self.position(values)))

    def _shift(self, number: int) -> tuple[int, ...]:
        return tuple(side // 2 if self.shift else 0 for side in self.windows[number])

    def reach(self, site: Site) -> tuple[int, ...]:
        """From one end of the longer side to the other, and one token on for the convolution of v."""
        return (max(self.windows[0]) - 1,) * 2

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 + 9 N C, attention 2 M |window| C over the M tokens of the padded grid, biases."""
        longest, tokens = max(self.windows[0]), prod(grid)
        padded = prod(side + (-side) % longest for side in grid)
        bias: Any = self.bias
        return (tokens * site.dim * (4 * site.dim + 9) + 2 * padded * prod(self.windows[0]) * site.dim
                + sum(half.cost() for half in bias))


class RecursiveGeneralization(nn.Module):
    """Attention of all tokens to the map folded into few: (B, H, W, C) -> the same.

    `ratio` is the share of the channels in which queries and keys, and the folded map, are.
    """

    ranks, weights = (2,), True
    template = Template("q k^T / sqrt(d) to a map folded to few tokens", "softmax", "sum of v, folded")

    def __init__(self, site: Site, ratio: float = 0.5, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads, thin = site.heads, int(site.dim * ratio)
        check_heads(site)
        self.scale = check_heads(Site(thin, site.heads)) ** -0.5
        self.fold = grid_conv(2, site.dim, site.dim, FOLD, stride=FOLD, groups=site.dim)
        self.spread = depthwise(2, site.dim, 3)
        self.narrow = nn.Linear(site.dim, thin)
        self.norm, self.activation = nn.LayerNorm(thin), Gelu()
        self.q = nn.Linear(site.dim, thin, bias=qkv_bias)
        self.k = nn.Linear(thin, thin, bias=qkv_bias)
        self.v = nn.Linear(thin, site.dim, bias=qkv_bias)
        self.position = depthwise(2, site.dim, 3)
        self.proj = nn.Linear(site.dim, site.dim)

    def times(self, grid: tuple[int, ...], training: bool = False) -> int:
        """How often a map is folded: until its longer side is below 64 tokens, or twice (in training 16, once)."""
        times, side = 0, max(grid) // (4 if training else 16)
        while side >= FOLD:
            times, side = times + 1, side // FOLD
        return max(times, 1 if training else 2)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        times = self.times(grid, self.training)
        folded = pad_end(x, [max(0, FOLD**times - side) for side in grid])
        for _ in range(times):
            folded = self.fold(folded)
        folded = self.activation(self.norm(self.narrow(self.spread(folded))))
        v = self.v(folded)
        q, k, v = (part.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.q(x), self.k(folded), v + self.position(v)))
        cells = tuple(folded.shape[1:-1])
        where = partial(self._where, grid, cells, FOLD**times, x.device)
        out = attend(q, k, v, scale=self.scale, where=where)
        return self.proj(out.transpose(1, 2).flatten(2).view(x.shape))

    @staticmethod
    def _where(
        grid: tuple[int, ...], cells: tuple[int, ...], stride: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """A folded token stands for the one in the middle of those that it is made of."""
        return token_numbers(prod(grid), device), strided_tokens(grid, cells, stride, 0, device)

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds of N tokens folded to M, c channels of C: (c + C) N C, 18 M C, M c (2 C + c), N M (c + C)."""
        thin, tokens, folding, times = self.q.out_features, prod(grid), 0, self.times(grid)
        sides = tuple(max(side, FOLD**times) for side in grid)
        for _ in range(times):
            sides = tuple(side // FOLD for side in sides)
            folding += prod(sides) * FOLD**2 * site.dim
        keys = prod(sides)
        return (folding + tokens * site.dim * (thin + site.dim) + keys * (18 * site.dim + thin * (2 * site.dim + thin))
                + tokens * keys * (thin + site.dim))


class SpatiallyGatedMlp(nn.Module):
    """W_2 (a * dw(norm(b))), a and b the halves of gelu(W_1 x): (B, H, W, C) -> the same."""

    def __init__(self, dim: int, ratio: float = 2.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1, self.activation = nn.Linear(dim, hidden), Gelu()
        self.norm, self.conv = nn.LayerNorm(hidden // 2), depthwise(2, hidden // 2, 3)
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        if in_cache(x) and prod(x.shape[:-1]) > PIECE:
            return self._in_parts(x)
        kept, gate = self.activation(self.fc1(x)).chunk(2, -1)
        return self.fc2(kept * self.conv(self.norm(gate)))

    def _in_parts(self, x: Tensor) -> Tensor:
        """The same, some tokens at a time before the convolution and after it."""
        (kept, gate), (kept_bias, gate_bias) = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
        tokens, normed, out = x.flatten(0, -2).split(PIECE), x.new_empty(*x.shape[:-1], len(gate)), x.new_empty(x.shape)
        for here, part in zip(normed.flatten(0, -2).split(PIECE), tokens, strict=True):
            here.copy_(self.norm(self.activation(F.linear(part, gate, gate_bias))))
        gates = self.conv(normed).flatten(0, -2).split(PIECE)
        for here, part, by in zip(out.flatten(0, -2).split(PIECE), tokens, gates, strict=True):
            here.copy_(self.fc2(self.activation(F.linear(part, kept, kept_bias)).mul_(by)))
        return out


class AdaptiveBlock(Block):
    """block(x) + gamma x, gamma a learned factor a channel."""

    def __init__(self, site: Site, mixer: nn.Module, **options: Any) -> None:
        super().__init__(site, mixer, **options)
        self.gamma = nn.Parameter(torch.full((site.dim,), 1e-4))

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        return super().forward(x, **optional).addcmul_(x, self.gamma)  # a fresh sum, which nobody else holds


SIZES: dict[str, dict[str, Any]] = {
    f"rgt{suffix}_x{scale}": dict(scale=scale, depths=(6,) * groups)
    for suffix, groups in (("_s", 6), ("", 8)) for scale in (2, 3, 4)
}


def rgt(
    scale: int,
    depths: tuple[int, ...] = (6,) * 8,
    dim: int = 180,
    heads: int = 6,
    window: tuple[int, int] = (8, 32),
    mlp_ratio: float = 2.0,
    ratio: float = 0.5,
    in_chans: int = 3,
    drop_path_rate: float = 0.1,
) -> SuperResolver:
    """An RGT of so many groups, `depths` blocks each; local attention is shifted in every second of its blocks."""
    rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
    groups: list[nn.Module] = []
    for group, depth in enumerate(depths):
        blocks: list[nn.Module] = []
        for index in range(depth):
            site = Site(dim, heads, index=index, grid=(64, 64))
            mixer = (RecursiveGeneralization(site, ratio) if index % 2 else
                     RectangleWindow(site, window, shift=index % 4 == (0 if group % 2 else 2)))
            blocks.append(AdaptiveBlock(site, mixer, drop_path=next(rates), norm=nn.LayerNorm,
                                        mlp=partial(SpatiallyGatedMlp, ratio=mlp_ratio)))
        groups.append(Group(blocks, dim))
    return SuperResolver(scale, dim, groups, multiple=1, in_chans=in_chans)


RECTANGLE: KeyMap = (
    Dropped(r"(attn_mask_\d|attns\.\d\.(rpe_biases|relative_position_index))", "derived buffer"),
    *within(DYNAMIC_BIAS, r"attns\.(\d)\.pos\.", r"bias.\1."),
    (r"get_v\.(.*)", r"position.\1"),
    (r"(qkv|proj)\.(.*)", r"\1.\2"),
)
RECURSIVE: KeyMap = (
    (r"reduction1\.(.*)", r"fold.\1"),
    (r"dwconv\.(.*)", r"spread.\1"),
    (r"conv\.weight", r"narrow.weight", matrix_from_1x1),
    (r"conv\.bias", r"narrow.bias"),
    (r"norm_act\.0\.(.*)", r"norm.\1"),
    (r"cpe\.(.*)", r"position.\1"),
    (r"([qkv]|proj)\.(.*)", r"\1.\2"),
)
BLOCK: KeyMap = (
    *within((*RECTANGLE, *RECURSIVE), r"attn\.", "mixer."),
    (r"mlp\.sg\.(.*)", r"mlp.\1"),
    (r"(.*)", r"\1"),
)
AUTHORS: KeyMap = (
    *within(BLOCK, r"layers\.(\d+)\.blocks\.(\d+)\.", r"groups.\1.blocks.\2."),
    (r"layers\.(\d+)\.(.*)", r"groups.\1.\2"),
    (r"before_RG\.1\.(.*)", r"stem_norm.\1"),
    (r"norm\.(.*)", r"norm.\1"),
    *SKELETON,
)
TAPS = {r"layer(\d+)": r"groups.\1"}
