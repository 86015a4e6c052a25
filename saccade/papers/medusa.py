"""MEDUSA: one attention body that sees the whole image, a head of it at every scale of a network.

Attention modules of convolutional networks are many, small and blind to each other. Here one encoder-decoder with skip
connections, the body, makes global maps G of the image once. After each stage j of a host network, a light head turns
them, at the stage's size, and the stage's features F_j into gates; the gated features are what the next stage reads:
    G = body(image),    L_j = sigmoid(head_j(resized G, F_j)),    F'_j = L_j F_j.
G and the L_j are pictures of what the network attends to, as a whole and at each level.

Aboutalebi, Pavlova, Gunraj, Shafiee, Sabri, Alaref, Wong, "MEDUSA: Multi-Scale Encoder-Decoder Self-Attention Deep
Neural Network Architecture for Medical Image Analysis", 2021.

Any grid: the body halves odd sides up, and resizes (linear) to the sides of its skip connections and of the stages.
Not in the text that could be read, so ours: widths and depth of the body, the layers of a head, gates a channel, their
bias of 2 at the start (gates of one half would halve the features at every stage), and ResNets as hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.build import create_model
from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone, FeatureInfo
from saccade.core.record import note
from saccade.parts.convolution import conv_norm, grid_conv
from saccade.parts.head import Head
from saccade.parts.position import resample
from saccade.parts.pyramid import Pyramid, check_sizes, undecayed
from saccade.parts.resnet import MaxPool

CARD = Card(
    "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image Analysis",
    authors="Aboutalebi, Pavlova, Gunraj, Shafiee, Sabri, Alaref, Wong",
    year=2021,
    systems=("medusa",),
    arxiv="2110.06063",
    keywords="single body multi-scale heads, encoder-decoder attention, global and local attention, medical images",
    kinds=("backbone",),
    tests=("tests/papers/test_medusa.py",),
)


def double_conv(rank: int, dim: int, out_dim: int) -> nn.Sequential:
    """relu(norm(conv_3x3(x))), twice: (B, *grid, C) -> (B, *grid, C')."""
    return nn.Sequential(*conv_norm(rank, dim, out_dim), nn.ReLU(), *conv_norm(rank, out_dim, out_dim), nn.ReLU())


class AttentionBody(nn.Module):
    """An encoder-decoder with skip connections: image (B, C, *size) -> maps (B, *size, `maps`).

    Each of `widths` but the first halves the grid; on the way back up, (resized coarse map, skip) is convolved.
    """

    def __init__(self, rank: int, in_chans: int, widths: Sequence[int], maps: int) -> None:
        super().__init__()
        self.first = double_conv(rank, in_chans, widths[0])
        self.down = nn.ModuleList(nn.Sequential(MaxPool(rank), double_conv(rank, *pair)) for pair in pairwise(widths))
        self.up = nn.ModuleList(double_conv(rank, coarse + skip, skip) for skip, coarse in pairwise(widths))
        self.out = grid_conv(rank, widths[0], maps, 1)

    def forward(self, image: Tensor) -> Tensor:
        skips = [self.first(image.movedim(1, -1).contiguous())]
        for lower in self.down:
            skips.append(lower(skips[-1]))
        x = skips.pop()
        for upper in reversed(self.up):
            skip = skips.pop()
            x = upper(torch.cat([resample(x, tuple(skip.shape[1:-1]), linear=True), skip], -1))
        return self.out(x)


class ScaleHead(nn.Sequential):
    """sigmoid(conv_1x1(relu(norm(conv_3x3(G, F))))), C / 4 channels between: F (B, *grid, C) -> gates of its shape."""

    def __init__(self, rank: int, dim: int, maps: int) -> None:
        hidden = max(dim // 4, 1)
        super().__init__(*conv_norm(rank, dim + maps, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.Sigmoid())
        nn.init.constant_(self[-2].bias, 2.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor, maps: Tensor) -> Tensor:  # type: ignore[override]
        gates = super().forward(torch.cat([resample(maps, tuple(x.shape[1:-1]), linear=True), x], -1))
        note(gates)
        return gates


class Medusa(Backbone):
    """A pyramid `host` whose stages' maps are gated by the heads of one body: (B, C, *size) -> (B, classes).

    `widths` are the body's, `maps` the number of its global maps; the host's own head is not used.
    """

    def __init__(
        self, host: Pyramid, rank: int, widths: Sequence[int] = (16, 32, 64, 128, 256), maps: int = 1,
        num_classes: int = 1000, global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.host, self.in_chans = host, host.in_chans
        self.body = AttentionBody(rank, host.in_chans, widths, maps)
        self.gates = nn.ModuleList(ScaleHead(rank, dim, maps) for dim in host.feature_info.channels())
        self.feature_info = FeatureInfo(entry | dict(module=f"host.{entry['module']}") for entry in host.feature_info)
        self.default_out_indices = host.default_out_indices
        self.num_features = host.num_features
        self.global_pool = global_pool
        self.reset_classifier(num_classes)

    @property
    def stem(self) -> nn.ModuleList:
        """What reads the image."""
        return nn.ModuleList([self.host.stem, self.body.first])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head of `num_classes` (0: none) in place."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head = Head(self.num_features, num_classes, self.global_pool)
        self.removed = () if num_classes else ("head.fc",)

    def gated(self, image: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The global maps (B, *size, K), the gates L_j and the gated maps F'_j (B, *grid_j, C_j) of every stage."""
        maps, x = self.body(image), self.host.stem(image)
        gates, gated = [], []
        for stage, gate in zip(self.host.stages, self.gates, strict=True):
            x = stage(x)
            gates.append(gate(x, maps))
            x = x * gates[-1]
            gated.append(x)
        return maps, gates, gated

    def attention(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures of attention: the global one (B, K, *size), and of each stage (B, 1, *grid_j), its gates' mean."""
        maps, gates, _ = self.gated(image)
        return maps.movedim(-1, 1), [gate.mean(-1).unsqueeze(1) for gate in gates]

    def features(self, image: Tensor) -> list[Tensor]:
        """The gated map of each stage, (B, C_j, *grid_j)."""
        return [x.movedim(-1, 1) for x in self.gated(image)[2]]

    def forward_features(self, image: Tensor) -> Tensor:
        """The last gated map after the host's final norm, (B, C, *grid)."""
        return self.host.norm(self.gated(image)[2][-1]).movedim(-1, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Class scores from what `forward_features` gives."""
        return self.head(features.movedim(1, -1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *size) -> (B, classes)."""
        return self.forward_head(self.forward_features(image))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay shall leave alone: the host's."""
        return undecayed(self)


SIZES: dict[str, dict[str, Any]] = {
    "medusa_resnet18": dict(host="resnet18"),
    "medusa_resnet50": dict(host="resnet50"),
    "medusa_nano": dict(host="resnet_nano", widths=(8, 12, 16), img_size=32),
}


def medusa(
    host: str,
    widths: Sequence[int] = (16, 32, 64, 128, 256),
    maps: int = 1,
    num_classes: int = 1000,
    img_size: int | Sequence[int] = 224,
    global_pool: str = "avg",
    mixer: Any = None,
    **common: Any,
) -> Medusa:
    """A MEDUSA on any pyramid that `create_model` knows; `mixer` is the host's."""
    rank = len(check_sizes(num_classes, 1, img_size))
    trunk = create_model(host, num_classes=0, img_size=img_size, mixer=mixer, **common)
    if not isinstance(trunk, Pyramid):
        raise SaccadeError(f"host={host!r} has no stages: give the name of a pyramid, such as resnet50")
    return Medusa(trunk, rank, widths, maps, num_classes, global_pool)
