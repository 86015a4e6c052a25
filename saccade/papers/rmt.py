"""RMT: attention that fades with the Manhattan distance.

What retention's decay is to a sentence, a decay a head and step on the grid is to an image: with a head's
gamma = 1 - 2^(-initial - span head / heads) and D[i, j] = |y_i - y_j| + |x_i - x_j|,
    out = proj(softmax(q k^T / sqrt(d) + D log gamma) v + conv(v)),
so heads see from a few tokens to the whole map. q and k are turned by angles that grow with the token's number (rotary
position); conv is a 5x5 depthwise convolution (local context enhancement). D is a sum over axes, so early stages take
them apart: attention along each row with its part of D, then, on what that gave, along each column.

Fan et al., "RMT: Retentive Networks Meet Vision Transformers", 2023, sections 3.2-3.3.

Any grid, without padding. Quirks kept: the paper multiplies softmax weights by gamma^D, the authors' models add its
logarithm to the logits; angles follow the row-major number of a token, for both axes alike; both passes of the
decomposed form take the same q and k; rmt_t decomposes its first two stages only (2.64 G multiply-adds for the paper's
2.5). Only the settings of rmt_t are proven by a golden; those of the others give the published numbers of parameters,
and 6 to 7 % more multiply-adds than published. By the authors' training logs, those trained with a label a token
(`_label`; the paper's star) have 1,025,000, 513,000 and 641,000 parameters more: a second head, on the projected map of
rmt_s_label and on the last map of the others. Ours uses it in training alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import log1p, prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.rotary import rotate
from saccade.ops.tables import table
from saccade.parts.attention import check_heads
from saccade.parts.axes import line_tokens
from saccade.parts.convolution import depthwise
from saccade.parts.rmt_pyramid import RmtPyramid, rmt_names
from saccade.parts.tokens import global_tokens

_PUBLISHED = ("rmt_t", "rmt_s", "rmt_b", "rmt_l", "rmt_s_label", "rmt_b_label", "rmt_l_label")

CARD = Card(
    "RMT: Retentive Networks Meet Vision Transformers",
    authors="Fan, Huang, Chen, Liu, He",
    year=2023,
    systems=("rmt",),
    arxiv="2309.11523",
    code="qhfan/RMT@32ea214",
    licence="unknown",
    read="paper",
    keywords="Manhattan self-attention, MaSA, spatial decay, retention, axial decomposition, rotary position, "
             "local context enhancement",
    kinds=("backbone", "mixer"),
    mixers={"manhattan": "ManhattanAttention"},
    params=dict(zip(_PUBLISHED, (14e6, 27e6, 54e6, 95e6, 27e6, 55e6, 96e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (2.5e9, 4.5e9, 9.7e9, 18.2e9, 4.5e9, 9.7e9, 18.2e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (82.4, 84.1, 85.0, 85.5, 84.8, 85.6, 86.1), strict=True)),
    weights={name: Weights(f"https://pan.baidu.com/s/{share}")
             for name, share in (
                 ("rmt_t", "1uTSCuPqYRNmT4Zb4Je9BOw?pwd=vsyv"), ("rmt_s", "1aQeErkmy191-zshlW2bT0g?pwd=3ay4"),
                 ("rmt_b", "1ZDNl_broia_fvvlEoTaFhA?pwd=yzge"), ("rmt_l", "1v7QWgAh0TulWOTg4d94KHw?pwd=uewu"),
                 ("rmt_s_label", "1Xjgko9_-rokfvP39uiwTqQ?pwd=q37r"),
                 ("rmt_b_label", "1fqCzZ8Pfw39QA4LQ3dSiCg?pwd=2rdt"),
                 ("rmt_l_label", "1KvV8IMJC6xG5Eh6w6uFbpw?pwd=z1k2"))},
    goldens=("rmt_t", "op_rmt_masa_decomposed", "op_rmt_masa_full"),
    tests=("tests/papers/test_rmt.py",),
)

Grid = tuple[int, ...]


class ManhattanAttention(nn.Module):
    """out = proj(softmax(q k^T / sqrt(d) + D log gamma) v + conv(v)), D the Manhattan distance, q and k rotated.

    (B, *grid, C) -> (B, *grid, C). gamma = 1 - 2^(-initial - span head / heads). Where `decomposed`, attention runs
    along the last axis, then on its result along the one before, and so on; what `record` sums is then not the weight
    of token j in token i but the passes: a cross through i, each arm with the weights of its line; rows sum to the
    number of axes. Raises SaccadeError where the heads do not divide the width into even parts, or a decay is not
    above 0.
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template(
        "q k^T / sqrt(d) + log gamma |j - i|, q and k rotated", "softmax", "sum of v, and a convolution of v"
    )

    def __init__(self, site: Site, decomposed: bool = True, initial: float = 2, span: float = 4) -> None:
        super().__init__()
        if check_heads(site) % 2:
            raise SaccadeError(f"{site.heads} heads of {site.dim} channels: rotation takes pairs, so give even heads")
        if min(initial, initial + span) <= 0:
            raise SaccadeError(f"initial={initial}, span={span}: initial and initial + span must be above 0")
        self.heads, self.decomposed = site.heads, decomposed
        self.decays = tuple(log1p(-(2.0 ** (-initial - span * head / site.heads))) for head in range(site.heads))
        self.qkv = nn.Linear(site.dim, 3 * site.dim)
        self.local = depthwise(site.rank, site.dim, 5)
        self.proj = nn.Linear(site.dim, site.dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        qkv = self.qkv(x)
        parts = qkv.unflatten(-1, (3, self.heads, -1))  # (B, *grid, 3, heads, d)
        q, k = rotate(parts[..., :2, :, :]).unbind(-3)
        v = parts[..., 2, :, :]
        if self.decomposed:
            for axis in reversed(range(len(grid))):
                v = self.along(axis, grid, q, k, v)
        else:
            tokens = (part.flatten(1, -3) for part in (q, k, v))
            v = self.attend(grid, lambda: global_tokens(prod(grid), x.device), *tokens)
        return self.proj(self.local(qkv.chunk(3, -1)[2]) + v.reshape(x.shape))

    def along(self, axis: int, grid: Grid, *qkv: Tensor) -> Tensor:
        """Attention inside each line of an axis: q, k, v (B, *grid, heads, d) -> (B, *grid, heads, d)."""
        moved = [part.movedim(axis + 1, -3) for part in qkv]
        lines = [part.flatten(0, -4) for part in moved]  # (B lines, side, heads, d)
        out = self.attend((grid[axis],), lambda: (line_tokens(grid, (axis,), qkv[0].device),) * 2, *lines)
        return out.unflatten(0, moved[0].shape[:-3]).movedim(-3, axis + 1)

    def attend(self, sides: Grid, where: Any, *qkv: Tensor) -> Tensor:
        """Decaying attention among the tokens of `sides`: q, k, v (G, N, heads, d) -> (G, N, heads, d)."""
        q, k, v = (part.transpose(1, 2) for part in qkv)
        return attend(q, k, v, fading(self.decays, sides, q.device, q.dtype), where=where).transpose(1, 2)

    def reach(self, site: Site) -> None:
        """Every token reaches every other, in the decomposed form by way of the token where their lines cross."""
        return None

    def cost(self, site: Site, grid: Grid) -> int:
        """Multiply-adds of N tokens and M keys a query (N, or a line of each axis): projections 4 N C^2, attention
        2 N M C, convolution N C 5^rank.
        """
        keys = sum(grid) if self.decomposed else prod(grid)
        return prod(grid) * site.dim * (4 * site.dim + 2 * keys + 5 ** len(grid))


@table
def fading(decays: tuple[float, ...], sides: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, heads, N, N) Manhattan distances on a grid of `sides`, times the logarithm of each head's decay."""
    places = [torch.arange(side, device=device) for side in sides]
    places = [place.flatten() for place in torch.meshgrid(*places, indexing="ij")]
    distance = torch.stack([(place[:, None] - place).abs() for place in places]).sum(0)
    return (torch.tensor(decays, device=device, dtype=dtype).view(1, -1, 1, 1) * distance).to(dtype)


class LabelledRmt(RmtPyramid):
    """An RMT with a second head, whose scores of each token are trained with labels (saccade.learn.token_labeling).

    It reads the last map, or, where `projected`, what the first head pools. Class scores do not depend on it.
    """

    def __init__(self, *args: Any, projected: bool, **options: Any) -> None:
        self.projected = projected  # first, since a pyramid makes its heads as it is built
        super().__init__(*args, **options)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        before: Any = self.norm[0]  # type: ignore[index]
        dim = before.out_features if self.projected else before.in_features
        self.head_aux = nn.Linear(dim, num_classes) if num_classes else None
        self.removed = () if num_classes else ("head.fc", "head_aux")

    def after_stem(self, x: Tensor) -> Tensor:
        """The last map (B, *grid, C), from the stem's."""
        for stage in self.stages:
            x = stage(x)
        return x

    def label_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the image (B, classes) and of each token (B, N, classes), from the last map (B, *grid, C)."""
        if self.head_aux is None:
            raise SaccadeError("no head labels the tokens: build the model with classes")
        projected = self.norm(x)
        return self.head(projected), self.head_aux((projected if self.projected else x).flatten(1, -2))


_SMALL: dict[str, Any] = dict(dims=(64, 128, 256, 512), heads=(4, 4, 8, 16))
_DEEP: dict[str, Any] = dict(depths=(4, 8, 25, 8), ratios=(4, 4, 3, 3), layer_scales=(None, None, 1e-6, 1e-6))
SIZES: dict[str, dict[str, Any]] = {
    "rmt_t": _SMALL | dict(depths=(2, 2, 8, 2), decomposed=(True, True, False, False)),
    "rmt_s": _SMALL | dict(depths=(3, 4, 18, 4), ratios=(4, 4, 3, 3)),
    "rmt_b": _DEEP | dict(dims=(80, 160, 320, 512), heads=(5, 5, 10, 16), spans=(5, 5, 6, 6)),
    "rmt_l": _DEEP | dict(dims=(112, 224, 448, 640), heads=(7, 7, 14, 20), spans=(6, 6, 6, 6)),
    "rmt_nano": dict(dims=(32, 64, 128), depths=(1, 2, 2), heads=(2, 4, 8), decomposed=(True, True, False),
                     projection=128, patch=2, img_size=32),
}
SIZES |= {f"{name}_label": SIZES[name] | dict(labels=labels)
          for name, labels in (("rmt_s", "projected"), ("rmt_b", "last"), ("rmt_l", "last"))}


def rmt(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    ratios: Sequence[float] = (3, 3, 3, 3),
    initials: Sequence[float] = (2, 2, 2, 2),
    spans: Sequence[float] = (4, 4, 6, 6),
    decomposed: Sequence[bool] = (True, True, True, False),
    layer_scales: Sequence[float | None] = (None, None, None, None),
    projection: int = 1024,
    patch: int = 4,
    labels: str = "",
    mixer: Any = None,
    **common: Any,
) -> RmtPyramid:
    """An RMT of a size; the sequences have one entry a stage. `patch`, the stem's stride, is a power of two.

    The head projects the map to `projection` channels before it pools, so that is what `forward_features` gives.
    `labels` says which map a second head reads token by token: the "last", the "projected", or none ("").
    """
    mixers = [partial(ManhattanAttention, decomposed=apart, initial=initial, span=span)
              for apart, initial, span in zip(decomposed, initials, spans, strict=False)]
    build = partial(LabelledRmt, projected=labels == "projected") if labels else RmtPyramid
    return build(dims, depths, heads, mixers, ratios, layer_scales, projection, patch, replace=mixer, **common)


MIXER: KeyMap = (
    *((rf"{letter}_proj\.(.*)", rf"qkv.\1#{part}") for part, letter in enumerate("qkv")),
    (r"lepe\.conv\.(.*)", r"local.\1"),
    (r"out_proj\.(.*)", r"proj.\1"),
)
AUTHORS: KeyMap = rmt_names(MIXER)
# The authors' stage outputs are taken after the downsampling that follows.
TAPS = {r"stage([123])": r"stages.\1.downsample", "stage4": "stages.3"}
