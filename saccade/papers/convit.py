r"""ConViT: attention that starts as a convolution and may stop being one.

Gated positional self-attention mixes two maps, one of content and one of position alone, by a gate a head:
    A = (1 - g) softmax(q k^T / sqrt(d)) + g softmax(u . r),    r_ij = (dx, dy, dx^2 + dy^2) from query i to key j,
    out = proj(A v),    g = sigmoid(lambda).
At the start u = s (2 Dx, 2 Dy, -1), so that each head looks at the place D of a small neighbourhood as one tap of a
convolution does, v is the identity and lambda = 1; s is the strength of locality. Training moves the gates. The class
token joins after the gated blocks; plain self-attention follows.

The position logits are a sum over the axes, so their softmax is a product of one small softmax an axis: the (N, N) map
of positions is made only while somebody watches.

d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", 2021, sections 2-4.

Any grid: offsets are counted in tokens; only the table of absolute positions is bound to a size, and it is resampled
(bicubic). The bias of the position logits cancels in the softmax and is kept as the authors keep it. Their division of
A by its row sum, which is 1, is left out. A model with no block after the gated ones classifies its first patch, as
theirs does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap, without_first_axis
from saccade.core.record import Affinity, note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.tables import table
from saccade.parts.attention import Attention, check_heads
from saccade.parts.head import grid_pooling
from saccade.parts.mlp import Mlp
from saccade.parts.plain import Plain, TokenBlock, beside_prefix
from saccade.parts.tokens import global_tokens

_ADDRESS = "https://dl.fbaipublicfiles.com/convit/"
_PUBLISHED = ("convit_tiny", "convit_small", "convit_base", "convit_tiny_plus", "convit_small_plus", "convit_base_plus")

CARD = Card(
    "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
    authors="d'Ascoli, Touvron, Leavitt, Morcos, Biroli, Sagun",
    year=2021,
    systems=("convit",),
    arxiv="2103.10697",
    code="facebookresearch/convit@0a9340a",
    licence="Apache-2.0",
    weights_licence="Apache-2.0",
    read="paper, code",
    keywords="gated positional self-attention, GPSA, soft convolutional inductive bias, locality, non-locality",
    kinds=("backbone", "mixer"),
    mixers={"gated_positional": "GatedPositional"},
    params=dict(zip(_PUBLISHED, (6e6, 27e6, 86e6, 10e6, 48e6, 152e6), strict=True)),
    macs=dict(zip(_PUBLISHED, (1e9, 5.4e9, 17e9, 2e9, 10e9, 30e9), strict=True)),
    top1=dict(zip(_PUBLISHED, (73.1, 81.3, 82.4, 76.7, 82.2, 82.5), strict=True)),
    weights={name: Weights(f"{_ADDRESS}{name}.pth", licence="Apache-2.0") for name in _PUBLISHED[:3]},
    goldens=("convit_tiny", "op_convit_gpsa"),
    tests=("tests/papers/test_convit.py",),
)


@table
def offsets(side: int, device: torch.device) -> Tensor:
    """(side, side) steps from a query (row) to a key (column) along one axis."""
    place = torch.arange(side, device=device)
    return place[None, :] - place[:, None]


def squared_offsets(grid: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Steps from token to token along each axis of a grid, and their squared length: each (N, N)."""
    places = torch.meshgrid([torch.arange(side, device=device) for side in grid], indexing="ij")
    steps = [place.flatten()[None, :] - place.flatten()[:, None] for place in places]
    return steps, torch.stack([step**2 for step in steps]).sum(0)


