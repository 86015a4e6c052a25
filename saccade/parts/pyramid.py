"""Pyramid: stem -> stages (downsample, blocks) -> norm -> head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from saccade.core.build import check_patterns, choose_mixer
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.site import MixerFactory, Site
from saccade.parts.head import Head


class Stage(nn.Module):
    """norm(blocks(downsample(x))): (B, *grid, C) -> (B, *grid', C')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.downsample(x)))


class Pyramid(Backbone):
    """A hierarchical backbone: images (B, C, *size) in, maps (B, C_i, *grid_i) at growing strides out.

    The paper gives callables: `stem(rank, in_chans, dim)`, `downsample(rank, dim, out_dim)` (or one for each stage
    after the first), `block(site, mixer, drop_path=rate)`, `mixer(site)` (or one a stage), `norm(dim)` on the last map,
    `stage_norm(dim)` at the end of every stage, and `head(dim, num_classes, global_pool)`. `replace` is the caller's
    mixer (see `create_model`). `stride` and `downsample_stride` (or one for each stage after the first) only tell the
    sites where they stand.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        *,
        stem: Callable[[int, int, int], nn.Module],
        downsample: Callable[[int, int, int], nn.Module] | Sequence[Callable[[int, int, int], nn.Module]],
        block: Callable[..., nn.Module],
        mixer: MixerFactory | Sequence[MixerFactory],
        norm: Callable[[int], nn.Module] | None = None,
        stage_norm: Callable[[int], nn.Module] | None = None,
        head: Callable[[int, int, str], nn.Module] = Head,
        stride: int = 4,
        downsample_stride: int | Sequence[int] = 2,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        replace: Any = None,
    ) -> None:
        super().__init__()
        size = check_sizes(num_classes, in_chans, img_size)
        rank = len(size)
        self.in_chans, self.global_pool = in_chans, global_pool
        build_mixer = choose_mixer(replace, mixer)
        rates = drop_path_rates(drop_path_rate, sum(depths))
        self.stem = stem(rank, in_chans, dims[0])
        lowers = [downsample] * (len(depths) - 1) if callable(downsample) else downsample
        later = [downsample_stride] * (len(depths) - 1) if isinstance(downsample_stride, int) else downsample_stride
        steps = [prod([stride, *later[:number]]) for number in range(len(depths))]
        stages, names = [], []
        for number, (depth, step) in enumerate(zip(depths, steps, strict=True)):
            grid = tuple(-(-side // step) for side in size)
            blocks = []
            for index in range(depth):
                site = Site(dims[number], heads[number], number, index, step, grid)
                names.append(f"stages.{number}.blocks.{index}")
                blocks.append(block(site, build_mixer(site, names[-1]), drop_path=rates.pop(0)))
            lower = lowers[number - 1](rank, dims[number - 1], dims[number]) if number else nn.Identity()
            stages.append(Stage(lower, blocks, stage_norm(dims[number]) if stage_norm is not None else None))
        check_patterns(replace, names)
        self.stages = nn.ModuleList(stages)
        self.norm = norm(dims[-1]) if norm is not None else nn.Identity()
        self.num_features = dims[-1]
        self._make_head = head
        self.reset_classifier(num_classes)
        self.feature_info = FeatureInfo(
            dict(num_chs=dim, reduction=step, module=f"stages.{number}")
            for number, (dim, step) in enumerate(zip(dims, steps, strict=True))
        )
        self.default_out_indices = tuple(range(len(depths)))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head of `num_classes` (0: none) in place."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head = self._make_head(self.num_features, num_classes, self.global_pool)
        self.removed = () if num_classes else ("head.fc",)

    def features(self, image: Tensor) -> list[Tensor]:
        """The map after each stage, (B, C_i, *grid_i), channels-last in memory: what every dense head takes."""
        maps, x = [], self.stem(image)
        for stage in self.stages:
            x = stage(x)
            maps.append(x.movedim(-1, 1))
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """The last map after the final norm, (B, C, *grid)."""
        x = self.stem(image)
        for stage in self.stages:  # not over features(): the large maps of early stages would be kept alive
            x = stage(x)
        return self.norm(x).movedim(-1, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Class scores from what `forward_features` gives."""
        return self.head(features.movedim(1, -1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *size) -> (B, classes)."""
        return self.forward_head(self.forward_features(image))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay shall leave alone: position tables of the mixers."""
        return undecayed(self)


def no_mixer(site: Site) -> None:
    """What stands where a stage has no mixer, until a caller's own takes the place."""


def undecayed(model: nn.Module) -> set[str]:
    """Parameters that their modules list in `undecayed` (position and bias tables)."""
    return {f"{name}.{parameter}".lstrip(".") for name, module in model.named_modules()
            for parameter in getattr(module, "undecayed", ())}


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Drop path rates that grow linearly with depth, from 0 to `last`."""
    return [last * index / max(depth - 1, 1) for index in range(depth)]


def check_sizes(num_classes: int, in_chans: int, img_size: int | Sequence[int]) -> tuple[int, ...]:
    """The image size as a tuple of one to three sides; raises where a number makes no model."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if not 1 <= len(size) <= 3 or min(size) < 1:
        raise SaccadeError(f"img_size={img_size!r}: give one side of a square, or one to three sides, in pixels")
    if num_classes < 0 or in_chans < 1:
        raise SaccadeError(f"num_classes={num_classes}, in_chans={in_chans}: at least 0 and 1")
    return size
