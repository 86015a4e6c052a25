"""Plain: the ViT shape. Prefix tokens and grid tokens at one stride all the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.keymap import KeyMap, without_first_axis
from saccade.core.site import MixerFactory, Site
from saccade.parts.attention import Attention
from saccade.parts.block import LAYER_NORM, Block, Norm
from saccade.parts.head import Pooling, grid_pooling, pool_tokens
from saccade.parts.position import is_native, resample
from saccade.parts.pyramid import check_sizes, drop_path_rates, undecayed
from saccade.parts.stem import PatchEmbed
from saccade.parts.tokens import join

PREFIX_MODES = ("none", "mean")


class PrefixBlind(nn.Module):
    """Lets a mixer that knows only the grid work beside prefix tokens.

    The prefix receives nothing ("none") or the mean of the mixed map ("mean"): the caller says which.
    """

    def __init__(self, mixer: nn.Module, mode: str) -> None:
        super().__init__()
        self.mixer, self.mode = mixer, mode

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x = self.mixer(x)
        if prefix is None:
            return x
        if self.mode == "none":
            return x, torch.zeros_like(prefix)
        return x, x.flatten(1, -2).mean(1, keepdim=True).expand_as(prefix)


class TokenBlock(Block):
    """A block on prefix and grid tokens kept in one sequence (B, P + N, C); only the mixer sees them apart."""

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        tokens = tokens + self.scale1(self._mixed(self.norm1(tokens), count, grid))
        return tokens + self.scale2(self.mlp(self.norm2(tokens)))

    def _mixed(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:
        if type(self.mixer) is Attention:  # tokens are a set to it: parting and joining them would be two copies
            return self.mixer(tokens)
        x, prefix = tokens[:, count:].unflatten(1, grid), tokens[:, :count]
        return join(*self.mixer(x, prefix=prefix)) if count else self.mixer(x).flatten(1, -2)


class Plain(Backbone):
    """Patch tokens + position, `prefix` class tokens before them, `depth` blocks, norm, head on the class token.

    The position table (1, P + N, C) belongs to the grid of `img_size`; it is resampled (bicubic) to the grid that
    comes. `replace` is the caller's mixer; a mixer without the prefix trait needs `prefix_mode`.
    """

    undecayed: tuple[str, ...] = ("prefix", "position")

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        patch: int = 16,
        prefix: int = 1,
        mixer: MixerFactory | Sequence[MixerFactory] = Attention,
        block: Callable[..., nn.Module] = TokenBlock,
        norm: Norm = LAYER_NORM,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        global_pool: Pooling = "token",
        prefix_mode: str | None = None,
        replace: Any = None,
    ) -> None:
        super().__init__()
        size = check_sizes(num_classes, in_chans, img_size)
        if global_pool == "token" and not prefix:
            raise SaccadeError('global_pool="token": this model has no class token; choose "avg", "gem", "ggem", ...')
        self.in_chans, self.heads = in_chans, heads
        self.global_pool: Pooling = global_pool
        self.grid = tuple(-(-side // patch) for side in size)
        self.stem = PatchEmbed(len(size), in_chans, dim, stride=patch)
        self.prefix = nn.Parameter(torch.zeros(prefix, dim)) if prefix else None
        self.position = nn.Parameter(torch.zeros(1, prefix + torch.Size(self.grid).numel(), dim))
        build_mixer = choose_mixer(replace, mixer)
        blocks, names = [], [f"blocks.{index}" for index in range(depth)]
        check_patterns(replace, names)
        for index, (name, rate) in enumerate(zip(names, drop_path_rates(drop_path_rate, depth), strict=True)):
            site = Site(dim, heads, 0, index, patch, self.grid)
            built = beside_prefix(build_mixer(site, name), prefix, prefix_mode)
            blocks.append(block(site, built, drop_path=rate, norm=norm))
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(dim)
        self.num_features = dim
        self.reset_classifier(num_classes)
        self.feature_info = FeatureInfo(
            dict(num_chs=dim, reduction=patch, module=name) for name in names
        )
        # Four evenly spaced depths, as dense heads on plain backbones take.
        self.default_out_indices = tuple(sorted({-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)}))
        self.apply(partial(initialise, spread=0.02))
        for table in (self.prefix, self.position):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def reset_classifier(self, num_classes: int, global_pool: Pooling | None = None) -> None:
        """Put a new head of `num_classes` (0: none) in place."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.pool = grid_pooling(self.global_pool, self.num_features, self.heads)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.removed = () if num_classes else ("head",)

    def resize(self, parameter: str, value: Tensor) -> Tensor:
        """The position table of a checkpoint, resampled to this model's native grid."""
        count = self.prefix_count
        if parameter != "position" or value.ndim != 3:
            return value
        side = round((value.shape[1] - count) ** (1 / len(self.grid)))
        if side ** len(self.grid) != value.shape[1] - count:
            return value
        return self._position_at(value, (side,) * len(self.grid), self.grid)

    @property
    def prefix_count(self) -> int:
        return 0 if self.prefix is None else self.prefix.shape[0]

    def _position_at(self, table: Tensor, native: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
        count = self.prefix_count
        moved = resample(table[:, count:].unflatten(1, native), grid).flatten(1, -2)
        return torch.cat([table[:, :count], moved], 1)

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The sequence (B, P + N, C) that enters the first block, and the grid of its N tokens."""
        x = self.stem(image)
        grid = tuple(x.shape[1:-1])
        prefix = None if self.prefix is None else self.prefix.expand(x.shape[0], -1, -1)
        position = self.position if is_native(grid, self.grid) else self._position_at(self.position, self.grid, grid)
        return join(x, prefix) + position, grid

    def features(self, image: Tensor) -> list[Tensor]:
        """The map of grid tokens after each block, (B, C, *grid), channels-last in memory."""
        tokens, grid = self.tokens(image)
        maps = []
        for number, block in enumerate(self.blocks):
            if hasattr(block, "drops") and block.drops():  # type: ignore[operator]
                raise SaccadeError(f"blocks.{number} lets tokens go ({type(block).__name__}): no map is left to give; "
                                   "read forward_features, or undo the method")
            tokens = block(tokens, self.prefix_count, grid)
            whole = block.whole(tokens) if hasattr(block, "whole") else tokens  # type: ignore[operator]
            maps.append(whole[:, self.prefix_count:].unflatten(1, grid).movedim(-1, 1))
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """The sequence (B, P + N, C) after the final norm."""
        tokens, grid = self.tokens(image)
        for block in self.blocks:  # not over features(): a deep stack of maps would be kept alive
            tokens = block(tokens, self.prefix_count, grid)
        return self.norm(tokens)

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Class scores from the class token (or the pooled grid tokens)."""
        return self.head(pool_tokens(tokens, self.global_pool, self.prefix_count, self.pool))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *size) -> (B, classes)."""
        return self.forward_head(self.forward_features(image))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay shall leave alone: position tables and prefix tokens."""
        return undecayed(self)


