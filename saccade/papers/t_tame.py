"""T-TAME: a small trained attention on a frozen classifier's maps explains any class in one forward.

Maps F_i (B, C_i, h_i, w_i) of several layers go through a 1x1 convolution, a norm, and back on themselves; they are
laid side by side, and a 1x1 convolution gives one map a class:
    c = fuse(concat over i of resize(relu(F_i + norm(W_i F_i)))),   a = sigmoid(c).
Of a transformer, the grid tokens of a layer, each times that layer's class token, are its map. In training the frozen
classifier must recognise the picture times the enlarged map of its class, while the map stays small and smooth.

Ntrougkas, Gkalelis, Mezaris, "T-TAME: Trainable Attention Mechanism for Explaining Convolutional Networks and Vision
Transformers", 2024 (TAME, for convolutional networks alone: 2022).

Maps have the first layer's size, at most 56 x 56. The loss's weights of area and roughness are from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone

CARD = Card(
    "T-TAME: Trainable Attention Mechanism for Explaining Convolutional Networks and Vision Transformers",
    authors="Ntrougkas, Gkalelis, Mezaris",
    year=2024,
    systems=("t_tame",),
    arxiv="2403.04523",
    code="IDT-ITI/T-TAME@92499e7",
    read="paper",
    keywords="trainable explanation, attention mechanism on feature maps, class activation, one forward",
    kinds=("explain", "attribution"),
    methods={"t_tame": "t_tame"},
    goldens=("ttame_vit_tiny", "op_ttame_attention", "op_tame_attention"),
    tests=("tests/papers/test_t_tame.py",),
)

LARGEST = 56


class FeatureAttention(nn.Module):
    """Maps (B, C_i, h_i, w_i) -> one map a class, (B, classes, h, w), before the sigmoid."""

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 1) for dim in channels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for dim in channels)
        self.fuser = nn.Conv2d(sum(channels), num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = tuple(min(side, LARGEST) for side in maps[0].shape[2:])
        mixed = [F.interpolate((x + norm(conv(x))).relu(), size, mode="bilinear", align_corners=False)
                 for x, conv, norm in zip(maps, self.convs, self.norms, strict=True)]
        return self.fuser(torch.cat(mixed, 1))


def token_map(tokens: Tensor, grid: tuple[int, ...], prefix: int = 1) -> Tensor:
    """(B, P + N, C), class token first, as (B, C, *grid): the grid tokens, each times the class token (if any)."""
    return (tokens[:, prefix:] * tokens[:, :1] if prefix else tokens).unflatten(1, grid).movedim(-1, 1)


class Tame(nn.Module):
    """A frozen classifier of ours and the attention on its `layers` (blocks of a Plain, stages of a pyramid).

    `forward` gives the classifier's scores, `maps` the (B, classes, h, w) before the sigmoid.
    Raises SaccadeError for a layer that the classifier has not.
    """

    def __init__(self, body: Backbone, layers: Sequence[int], num_classes: int = 1000) -> None:
        super().__init__()
        self.body, self.layers = body.requires_grad_(False), tuple(layers)
        dims = [info["num_chs"] for info in body.feature_info]
        if not self.layers or not all(0 <= layer < len(dims) for layer in self.layers):
            raise SaccadeError(f"layers={self.layers}: choose some of 0 to {len(dims) - 1}")
        self.attention = FeatureAttention([dims[layer] for layer in self.layers], num_classes)

    def train(self, mode: bool = True) -> Tame:
        super().train(mode)
        self.body.eval()
        return self

    def look(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The classifier's scores (B, classes) and the maps (B, classes, h, w) before the sigmoid, in one forward."""
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                if len(inputs) == 1:  # a stage of a pyramid: (B, *grid, C)
                    found[layer] = output.movedim(-1, 1)
                else:  # a block of a Plain: tokens, number of prefix tokens, grid
                    _, prefix, grid = inputs
                    found[layer] = token_map(output, grid, prefix)

            return hook

        names = [info["module"] for info in self.body.feature_info]
        handles = [self.body.get_submodule(names[layer]).register_forward_hook(keep(layer)) for layer in self.layers]
        try:
            scores = self.body(image)
        finally:
            for handle in handles:
                handle.remove()
        return scores, self.attention([found[layer] for layer in self.layers])

    def maps(self, image: Tensor) -> Tensor:
        return self.look(image)[1]

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)

    def loss(self, image: Tensor, target: Tensor, area: float = 2.0, rough: float = 0.01) -> Tensor:
        """Cross entropy of the picture times its map for `target` (B,), + area mean a + rough mean |grad a|^2."""
        place = target[:, None, None, None].expand(-1, 1, *image.shape[2:])
        a = F.interpolate(self.maps(image).sigmoid(), image.shape[2:], mode="bilinear", align_corners=False)
        a = a.gather(1, place)
        uneven = a.diff(dim=2).square().mean() + a.diff(dim=3).square().mean()
        return F.cross_entropy(self.body(image * a), target) + area * a.mean() + rough * uneven


def t_tame(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """The maps sigmoid(c) (B, H, W) of `target` (B,). Raises SaccadeError for a model that is no `Tame`."""
    if not isinstance(model, Tame):
        raise SaccadeError(f"t_tame explains a trained Tame(classifier, layers), not {type(model).__name__}: train one")
    with torch.no_grad():
        chosen = model.maps(image).sigmoid()[torch.arange(len(image)), target]
    return F.interpolate(chosen[:, None], image.shape[2:], mode="bilinear", align_corners=False)[:, 0]
