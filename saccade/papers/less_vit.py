"""LESS attention: spectral times spatial attention, a Kronecker product of two small ones.

Tokens of a hyperspectral image stand on a grid of A bands by T places, and attention among all A T of them is out of
reach. LESS takes one summary a band and one a place, attends among the bands and among the places, and multiplies,
    out[a, t] = proj(concat_h sum_r (A_hr Vc_h)[a] x (B_hr Vs_h)[t]),
x the Kronecker product of d_c by d_s channels of a head, A and B softmax weights, r counting ranks. A summary is the
axis' first token (its class token) plus what that token attends to along the axis. Attention among places may be held
to a perception field, the disc of places nearer than a radius.

Si, Wan, Do, Vasisht, Zhao, Hamann, "Towards Scalable Foundation Model for Multi-modal and Hyperspectral Geospatial
Data", 2025, section 3.

Any grid: the first axis stands for the bands, the others for the places; nothing belongs to a size.
Not here: the backbone, with its continuous embedding of positions and wavelengths, and its masked autoencoder.
Quirks kept: all ranks share one value; summaries are normalised a second time before they attend.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.site import Site
from saccade.ops.attend import attend
from saccade.ops.pattern import Disc, written_out
from saccade.parts.attention import check_heads
from saccade.parts.block import LAYER_NORM

CARD = Card(
    "Towards Scalable Foundation Model for Multi-modal and Hyperspectral Geospatial Data",
    authors="Si, Wan, Do, Vasisht, Zhao, Hamann",
    year=2025,
    systems=("less_vit",),
    arxiv="2503.12843",
    code="uiuctml/GeospatialFM@bad5f1d",
    read="paper",
    keywords="low-rank spatial-spectral attention, LESS, Kronecker product, perception field mask, hyperspectral",
    kinds=("mixer",),
    mixers={"less_attention": "LessAttention"},
    goldens=("op_less_low_rank_attention", "op_less_low_rank_block"),
    tests=("tests/papers/test_less_vit.py",),
)


def perception_field(grid: tuple[int, ...], radius: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N, N) 0 between places at most `radius` steps apart, -inf between others."""
    mask = written_out(Disc(grid, int(radius**2 + 1e-6)), None, dtype, device)
    assert mask is not None
    return mask


