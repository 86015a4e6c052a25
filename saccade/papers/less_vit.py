"""LESS ViT: spectral times spatial attention, a Kronecker product of two small ones.

Tokens of a hyperspectral image stand on a grid of A bands by T places, and attention among all A T of them is out of
reach. LESS takes one summary a band and one a place, attends among the bands and among the places, and multiplies,
    out[a, t] = proj(concat_h sum_r (A_hr Vc_h)[a] x (B_hr Vs_h)[t]),
x the Kronecker product of d_c by d_s channels of a head, A and B softmax weights, r counting ranks. A summary is the
axis' first token (its class token) plus what that token attends to along the axis. Attention among places may be held
to a perception field, the disc of places nearer than a radius.

The network takes any set of bands. Every band is cut into patches by the same layer; class tokens stand before the
bands of each place, the places of each band, and all; the token of w nm at column x and row y has added to it the mean
of two codes of sines and cosines, code(w) and (code(x r), code(y r)), r metres a pixel.

Si, Wan, Do, Vasisht, Zhao, Hamann, "Towards Scalable Foundation Model for Multi-modal and Hyperspectral Geospatial
Data", 2025, section 3. Its pre-training is in `papers/hyper_mae.py`.

Any grid: images are zero-padded at their end to whole patches; nothing belongs to a size. The mixer takes the first
axis for the bands, the others for the places.
Quirks kept: all ranks share one value; summaries are normalised a second time before they attend; places count as if
patches were one pixel wide; class tokens have half a code or none. Ours: maps are of the class tokens of the places.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.keymap import KeyMap, pointwise, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.ops.attend import attend
from saccade.ops.pattern import Disc, written_out
from saccade.ops.tables import table
from saccade.parts.attention import check_heads
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.head import Pooling, grid_pooling
from saccade.parts.plain import initialise
from saccade.parts.pyramid import check_sizes, drop_path_rates, undecayed
from saccade.parts.stem import PatchEmbed

CARD = Card(
    "Towards Scalable Foundation Model for Multi-modal and Hyperspectral Geospatial Data",
    authors="Si, Wan, Do, Vasisht, Zhao, Hamann",
    year=2025,
    systems=("less_vit",),
    arxiv="2503.12843",
    code="uiuctml/GeospatialFM@bad5f1d",
    read="paper",
    keywords="low-rank spatial-spectral attention, LESS, Kronecker product, perception field mask, hyperspectral, "
             "continuous positional-channel embedding, any wavelengths",
    kinds=("backbone", "mixer"),
    mixers={"less_attention": "LessAttention"},
    goldens=("less_vit_s16_depth4", "op_less_low_rank_attention", "op_less_low_rank_block"),
    tests=("tests/papers/test_less_vit.py",),
)


def perception_field(grid: tuple[int, ...], radius: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N, N) 0 between places at most `radius` steps apart, -inf between others."""
    return cast(Tensor, written_out(Disc(grid, int(radius**2 + 1e-6)), None, dtype, device))


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
    field in steps between places (None: all see all, but for what a `mask` (T, T) hides).
    """

    ranks = (2, 3)
    template = Template("q k^T / sqrt(d) among bands, and among places", "two softmaxes", "Kronecker sum of v")

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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = x.flatten(2, -2)
        bands = self.band_norm(self.of_bands(self.to_bands(tokens)))
        places = self.place_norm(self.of_places(self.to_places(tokens).transpose(1, 2)))
        if self.field is not None:
            mask = perception_field(tuple(x.shape[2:-1]), self.field, x.dtype, x.device)
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


def waves(steps: Tensor, dim: int) -> Tensor:
    """(N,) -> (N, dim): the sines, then the cosines, of step / 10000^(2 i / dim)."""
    angle = steps.double()[:, None] * 10000 ** (-2 / dim * torch.arange(dim // 2, device=steps.device).double())
    return torch.cat([angle.sin(), angle.cos()], 1)


@table
def codes(
    wavelengths: tuple[float, ...], grid: tuple[int, ...], resolution: float, dim: int, dtype: Any, device: Any
) -> Tensor:
    """(1 + A, 1 + N, dim): the mean of the codes of a band and of a place; nothing for either class token."""
    bands = waves(torch.tensor(wavelengths, device=device), dim)
    rows, columns = (torch.arange(side, device=device) * resolution for side in grid)
    places = torch.cat([waves(columns, dim // 2).expand(grid[0], -1, -1),
                        waves(rows, dim // 2)[:, None].expand(-1, grid[1], -1)], -1).flatten(0, 1)
    return ((F.pad(bands, [0, 0, 1, 0])[:, None] + F.pad(places, [0, 0, 1, 0])) / 2).to(dtype)


class TiedPatchEmbed(nn.Module):
    """proj(relu(patches of a band)), the same for every band: (B, A, H, W) -> (B, A, h, w, C)."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.patches = PatchEmbed(2, 1, 2 * dim, stride=patch)
        self.proj = nn.Linear(2 * dim, dim)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patches(image.flatten(0, 1).unsqueeze(1))
        return self.proj(F.relu(patches)).unflatten(0, (image.shape[0], -1))


