"""PredFormer: the next frames from the last ones, by transformers that look along space and time in turn.

Each frame is cut into patches, all T h w tokens pass through gated transformers, and each token is turned back into a
patch of a frame to come: T frames in, T frames out, without recurrence or convolution. A gated transformer is attention
and a gated feed-forward network, with a norm at its end,
    x += Attention(norm(x));   x += (silu(x' G) * (x' V)) P, x' = norm(x).
Nine variants differ in which tokens meet when: all at once (full); first all space layers, then all time layers
(fac_st), or the reverse (fac_ts); or rounds of space (s) and time (t): st, ts, sts, tst, stts, tsst.

Tang, Qi, Xie, Li, Ma, Yang, "PredFormer: Transformers Are Effective Spatial-Temporal Predictive Learners", 2024 (later
"Video Prediction Transformers without Recurrence or Convolution"), section 3.

Any grid: any number of frames of any size; frames that are no multiple of the patch are zero-padded at their end and
the prediction is cropped. A token's position is its number in the grid that comes. The authors' code runs on the native
grid alone. The input is (B, frames, channels, H, W): `in_chans` frames, `img_size=(channels, H, W)`.
Quirks kept: positions number the tokens of all frames in one row, so that time has no axis of its own; a patch is read
in the order (row, column, channel) and written as (channel, row, column); the same drop path rate in all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.keymap import KeyMap, Rule, within
from saccade.core.site import MixerFactory, Site
from saccade.ops.tables import table
from saccade.parts.axes import AxesAttention
from saccade.parts.block import Block
from saccade.parts.plain import initialise
from saccade.parts.pyramid import undecayed

VARIANTS = ("full", "fac_st", "fac_ts", "binary_st", "binary_ts", "triplet_sts", "triplet_tst", "stts", "tsst")

CARD = Card(
    "PredFormer: Transformers Are Effective Spatial-Temporal Predictive Learners",
    authors="Tang, Qi, Xie, Li, Ma, Yang",
    year=2024,
    systems=("predformer",),
    arxiv="2410.04733",
    code="yyyujintang/PredFormer@b73c7ae",
    licence="Apache-2.0",
    read="paper, code",
    keywords="video prediction, spatiotemporal forecasting, factorized and interleaved space-time attention, SwiGLU",
    params={"predformer_tsst_mmnist": 25.3e6, "predformer_tsst_taxibj": 8.4e6, "predformer_fac_ts_weather": 5.3e6,
            "predformer_tsst_human": 12.7e6},
    macs={"predformer_tsst_mmnist": 16.5e9, "predformer_tsst_human": 65e9},
    goldens=("predformer_full_taxibj", "predformer_fac_ts_taxibj", "predformer_binary_st_taxibj",
             "predformer_triplet_sts_taxibj", "predformer_tsst_taxibj"),
    tests=("tests/papers/test_predformer.py",),
)

AXES = {"t": (0,), "s": (1, 2), "a": (0, 1, 2)}  # of (T, h, w) tokens: time, space, all


class FrameAttention(AxesAttention):
    """Attention along time (t), in each frame (s), or among all tokens (a) of (B, T, h, w, C), q, k, v without bias."""

    def __init__(self, site: Site, along: str) -> None:
        super().__init__(site, AXES[along])
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=False)


class SwiGlu(nn.Module):
    """(silu(x G) * (x V)) P on the last axis, hidden width `ratio` C."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.gate, self.value = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.gate(x)) * self.value(x))