def beside_prefix(mixer: nn.Module, count: int, mode: str | None) -> nn.Module:
    """The mixer as a block with prefix tokens needs it; raises where nobody said what the prefix receives."""
    if not count or getattr(mixer, "prefix", False):
        return mixer
    if mode not in PREFIX_MODES:
        raise SaccadeError(f"{type(mixer).__name__} mixes the grid alone: say what the {count} prefix tokens receive, "
                           f'prefix_mode="none" or "mean" (given: {mode!r})')
    return PrefixBlind(mixer, mode)


def initialise(module: nn.Module, spread: float) -> None:
    """Linear layers from a truncated normal of standard deviation `spread`, biases zero; not those of `own_start`."""
    if isinstance(module, nn.Linear) and not getattr(module, "own_start", False):
        nn.init.trunc_normal_(module.weight, std=spread)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


DEIT_SIZES: dict[str, dict[str, Any]] = {
    size: dict(dim=64 * heads, depth=12, heads=heads) for size, heads in (("tiny", 3), ("small", 6), ("base", 12))
}

# The names that mmsegmentation gives them.
MMSEGMENTATION: KeyMap = (
    (r"cls_token", "prefix#0", without_first_axis),
    (r"pos_embed", "position"),
    (r"patch_embed\.projection\.(.*)", r"stem.proj.\1"),
    (r"layers\.(\d+)\.ln(\d)\.(.*)", r"blocks.\1.norm\2.\3"),
    (r"layers\.(\d+)\.attn\.attn\.in_proj_(.*)", r"blocks.\1.mixer.qkv.\2"),
    (r"layers\.(\d+)\.attn\.attn\.out_proj\.(.*)", r"blocks.\1.mixer.proj.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"ln1\.(.*)", r"norm.\1"),
)

# The names that DeiT's authors, and timm, give the parameters of a Plain with a class token.
DEIT: KeyMap = (
    (r"patch_embed\.proj\.(.*)", r"stem.proj.\1"),
    (r"cls_token", "prefix#0", without_first_axis),
    (r"pos_embed", "position"),
    (r"blocks\.(\d+)\.attn\.(.*)", r"blocks.\1.mixer.\2"),
)