class LessViT(Backbone):
    """Bands (B, A, H, W) -> tokens (B, 1 + A, 1 + N, C) -> scores (B, classes) of the first class token.

    `wavelengths` (nm) and `resolution` (metres a pixel) are what a call does not say; by default the bands lie from red
    to blue. `field` is the radius in metres of the perception field of places; class tokens see and are seen by all.
    With `radar`, a second image is embedded by a layer of its own. `replace` is the caller's mixer.
    """

    undecayed = ("first", "of_bands", "of_places")

    def __init__(
        self, dim: int, depth: int, heads: int, *, head_bands: int = 4, rank: int = 1, patch: int = 16,
        radar: bool = False, field: float | None = None, wavelengths: Sequence[float] | None = None,
        resolution: float = 10.0, num_classes: int = 1000, in_chans: int = 3, img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0, global_pool: Pooling = "token", replace: Any = None,
    ) -> None:
        super().__init__()
        size = check_sizes(num_classes, in_chans, img_size)
        if len(size) != 2 or dim % 4:
            raise SaccadeError(f"img_size={img_size!r}, {dim} channels: give two sides, and a multiple of 4 channels")
        self.in_chans, self.heads, self.patch = in_chans, heads, patch
        self.field, self.resolution = field, resolution
        self.wavelengths = tuple(wavelengths or torch.linspace(665.0, 490.0, in_chans, device="cpu").tolist())
        self.stem = TiedPatchEmbed(dim, patch)
        self.radar_stem = TiedPatchEmbed(dim, patch) if radar else None
        self.first, self.of_bands, self.of_places = (nn.Parameter(torch.empty(dim)) for _ in range(3))
        grid = (1 + in_chans, 1 + prod(-(-side // patch) for side in size))
        build, names = choose_mixer(replace, partial(LessAttention, head_bands=head_bands, rank=rank)), []
        self.blocks = nn.ModuleList()
        for index, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
            names.append(f"blocks.{index}")
            site = Site(dim, heads, 0, index, patch, grid)
            self.blocks.append(Block(site, build(site, names[-1]), drop_path=rate))
        check_patterns(replace, names)
        self.norm = LAYER_NORM(dim)
        self.num_features, self.global_pool = dim, global_pool
        self.reset_classifier(num_classes)
        self.feature_info = FeatureInfo(dict(num_chs=dim, reduction=patch, module=name) for name in names)
        self.default_out_indices = tuple(sorted({-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)}))
        self.apply(partial(initialise, spread=0.02))
        for token in (self.first, self.of_bands, self.of_places):
            nn.init.trunc_normal_(token, std=0.02)

    def reset_classifier(self, num_classes: int, global_pool: Pooling | None = None) -> None:
        """Put a new head of `num_classes` (0: none) in place."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.pool = grid_pooling(self.global_pool, self.num_features, self.heads)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.removed = () if num_classes else ("head",)

    def patches(self, image: Tensor, radar: Tensor | None = None) -> Tensor:
        """The tokens (B, A, h, w, C) of all bands, those of the radar last."""
        bands = self.stem(image)
        if radar is None:
            return bands
        if self.radar_stem is None:
            raise SaccadeError("this model has no layer for radar: build it with radar=True")
        return torch.cat([bands, self.radar_stem(radar)], 1)

    def codes(
        self, bands: int, grid: tuple[int, ...], like: Tensor, wavelengths: Sequence[float] | None = None,
        resolution: float | None = None,
    ) -> Tensor:
        """The codes (1 + A, 1 + N, C) of so many bands and the places of a grid, as wide as `like` (..., C)."""
        known = tuple(wavelengths or self.wavelengths)
        if len(known) != bands:
            raise SaccadeError(f"{bands} bands and {len(known)} wavelengths: give one in nm for each, the radar's last")
        return codes(known, grid, resolution or self.resolution, like.shape[-1], like.dtype, like.device)

    def framed(self, patches: Tensor) -> Tensor:
        """(B, A, N, C) with class tokens before the bands and the places: (B, 1 + A, 1 + N, C)."""
        B, A, N, _ = patches.shape
        below = torch.cat([self.of_bands.expand(B, A, 1, -1), patches], 2)
        return torch.cat([torch.cat([self.first.expand(B, 1, 1, -1), self.of_places.expand(B, 1, N, -1)], 2), below], 1)

    def mask(self, grid: tuple[int, ...], like: Tensor, resolution: float | None = None) -> Tensor | None:
        """(1 + N, 1 + N) what the perception field adds to scores, or None where there is none."""
        if self.field is None:
            return None
        step = self.patch * (resolution or self.resolution)
        return F.pad(perception_field(grid, self.field / step, like.dtype, like.device), [1, 0, 1, 0])

    def through(self, tokens: Tensor, mask: Tensor | None, states: list[Tensor] | None = None) -> Tensor:
        """The tokens after the last block (after each, in `states`); the caller's own mixers take no mask."""
        for block in self.blocks:
            masked = mask is not None and isinstance(block.mixer, LessAttention)
            tokens = block(tokens, mask=mask) if masked else block(tokens)
            if states is not None:
                states.append(tokens)
        return tokens

    def tokens(
        self, image: Tensor, wavelengths: Sequence[float] | None = None, resolution: float | None = None,
        radar: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """What enters the first block (B, 1 + A, 1 + N, C), the mask among its places, and their grid."""
        x = self.patches(image, radar)
        grid = tuple(x.shape[2:4])
        code = self.codes(x.shape[1], grid, x, wavelengths, resolution)
        return self.framed(x.flatten(2, 3)) + code, self.mask(grid, x, resolution), grid

    def features(self, image: Tensor) -> list[Tensor]:
        """The map of the class tokens of the places after each block, (B, C, h, w)."""
        states: list[Tensor] = []
        tokens, mask, grid = self.tokens(image)
        self.through(tokens, mask, states)
        return [state[:, 0, 1:].unflatten(1, grid).movedim(-1, 1) for state in states]

    def forward_features(self, image: Tensor, **told: Any) -> Tensor:
        """The normed tokens (B, 1 + A, 1 + N, C); `told` are the wavelengths, resolution and radar of `tokens`."""
        tokens, mask, _ = self.tokens(image, **told)
        return self.norm(self.through(tokens, mask))

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Class scores from the first class token, or the pooled ones of the places."""
        chosen = tokens[:, 0, 0] if self.global_pool == "token" else tokens
        return self.head(chosen if self.pool is None else self.pool(tokens[:, 0, 1:]))

    def forward(self, image: Tensor, **told: Any) -> Tensor:
        """(B, A, H, W) -> (B, classes); tokens where global_pool is ""."""
        return self.forward_head(self.forward_features(image, **told))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay shall leave alone: the class tokens."""
        return undecayed(self)


SIZES: dict[str, dict[str, Any]] = {
    "less_vit_s16": dict(dim=384, depth=12, heads=6),
    "less_vit_b16": dict(dim=768, depth=12, heads=12),
    "less_vit_s16_depth4": dict(dim=384, depth=4, heads=6, radar=True, num_classes=0, global_pool=""),
    "less_vit_nano": dict(dim=32, depth=4, heads=2, patch=4, img_size=32),
}


def less_vit(
    dim: int, depth: int, heads: int, head_bands: int = 4, rank: int = 1, patch: int = 16, radar: bool = False,
    field: float | None = None, wavelengths: Sequence[float] | None = None, resolution: float = 10.0,
    mixer: Any = None, **common: Any,
) -> LessViT:
    """A LESS ViT of a size."""
    return LessViT(dim, depth, heads, head_bands=head_bands, rank=rank, patch=patch, radar=radar, field=field,
                   wavelengths=wavelengths, resolution=resolution, replace=mixer, **common)


def RECORDED(golden: dict[str, Any]) -> dict[str, Any]:
    """The wavelengths and the resolution with which a golden's note says that the authors' code was called."""
    said = re.search(r"optical_channel_wv=\[(\[.*?\])\], spatial_resolution=([\d.]*\d)", golden["note"])
    return {"wavelengths": ast.literal_eval(said[1]), "resolution": float(said[2])} if said else {}


# The authors' names of a block (its norms and MLP have the same here); those of the attention alone are ours.
BLOCK: KeyMap = (
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
AUTHORS: KeyMap = (
    (r"cls_token", "first", Tensor.flatten),
    (r"spatial_cls_token", "of_bands", Tensor.flatten),
    (r"channel_cls_token", "of_places", Tensor.flatten),
    *(rule for kind, stem in (("optical", "stem"), ("radar", "radar_stem")) for rule in (
        (rf"{kind}_patch_embed\.proj\.0\.weight", f"{stem}.patches.proj.weight", lambda weight: weight.squeeze(2)),
        (rf"{kind}_patch_embed\.proj\.0\.bias", f"{stem}.patches.proj.bias"),
        (rf"{kind}_patch_embed\.proj\.2\.(.*)", rf"{stem}.proj.\1", pointwise))),
    *within(BLOCK, r"blocks\.(\d+)\.", r"blocks.\1."),
)
TAPS = {r"block(\d+)": r"blocks.\1"}