class Branch(nn.Module):
    """Attention among (B, N, C) with `rank` maps and one value: -> (rank, B, N, heads, C / heads)."""

    def __init__(self, dim: int, heads: int, rank: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.rank = heads, rank
        self.qk = nn.Linear(dim, 2 * rank * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.q_norm = LAYER_NORM(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = LAYER_NORM(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k = self.qk(x).unflatten(-1, (2, self.heads * self.rank, -1)).permute(2, 0, 3, 1, 4)
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).repeat_interleave(self.rank, 1)
        out = attend(self.q_norm(q), self.k_norm(k), v, mask)
        return out.unflatten(1, (self.heads, self.rank)).permute(2, 0, 3, 1, 4)

    def cost(self, count: int) -> int:
        """Multiply-adds for `count` tokens."""
        dim = self.v.out_features
        return count * (2 * self.rank + 1) * dim**2 + 2 * self.rank * count**2 * dim


class LowRankAttention(nn.Module):
    """Bands (B, A, c) and places (B, T, s) -> (B, A, T, C): the Kronecker product of what each attends to.

    c s = heads C; `mask` (T, T) is added to the scores among the places. (Si et al., 2025, section 3.)
    """

    def __init__(
        self, dim: int, heads: int, bands: int, places: int, rank: int = 1, qkv_bias: bool = True,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if bands % heads or places % heads or bands * places != heads * dim:
            raise SaccadeError(f"{bands} channels for bands, {places} for places, {heads} heads: give multiples of "
                               f"the heads whose product is {heads} x {dim}")
        self.channel_branch = Branch(bands, heads, rank, qkv_bias, qk_norm)
        self.spatial_branch = Branch(places, heads, rank, qkv_bias, qk_norm)
        self.proj = nn.Linear(dim, dim)

    def forward(self, bands: Tensor, places: Tensor, mask: Tensor | None = None) -> Tensor:
        c = self.channel_branch(bands)[:, :, :, None, :, :, None]
        s = self.spatial_branch(places, mask)[:, :, None, :, :, None, :]
        product = c[0] * s[0]
        for rank in range(1, c.shape[0]):
            product = torch.addcmul(product, c[rank], s[rank])
        return self.proj(product.flatten(3))


class Summary(nn.Module):
    """The first token of an axis plus what it attends to: (B, M, T, C) -> (B, M, C), along T."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = LAYER_NORM(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, M, T, C = x.shape
        normed = self.norm(x)
        q = self.q(normed[:, :, 0]).view(B * M, self.heads, 1, -1)
        k, v = self.kv(normed).view(B * M, T, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return x[:, :, 0] + self.proj(attend(q, k, v).reshape(B, M, C))

    def cost(self, groups: int, count: int) -> int:
        """Multiply-adds for `groups` axes of `count` tokens."""
        dim = self.q.out_features
        return 2 * groups * dim**2 + groups * count * (2 * dim**2 + 2 * dim)


class LessAttention(nn.Module):
    """Low-rank attention among bands (the first axis) and places (the others): (B, A, *grid, C) -> the same.

    A head's channels are `head_bands` x d: the first factor is for the bands. `field` is the radius of the perception
    field in steps between places (None: all see all).
    """

    ranks = (2, 3)

    def __init__(
        self, site: Site, head_bands: int | None = None, rank: int = 1, field: float | None = None,
        qkv_bias: bool = True, qk_norm: bool = False,
    ) -> None:
        super().__init__()
        width = check_heads(site)
        share = max(part for part in (1, 2, 4) if width % part == 0) if head_bands is None else head_bands
        if width % share:
            raise SaccadeError(f"head_bands={share} does not divide the {width} channels of a head; choose a divisor")
        bands, places = share * site.heads, width // share * site.heads
        self.heads, self.field = site.heads, field
        self.to_bands, self.to_places = nn.Linear(site.dim, bands), nn.Linear(site.dim, places)
        self.of_bands, self.of_places = Summary(bands, site.heads), Summary(places, site.heads)
        self.band_norm, self.place_norm = LAYER_NORM(bands), LAYER_NORM(places)
        self.attention = LowRankAttention(site.dim, site.heads, bands, places, rank, qkv_bias, qk_norm)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2, -2)
        bands = self.band_norm(self.of_bands(self.to_bands(tokens)))
        places = self.place_norm(self.of_places(self.to_places(tokens).transpose(1, 2)))
        mask = None if self.field is None else perception_field(tuple(x.shape[2:-1]), self.field, x.dtype, x.device)
        return self.attention(bands, places, mask).view(x.shape)

    def reach(self, site: Site) -> None:
        """Every token reaches every other, through the summaries."""
        return None

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: N C (C + c + s) for the projections, and what summaries and the two attentions take."""
        A, T = grid[0], prod(grid[1:])
        attention = self.attention.channel_branch.cost(A) + self.attention.spatial_branch.cost(T)
        widths = site.dim + self.to_bands.out_features + self.to_places.out_features
        return A * T * site.dim * widths + self.of_bands.cost(A, T) + self.of_places.cost(T, A) + attention


# The authors' names of a block (its norms and MLP have the same here); those of the attention alone are ours.
AUTHORS: KeyMap = (
    (r"low_dim_pool\.channel_linear\.(.*)", r"mixer.to_bands.\1"),
    (r"low_dim_pool\.spatial_linear\.(.*)", r"mixer.to_places.\1"),
    (r"low_dim_pool\.channel_norm\.(.*)", r"mixer.of_bands.norm.\1"),
    (r"low_dim_pool\.spatial_norm\.(.*)", r"mixer.of_places.norm.\1"),
    (r"low_dim_pool\.channel_pool\.(.*)", r"mixer.of_bands.\1"),
    (r"low_dim_pool\.spatial_pool\.(.*)", r"mixer.of_places.\1"),
    (r"channel_norm\.(.*)", r"mixer.band_norm.\1"),
    (r"spatial_norm\.(.*)", r"mixer.place_norm.\1"),
    (r"attn\.(.*)", r"mixer.attention.\1"),
)
