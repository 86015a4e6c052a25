"""ULSAM: every group of channels has its own map of where to look, almost for free.

The C channels are cut into g subspaces; each takes one softmax over all places i of the map and adds what it weighs,
    A_s = softmax_i(act(norm(w_s . maxpool_3x3(act(norm(a x_s + b)))))),   out_s = x_s + A_s x_s,
with a factor a and a shift b a channel and a vector w_s over the C / g channels: 2 C multiply-adds a place, where
attention between places takes thousands. It stands after a layer of a MobileNet, or in place of one.

Saini, Jha, Das, Mittal, Mohan, "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural
Networks", 2020, section 3.

Any grid: pooling sees only what lies inside the map. Quirks kept: a rectifier before the softmax, so that places under
the mean weigh alike; maps of many places weigh each by 1 / N, so that out is near x.
The paper's differences in parameters and multiply-adds tell in which rows of equal blocks modules stand; that they take
the last blocks of a row is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap
from saccade.core.record import note, recording
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.convolution import conv_norm
from saccade.parts.mobilenet import INVERTED_ROWS, SEPARABLE_ROWS, MobileBlock, MobileNet, Row
from saccade.parts.reparameterize import affine_of

CARD = Card(
    "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
    authors="Saini, Jha, Das, Mittal, Mohan",
    year=2020,
    systems=("ulsam",),
    arxiv="2006.15102",
    code="Nandan91/ULSAM@9a07d68",
    keywords="subspace attention, spatial softmax, attention map a channel group, compact network, MobileNet",
    kinds=("backbone", "mixer"),
    mixers={"subspace_attention": "SubspaceAttention"},
    params={"ulsam_mobilenet_v1": 3.9e6, "ulsam_mobilenet_v1_075": 2.4e6, "ulsam_mobilenet_v1_050": 1.2e6,
            "ulsam_mobilenet_v1_added": 4.2e6, "ulsam_mobilenet_v2": 2.96e6, "ulsam_mobilenet_v2_96": 3.28e6,
            "ulsam_mobilenet_v2_160": 3.08e6, "ulsam_mobilenet_v2_64_96": 3.23e6, "ulsam_mobilenet_v2_160_160": 2.77e6,
            "ulsam_mobilenet_v2_96_96_160_160": 2.54e6, "ulsam_mobilenet_v2_added": 3.4e6},
    macs={"ulsam_mobilenet_v1": 517e6, "ulsam_mobilenet_v1_075": 296e6, "ulsam_mobilenet_v1_050": 136e6,
          "ulsam_mobilenet_v1_added": 569.2e6, "ulsam_mobilenet_v2": 261.88e6, "ulsam_mobilenet_v2_96": 277.34e6,
          "ulsam_mobilenet_v2_160": 284.54e6, "ulsam_mobilenet_v2_64_96": 267.06e6,
          "ulsam_mobilenet_v2_160_160": 269.07e6, "ulsam_mobilenet_v2_96_96_160_160": 223.77e6,
          "ulsam_mobilenet_v2_added": 300.01e6},
    top1={"ulsam_mobilenet_v1": 70.43, "ulsam_mobilenet_v1_075": 67.81, "ulsam_mobilenet_v1_050": 63.25,
          "ulsam_mobilenet_v1_added": 70.61, "ulsam_mobilenet_v2": 71.52, "ulsam_mobilenet_v2_160_160": 70.74,
          "ulsam_mobilenet_v2_96_96_160_160": 69.72, "ulsam_mobilenet_v2_added": 71.64},
    goldens=("op_ulsam",),
    tests=("tests/papers/test_ulsam.py",),
)


class SubspaceAttention(nn.Module):
    """out_s = x_s + softmax(f(x_s)) x_s for each of `subspaces` groups of channels: (B, *grid, C) -> (B, *grid, C).

    Raises SaccadeError where the subspaces do not divide the width.
    """

    ranks = (1, 2, 3)
    template = Template(
        "one number a place, of depthwise layers and pooling", "softmax over places", "x times it, added to x"
    )

    def __init__(self, site: Site, subspaces: int = 4) -> None:
        super().__init__()
        if site.dim % subspaces:
            raise SaccadeError(f"{subspaces} subspaces do not divide {site.dim} channels; choose a divisor")
        self.subspaces = subspaces
        self.scale = nn.Sequential(*conv_norm(site.rank, site.dim, site.dim, 1, groups=site.dim, bias=True), nn.ReLU())
        self.gather = nn.Sequential(*conv_norm(site.rank, site.dim, subspaces, 1, groups=subspaces, bias=True),
                                    nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        plain = self.training or recording()  # the form whose arithmetic is declared
        scores = self.gather(largest_neighbour(self.scale(x))) if plain else self._folded(x)
        maps = scores.flatten(1, -2).softmax(1)
        note(maps.movedim(-1, 1)[:, :, None])
        parts = x.unflatten(-1, (self.subspaces, -1))
        return torch.addcmul(parts, parts, maps.view(*scores.shape, 1)).flatten(-2)

    def _folded(self, x: Tensor) -> Tensor:
        """The scores (B, *grid, subspaces), norms folded into what stands before them.

        One subspace after the other, so that what lies between fits the cache, and without convolutions of one place,
        which have no fast form.
        """
        (factor, shift), (weight, bias) = folded(self.scale), folded(self.gather)
        parts, scores = x.chunk(self.subspaces, -1), []
        for part, a, b, w in zip(parts, factor.view_as(weight), shift.view_as(weight), weight, strict=True):
            scores.append(largest_neighbour(torch.addcmul(b, part, a).relu_()) @ w)
        return F.relu(torch.stack(scores, -1) + bias)

    def cost(self, site: Site, grid: tuple[int, ...]) -> int:
        """Multiply-adds: 2 N C, for the factor of each channel and for the sum over those of a subspace."""
        return 2 * torch.Size(grid).numel() * site.dim

    def reach(self, site: Site) -> None:
        """The softmax is over the whole map."""
        return None


def largest_neighbour(x: Tensor) -> Tensor:
    """The largest of 3x3 neighbours, an axis at a time, of a map (B, *grid, C) that is nowhere under 0."""
    for axis in range(1, x.ndim - 1):
        side = x.shape[axis]
        padded = F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [1, 1])
        before, here, after = (padded.narrow(axis, offset, side) for offset in range(3))
        x = torch.maximum(torch.maximum(before, here), after)
    return x


def folded(layers: nn.Sequential) -> tuple[Tensor, Tensor]:
    """The weight (O, I) and bias of a 1x1 convolution with its batch norm, in evaluation."""
    conv, norm = layers[0], layers[1]
    weight, bias = cast(Tensor, conv.weight).flatten(1), cast(Tensor, conv.bias)
    if isinstance(norm, nn.Identity):  # folded for good by `reparameterize`
        return weight, bias
    scale, shift = affine_of(norm)
    return weight * scale[:, None], bias * scale + shift


class SubspaceBlock(MobileBlock):
    """The module where a whole block stood, or after one: mixer(x)."""

    def __init__(
        self, site: Site, layer: nn.Module, dim: int, out_dim: int, stride: int = 1, drop_path: float = 0.0
    ) -> None:
        super().__init__(site, layer, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


def _replaced(rows: Sequence[Row], *dims: int) -> list[Row]:
    """Modules in place of the last blocks of the rows of these widths, as many as a width is named."""
    return [part for row in rows for part in (row._replace(depth=row.depth - dims.count(row.dim)),
                                              Row(1, row.dim, dims.count(row.dim), 1, SubspaceBlock)) if part.depth]


def _added(rows: Sequence[Row], dim: int) -> list[Row]:
    """A module after the row of this width."""
    return [part for row in rows for part in (row, Row(1, dim, 1, 1, SubspaceBlock))[:1 + (row.dim == dim)]]


# The numbers at the end of a name are the widths of the blocks that gave way; without them 96 and 160.
SIZES: dict[str, dict[str, Any]] = {
    **{f"ulsam_mobilenet_v1{name}": dict(rows=_replaced(SEPARABLE_ROWS, 512), width=width)
       for name, width in {"": 1.0, "_075": 0.75, "_050": 0.5}.items()},
    "ulsam_mobilenet_v1_added": dict(rows=_added(SEPARABLE_ROWS, 512)),
    "ulsam_mobilenet_v2": dict(rows=_replaced(INVERTED_ROWS, 96, 160), last=1280),
    **{f"ulsam_mobilenet_v2_{'_'.join(map(str, dims))}": dict(rows=_replaced(INVERTED_ROWS, *dims), last=1280)
       for dims in ((96,), (160,), (64, 96), (160, 160), (96, 96, 160, 160))},
    "ulsam_mobilenet_v2_added": dict(rows=_added(INVERTED_ROWS, 160), last=1280),
    "ulsam_nano": dict(rows=_replaced([Row(1, 16, 1, 1), Row(2, 24, 2, 2), Row(2, 32, 2, 2)], 24, 32), stem_stride=1,
                       last=64, img_size=32),
}


def ulsam(
    rows: Sequence[Row],
    subspaces: int = 4,
    width: float = 1.0,
    stem_stride: int = 2,
    last: int | None = None,
    mixer: Any = None,
    **common: Any,
) -> MobileNet:
    """A MobileNet whose `SubspaceBlock`s have so many `subspaces`."""
    attention = partial(SubspaceAttention, subspaces=subspaces)
    own = [row._replace(mixer=attention) if row.block is SubspaceBlock else row for row in rows]
    return MobileNet(own, width=width, stem_stride=stem_stride, last=last, replace=mixer, **common)


# The module's names alone: the authors published no network.
AUTHORS: KeyMap = tuple(
    rule for number in range(64) for rule in (
        (rf"subspaces\.{number}\.conv_dws\.(.*)", rf"scale.0.\1#{number}"),
        (rf"subspaces\.{number}\.bn_dws\.(weight|bias|running_mean|running_var)", rf"scale.1.\1#{number}"),
        (rf"subspaces\.{number}\.conv_point\.(.*)", rf"gather.0.\1#{number}"),
        (rf"subspaces\.{number}\.bn_point\.(weight|bias|running_mean|running_var)", rf"gather.1.\1#{number}"),
        Dropped(rf"subspaces\.{number}\..*num_batches_tracked", "a counter of each subspace"))
)