class GatedTransformer(nn.Module):
    """Layers, then a norm: (B, T, h, w, C) -> (B, T, h, w, C)."""

    def __init__(self, layers: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Patches(nn.Module):
    """proj(patch) + position: frames (B, T, C, H, W) -> tokens (B, T, h, w, dim)."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch**2, dim)

    def forward(self, frames: Tensor) -> Tensor:
        patch, (H, W) = self.patch, frames.shape[3:]
        frames = F.pad(frames, [0, (-W) % patch, 0, (-H) % patch])
        h, w = frames.shape[3] // patch, frames.shape[4] // patch
        cut = frames.unflatten(4, (w, patch)).unflatten(3, (h, patch))  # (B, T, C, h, rows, w, columns)
        x = self.proj(cut.permute(0, 1, 3, 5, 4, 6, 2).flatten(4))
        grid = tuple(x.shape[1:-1])
        return x + sinusoid(prod(grid), x.shape[-1], x.dtype, x.device).unflatten(0, grid)


class FrameHead(nn.Module):
    """proj(norm(token)) as a patch: tokens (B, T, h, w, dim) -> frames (B, T, C, h patch, w patch)."""

    def __init__(self, dim: int, channels: int, patch: int) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, channels * patch**2)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.proj(self.norm(x)).unflatten(-1, (self.channels, self.patch, self.patch))
        return patches.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)


@table
def sinusoid(count: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count, dim): sin and cos, in turn, of place / 10000^(2 i / dim) (Vaswani et al., 2017, section 3.5)."""
    place = torch.arange(count, device=device, dtype=torch.float64)
    rate = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angle = place[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim].to(dtype)


class PredFormer(Backbone):
    """Frames (B, T, C, H, W) -> the T frames that follow.

    `rounds` times the transformers of `pattern`, a letter of AXES each, of `layers` layers each. `size` is (C, H, W)
    and `frames` T of the native input. Without a head it gives the last map (B, dim, T, h, w).
    """

    def __init__(
        self,
        pattern: str,
        rounds: int,
        layers: int,
        dim: int,
        heads: int,
        *,
        ratio: float,
        patch: int,
        frames: int,
        size: tuple[int, int, int],
        head: bool = True,
        drop_path_rate: float = 0.0,
        replace: Any = None,
    ) -> None:
        super().__init__()
        channels, *sides = size
        self.in_chans, self.channels = frames, channels
        grid = (frames, *(-(-side // patch) for side in sides))
        self.stem = Patches(channels, dim, patch)
        names, blocks = [], []
        for turn in range(rounds):
            transformers = []
            for number, along in enumerate(pattern):
                build = choose_mixer(replace, self.mixer(along))
                stack = []
                for layer in range(layers):
                    names.append(f"blocks.{turn}.{number}.layers.{layer}")
                    site = Site(dim, heads, 0, len(names) - 1, patch, grid)
                    stack.append(Block(site, build(site, names[-1]), drop_path=drop_path_rate, norm=nn.LayerNorm,
                                       mlp=partial(SwiGlu, ratio=ratio)))
                transformers.append(GatedTransformer(stack, dim))
            blocks.append(nn.Sequential(*transformers))
        check_patterns(replace, names)
        self.blocks = nn.ModuleList(blocks)
        self.apply(partial(initialise, spread=0.02))
        self.num_features, self._patch = dim, patch
        self.reset_head(head)
        self.feature_info = FeatureInfo(dict(num_chs=dim, reduction=patch, module=f"blocks.{turn}.{number}")
                                        for turn in range(rounds) for number in range(len(pattern)))
        self.default_out_indices = tuple(range(len(self.feature_info)))

    @staticmethod
    def mixer(along: str) -> MixerFactory:
        return lambda site: FrameAttention(site, along)

    def reset_head(self, head: bool = True) -> None:
        """Put a new head that predicts frames in place, or none."""
        self.head = FrameHead(self.num_features, self.channels, self._patch) if head else nn.Identity()
        self.removed = () if head else ("head",)

    def features(self, frames: Tensor) -> list[Tensor]:
        """The map after each transformer, (B, dim, T, h, w), channels-last in memory."""
        maps, x = [], self.stem(frames)
        for turn in self.blocks:
            for transformer in turn:  # type: ignore[attr-defined]
                x = transformer(x)
                maps.append(x.movedim(-1, 1))
        return maps

    def forward_features(self, frames: Tensor) -> Tensor:
        """The last map, (B, dim, T, h, w)."""
        x = self.stem(frames)
        for turn in self.blocks:
            x = turn(x)
        return x.movedim(-1, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Frames of whole patches from what `forward_features` gives."""
        return self.head(features.movedim(1, -1))

    def forward(self, frames: Tensor) -> Tensor:
        features = self.forward_features(frames)
        if isinstance(self.head, nn.Identity):
            return features
        out = self.forward_head(features)
        return F.pad(out, [0, frames.shape[4] - out.shape[4], 0, frames.shape[3] - out.shape[3]])

    def forecast(self, frames: Tensor, count: int) -> Tensor:
        """The `count` frames that follow: predictions are taken for the past where more than T are wanted."""
        future: list[Tensor] = []
        while sum(part.shape[1] for part in future) < count:
            frames = self(frames)
            future.append(frames)
        return torch.cat(future, 1)[:, :count]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay shall leave alone: tables of the mixers."""
        return undecayed(self)


# Frames, (channels, height, width), patch, hidden ratio, transformer layers in all.
_DATA: dict[str, Any] = {
    "mmnist": (10, (1, 64, 64), 8, 4, 24),
    "taxibj": (4, (2, 32, 32), 4, 4, 8),
    "weather": (12, (1, 32, 64), 4, 2, 8),
    "human": (4, (3, 256, 256), 8, 4, 12),
}
SIZES: dict[str, dict[str, Any]] = {
    f"predformer_{variant}_{data}": dict(
        variant=variant, depth=-(-layers // (1 if variant == "full" else len(variant.rpartition("_")[2]))), dim=256,
        heads=8, ratio=ratio, patch=patch, in_chans=frames, img_size=size)
    for variant in VARIANTS for data, (frames, size, patch, ratio, layers) in _DATA.items()
}


def predformer(
    variant: str,
    depth: int,
    dim: int,
    heads: int,
    patch: int,
    ratio: float = 4.0,
    layers: int = 1,
    in_chans: int = 4,
    img_size: Sequence[int] = (1, 64, 64),
    num_classes: int | None = None,
    mixer: Any = None,
    **common: Any,
) -> PredFormer:
    """A PredFormer of a `variant`: `depth` rounds of transformers of `layers` layers, or, where it has one round alone
    (full, fac_st, fac_ts), transformers of `depth` layers. `num_classes=0` leaves the head out.
    """
    if variant not in VARIANTS:
        raise SaccadeError(f"variant={variant!r}: choose one of {', '.join(VARIANTS)}")
    if num_classes or common.pop("global_pool", None):
        raise SaccadeError("a PredFormer predicts frames, not classes: leave num_classes and global_pool out, or give "
                           "num_classes=0 for its map")
    if isinstance(img_size, int) or len(img_size) != 3 or min(img_size) < 1 or in_chans < 1:
        raise SaccadeError(f"in_chans={in_chans}, img_size={img_size!r}: give the number of frames and (channels, "
                           "height, width), as in the input (B, frames, channels, H, W)")
    pattern = "a" if variant == "full" else variant.rpartition("_")[2]
    rounds, layers = (1, depth) if factorised(variant) else (depth, layers)
    channels, height, width = img_size
    return PredFormer(pattern, rounds, layers, dim, heads, ratio=ratio, patch=patch, frames=in_chans,
                      size=(channels, height, width), head=num_classes is None, replace=mixer, **common)


def factorised(variant: str) -> bool:
    """Whether each kind of attention has one stack of layers, rather than a part in every round."""
    return variant.startswith("fac") or variant == "full"


_TRANSFORMER: KeyMap = (
    (r"layers\.(\d+)\.0\.norm\.(.*)", r"layers.\1.norm1.\2"),
    (r"layers\.(\d+)\.0\.fn\.to_qkv\.(.*)", r"layers.\1.mixer.qkv.\2"),
    (r"layers\.(\d+)\.0\.fn\.to_out\.0\.(.*)", r"layers.\1.mixer.proj.\2"),
    (r"layers\.(\d+)\.1\.norm\.(.*)", r"layers.\1.norm2.\2"),
    (r"layers\.(\d+)\.1\.fn\.fc1_g\.(.*)", r"layers.\1.mlp.gate.\2"),
    (r"layers\.(\d+)\.1\.fn\.fc1_x\.(.*)", r"layers.\1.mlp.value.\2"),
    (r"layers\.(\d+)\.1\.fn\.fc2\.(.*)", r"layers.\1.mlp.proj.\2"),
    (r"norm\.(.*)", r"norm.\1"),
)


def authors_names(variant: str) -> list[str]:
    """What the authors call the transformers of a variant, in their order."""
    pattern = variant.rpartition("_")[2]
    kinds = {"s": "space_transformer", "t": "temporal_transformer"}
    if variant == "full":
        return ["space_temporal_transformer"]
    if factorised(variant):
        return [kinds[along] for along in pattern]
    if len(pattern) == 3:
        outer, inner = kinds[pattern[0]], kinds[pattern[1]]
        return [f"{outer}_first", inner, f"{outer}_second"]
    return [f"{half}_{kinds[along]}" for half in (pattern[:2], pattern[2:]) for along in half]


def key_map(variant: str) -> KeyMap:
    """The authors' names in a model of a variant."""
    rules: list[Rule] = [
        (r"to_patch_embedding\.1\.(.*)", r"stem.proj.\1"),
        (r"mlp_head\.0\.(.*)", r"head.norm.\1"),
        (r"mlp_head\.1\.(.*)", r"head.proj.\1"),
    ]
    for number, theirs in enumerate(authors_names(variant)):
        turn, ours = ("", "0") if factorised(variant) else (r"blocks\.(\d+)\.", r"\1")
        rules += within(_TRANSFORMER, rf"{turn}{theirs}\.", f"blocks.{ours}.{number}.")
    return rules


def AUTHORS(name: str) -> KeyMap:
    return key_map(SIZES[name]["variant"])


TAPS = {r"block(\d+)": r"blocks.\1"}
