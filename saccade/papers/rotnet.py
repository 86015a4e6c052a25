"""RotNet: to tell by how much a picture was turned, one must know what is in it.

Each picture is shown turned by 0, 90, 180 and 270 degrees (counter-clockwise), and the network says which it was; what
its layers learn on the way serves other tasks,
    loss = mean over pictures and turns y of -log softmax(F(turn_y(x)))_y.

Gidaris, Singh, Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", 2018, section 2.

Any backbone can be trained so; the paper's networks are here: AlexNet with batch norm, and networks in network
of three-convolution blocks. AlexNet takes other sizes than 224 by an adaptive last pooling.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card, Weights
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.core.pretraining import feature_width

CARD = Card(
    "Unsupervised Representation Learning by Predicting Image Rotations",
    authors="Gidaris, Singh, Komodakis",
    year=2018,
    systems=("rotnet",),
    arxiv="1803.07728",
    code="gidariss/FeatureLearningRotNet@edafaba",
    licence="MIT",
    read="paper",
    keywords="self-supervised learning, rotation prediction, pretext task, AlexNet, network in network",
    kinds=("pretraining",),
    weights={"rotnet_alexnet": Weights("https://mega.nz/#!n81AnC6L!xTbo_D3xd7QOpOSG1UFSChmDr8mbcuWbVjhQMaC4yoE")},
    methods={"rotnet": "RotationPrediction"},
    goldens=("rotnet_alexnet", "rotnet_nin4", "op_rotnet_rotations"),
    tests=("tests/papers/test_rotnet.py",),
)

TURNS = 4


def rotations(images: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, 4, C, S, S): turned by 0, 90, 180, 270 degrees counter-clockwise."""
    if images.shape[-1] != images.shape[-2]:
        raise SaccadeError(f"pictures of {images.shape[-2]} x {images.shape[-1]} pixels change shape when turned: give "
                           "square ones")
    return torch.stack([torch.rot90(images, turn, (-2, -1)) for turn in range(TURNS)], 1)


class RotationPrediction(nn.Module):
    """Pictures (B, C, S, S) -> {"loss", "accuracy"} of telling the turns from the features of a model without a head.

    `model` gives (B, D); raises SaccadeError where it has a head or gives something else.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(feature_width(model, "rotation prediction"), TURNS)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        scores = self.head(self.model(rotations(images).flatten(0, 1)))
        turn = torch.arange(TURNS, device=scores.device).repeat(len(images))
        return {"loss": F.cross_entropy(scores, turn), "accuracy": (scores.argmax(1) == turn).float().mean()}


class ConvNet(nn.Module):
    """Named blocks in a row, and a linear classifier: `features` gives what leaves each of them."""

    def __init__(self, blocks: dict[str, nn.Module], dim: int, num_classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)
        self.num_classes, self.num_features = num_classes, dim
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def features(self, image: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, block in self.blocks.items():
            image = found[name] = block(image)
        return found

    def forward(self, image: Tensor) -> Tensor:
        *_, last = self.features(image).values()
        return self.head(last.mean((2, 3)) if last.ndim == 4 else last)


def conv(
    in_dim: int, dim: int, kernel: int, stride: int = 1, padding: int | None = None, bias: bool = True
) -> nn.Module:
    """relu(batch norm(conv(x)))."""
    padding = kernel // 2 if padding is None else padding
    return nn.Sequential(nn.Conv2d(in_dim, dim, kernel, stride, padding, bias=bias), nn.BatchNorm2d(dim), nn.ReLU())


def rotnet_alexnet(num_classes: int = TURNS, in_chans: int = 3) -> ConvNet:
    """AlexNet with batch norm and without dropout or groups."""
    return ConvNet({
        "conv1": conv(in_chans, 64, 11, 4, 2), "pool1": nn.MaxPool2d(3, 2),
        "conv2": conv(64, 192, 5), "pool2": nn.MaxPool2d(3, 2),
        "conv3": conv(192, 384, 3), "conv4": conv(384, 256, 3), "conv5": conv(256, 256, 3), "pool5": nn.MaxPool2d(3, 2),
        "fc_block": nn.Sequential(
            nn.AdaptiveAvgPool2d(6), nn.Flatten(),
            nn.Linear(256 * 36, 4096, bias=False), nn.BatchNorm1d(4096), nn.ReLU(),
            nn.Linear(4096, 4096, bias=False), nn.BatchNorm1d(4096), nn.ReLU()),
    }, 4096, num_classes)


def rotnet_nin(stages: int = 4, pool_third: bool = False, num_classes: int = TURNS, in_chans: int = 3) -> ConvNet:
    """A network in network: blocks of a wide and two 1x1 convolutions, the first two halving the map.

    `pool_third` halves it after the third block too.
    """
    blocks: dict[str, nn.Module] = {}
    dim = in_chans
    for stage in range(1, stages + 1):
        widths = (192, 160, 96) if stage == 1 else (192, 192, 192)
        layers = [conv(dim, widths[0], 5 if stage < 3 else 3, bias=False),
                  conv(widths[0], widths[1], 1, bias=False), conv(widths[1], widths[2], 1, bias=False)]
        if stage == 1:
            layers.append(nn.MaxPool2d(3, 2, 1))
        elif stage == 2 or (stage == 3 and pool_third):
            layers.append(nn.AvgPool2d(3, 2, 1))
        blocks[f"conv{stage}"], dim = nn.Sequential(*layers), widths[2]
    return ConvNet(blocks, dim, num_classes)


SIZES: dict[str, dict[str, Any]] = {
    "rotnet_alexnet": dict(builder="rotnet_alexnet"),
    **{f"rotnet_nin{stages}": dict(builder="rotnet_nin", stages=stages) for stages in (3, 4, 5)},
}

_LAYER = {"Conv": "0", "BatchNorm": "1"}
AUTHORS: KeyMap = (
    *((rf"_feature_blocks\.{number}\.(\d)\.(.*)", rf"blocks.{name}.\1.\2")
      for number, name in enumerate(("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5")) if name[0] == "c"),
    *((rf"_feature_blocks\.8\.{theirs}\.(.*)", rf"blocks.fc_block.{theirs + 1}.\1") for theirs in (1, 2, 4, 5)),
    (r"_feature_blocks\.9\.0\.(.*)", r"head.\1"),
    *((rf"_feature_blocks\.\d\.Block(\d)_ConvB{layer}\.layers\.{theirs}\.(.*)", rf"blocks.conv\1.{layer - 1}.{ours}.\2")
      for layer in (1, 2, 3) for theirs, ours in _LAYER.items()),
    (r"_feature_blocks\.\d\.Classifier\.(.*)", r"head.\1"),
)
TAPS = {"classifier": "head", r"((?:conv|pool|fc_).*)": r"blocks.\1"}