class RelativePosition(nn.Module):
    """softmax over keys of weight . (steps along the axes, last axis first; their squared length) + bias, a head."""

    def __init__(self, rank: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, rank + 1))
        self.bias = nn.Parameter(torch.zeros(heads))

    @torch.no_grad()
    def start(self, strength: float) -> None:
        """Head n looks at the n-th place of a k x ... x k neighbourhood, first axis fastest; others at none."""
        heads, columns = self.weight.shape
        rank = columns - 1
        side = max(side for side in range(1, heads + 1) if side**rank <= heads)
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.weight[: side**rank, rank] = -1
        for head in range(side**rank):
            for axis in range(rank):
                self.weight[head, rank - 1 - axis] = 2 * (head // side**axis % side) - (side - 1)
        self.weight.mul_(strength)

    def factors(self, grid: tuple[int, ...]) -> list[Tensor]:
        """One map (heads, S, S) an axis of S tokens; the map of all tokens is their product."""
        slope, curve = self.weight.flip(-1)[:, 1:, None, None], self.weight[:, -1, None, None]
        steps = [offsets(side, self.weight.device) for side in grid]
        logits = [slope[:, axis] * step + curve * step**2 for axis, step in enumerate(steps)]
        logits[0] = logits[0] + self.bias[:, None, None]
        return [one.softmax(-1) for one in logits]

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """The whole map (heads, N, N), from its definition."""
        steps, squares = squared_offsets(grid, self.weight.device)
        features = torch.stack([*reversed(steps), squares], -1).to(self.weight.dtype)
        return F.linear(features, self.weight, self.bias).softmax(1).permute(2, 0, 1)


class GatedPositional(nn.Module):
    """out = proj(((1 - g) softmax(q k^T / sqrt(d)) + g softmax(position logits)) v): (B, *grid, C) -> (B, *grid, C).

    `strength` is that of the locality at the start. (d'Ascoli et al., ConViT, 2021, section 3.)
    """

    ranks, weights = (1, 2, 3), True
    projections = ("qkv", "proj")
    template = Template("q k^T / sqrt(d), and w of the offset", "two softmaxes, mixed by a gate a head", "sum of v")

    def __init__(self, site: Site, strength: float = 1.0, qkv_bias: bool = False) -> None:
        super().__init__()
        self.scale = check_heads(site) ** -0.5
        self.heads, self.strength = site.heads, strength
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.position = RelativePosition(site.rank, site.heads)
        self.gate = nn.Parameter(torch.ones(site.heads))
        self.proj = nn.Linear(site.dim, site.dim)
        self.start_local()

    @torch.no_grad()
    def start_local(self) -> None:
        """Begin as a convolution: each head at its place, values unchanged."""
        self.position.start(self.strength)
        nn.init.eye_(self.qkv.weight[2 * self.proj.in_features:])

    def forward(self, x: Tensor) -> Tensor:
        B, *grid, C = x.shape
        qkv = self.qkv(x).view(B, *grid, 3, self.heads, C // self.heads)
        q, k, v = qkv.flatten(1, -4).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        gate = self.gate.sigmoid()
        if recording():
            content = (q * self.scale @ k.mT).softmax(-1)
            weights = torch.lerp(content, self.position(tuple(grid)), gate[:, None, None])
            note(weights, lambda: global_tokens(weights.shape[-1], x.device))
            out = (weights @ v).transpose(1, 2)
        else:
            content = attend(q, k, v, scale=self.scale).transpose(1, 2)
            placed = mix_along(self.position.factors(tuple(grid)), qkv[..., 2, :, :])
            out = torch.lerp(content.reshape(placed.shape), placed, gate[:, None].to(content.dtype))
        return self.proj(out.reshape(x.shape))

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 4 N C^2 for the projections, 2 N^2 C for the products, (rank + 1) N^2 heads for positions."""
        tokens = torch.Size(grid).numel()
        return 4 * tokens * site.dim**2 + tokens**2 * (2 * site.dim + (site.rank + 1) * site.heads)

    def reach(self, site: Site) -> None:
        """Every token reaches every other."""
        return None


def mix_along(factors: list[Tensor], v: Tensor) -> Tensor:
    """Apply to v (B, *grid, heads, d) a map a head that is the product of maps (heads, S, S) along the axes."""
    v = v.movedim(-2, 0)  # (heads, B, *grid, d)
    for axis, factor in enumerate(factors, start=2):
        front = v.movedim(axis, 1)
        v = (factor @ front.flatten(2)).view(front.shape).movedim(1, axis)
    return v.movedim(0, -2)


def locality(affinity: Affinity, grid: tuple[int, ...], batch: int = 1) -> Tensor:
    """How far each head looks, in tokens (the paper's non-locality): (heads,), the mean over images and queries of

        D = sum_j A_ij |position_i - position_j|      over the keys j on the grid; prefix tokens are left out.

    `affinity` is what `record` gives for a module with softmax attention, `batch` the number of images of that forward:
        with record(model) as r: model(images)
        locality(r["blocks.0.mixer"], grid=(14, 14), batch=len(images))
    Raises SaccadeError where the weights do not stand between the tokens of such a grid.
    Source: d'Ascoli et al., ConViT, 2021, section 4, on the role of locality.
    """
    weights = affinity.dense(batch)
    prefix = weights.shape[-1] - torch.Size(grid).numel()
    if prefix < 0:
        raise SaccadeError(f"grid={tuple(grid)} has more than the {weights.shape[-1]} tokens that were recorded")
    distance = squared_offsets(grid, weights.device)[1].to(weights.dtype).sqrt()
    return (weights[..., prefix:, prefix:] * distance).sum(-1).mean((0, 2))


class ConViT(Plain):
    """A Plain whose first `local` blocks see patches alone; then the class token joins (it has no position)."""

    undecayed = ("class_token", "position")

    def __init__(
        self, *args: Any, local: int, mlp_ratio: float = 4.0, global_pool: str = "token",
        prefix_mode: str | None = None, **options: Any,
    ) -> None:
        def block(site: Site, mixer: nn.Module, **common: Any) -> nn.Module:
            mixer = beside_prefix(mixer, int(site.index >= local), prefix_mode)
            return TokenBlock(site, mixer, mlp=partial(Mlp, ratio=mlp_ratio), **common)

        self.local = local
        pool = "avg" if global_pool == "token" else global_pool  # to Plain this is a model without prefix tokens
        super().__init__(*args, prefix=0, block=block, global_pool=pool, **options)
        self.global_pool = global_pool
        self.pool = grid_pooling(global_pool, self.num_features, self.heads)
        self.class_token = nn.Parameter(torch.empty(1, self.num_features))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        for module in self.modules():
            if isinstance(module, GatedPositional):
                module.start_local()  # Plain starts all linear layers alike

    def step(self, tokens: Tensor, index: int, grid: tuple[int, ...]) -> Tensor:
        """Block `index` on the sequence before it: (B, N, C) or, once the class token has joined, (B, 1 + N, C)."""
        if index == self.local:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], 1, -1), tokens], 1)
        return self.blocks[index](tokens, int(index >= self.local), grid)

    def features(self, image: Tensor) -> list[Tensor]:
        """The map of grid tokens after each block, (B, C, *grid), channels-last in memory."""
        tokens, grid = self.tokens(image)
        maps = []
        for index in range(len(self.blocks)):
            tokens = self.step(tokens, index, grid)
            maps.append(tokens[:, int(index >= self.local):].unflatten(1, grid).movedim(-1, 1))
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """The sequence (B, 1 + N, C) after the final norm."""
        tokens, grid = self.tokens(image)
        for index in range(len(self.blocks)):
            tokens = self.step(tokens, index, grid)
        return self.norm(tokens)

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Class scores from the class token (or the mean of the grid tokens)."""
        joined = int(len(self.blocks) > self.local)
        return super().forward_head(tokens[:, joined:] if self.pool is not None else tokens)


SIZES: dict[str, dict[str, Any]] = {
    f"convit_{size}{plus}": dict(dim=width * heads, depth=12, heads=heads)
    for plus, width in (("", 48), ("_plus", 64)) for size, heads in (("tiny", 4), ("small", 9), ("base", 16))
}
SIZES["convit_nano"] = dict(dim=64, depth=6, heads=4, local=4, patch=4, img_size=32)


def convit(
    dim: int,
    depth: int,
    heads: int,
    local: int = 10,
    patch: int = 16,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = False,
    strength: float = 1.0,
    mixer: Any = None,
    **common: Any,
) -> ConViT:
    """A ConViT of a size: the first `local` of its `depth` blocks are gated."""
    def built_in(site: Site) -> nn.Module:
        return GatedPositional(site, strength, qkv_bias) if site.index < local else Attention(site, qkv_bias)

    return ConViT(dim, depth, heads, local=local, patch=patch, mlp_ratio=mlp_ratio, mixer=built_in, replace=mixer,
                  **common)


# timm kept the authors' names.
AUTHORS: KeyMap = (
    (r"patch_embed\.proj\.(.*)", r"stem.proj.\1"),
    (r"cls_token", "class_token", without_first_axis),
    (r"pos_embed", "position"),
    (r"blocks\.(\d+)\.attn\.qk\.(.*)", r"blocks.\1.mixer.qkv.\2#0"),
    (r"blocks\.(\d+)\.attn\.v\.(.*)", r"blocks.\1.mixer.qkv.\2#1"),
    (r"blocks\.(\d+)\.attn\.pos_proj\.(.*)", r"blocks.\1.mixer.position.\2"),
    (r"blocks\.(\d+)\.attn\.gating_param", r"blocks.\1.mixer.gate"),
    (r"blocks\.(\d+)\.attn\.(.*)", r"blocks.\1.mixer.\2"),
)
TAPS = {r"gpsa(\d+)": r"blocks.\1.mixer", r"block(\d+)": r"blocks.\1"}
