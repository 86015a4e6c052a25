"""SimMIM: hide large patches, guess their pixels with one linear layer.

Embedded patches are replaced by a mask token in large squares, any encoder sees the whole, and a linear layer on its
last map guesses the raw pixels under each place,
    loss = mean over hidden pixels of |guess - pixel|.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu, "SimMIM: A Simple Framework for Masked Image Modeling", 2022, section 3.

Hidden pixels are blank before the stem, which matters to those of overlapping convolutions alone. A side that is no
multiple of the squares is refused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.parts.masking import Covered, spread
from saccade.parts.pixels import check_ratio, hidden_patches, image_of

CARD = Card(
    "SimMIM: A Simple Framework for Masked Image Modeling",
    authors="Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu",
    year=2022,
    arxiv="2111.09886",
    code="microsoft/SimMIM",
    licence="MIT",
    read="paper",
    keywords="self-supervised learning, masked image modeling, mask token, linear decoder",
    kinds=("pretraining",),
    methods={"simmim": "SimMIM"},
    tests=("tests/papers/test_simmim.py",),
)


class SimMIM(nn.Module):
    """Images (B, C, *size) -> {"loss"}: squares of `patch` pixels are hidden, the share `ratio` of them.

    `model` is a Pyramid or Plain of ours, or timm's ViT or Swin; `patch` is a multiple of its last stride, by
    default that, at least twice the first (32 for Swin and for ViT).
    """

    def __init__(self, model: nn.Module, ratio: float = 0.6, patch: int | None = None) -> None:
        super().__init__()
        self.model, self.ratio = model, check_ratio("simmim", ratio)
        self.covered = Covered(model, "simmim")
        self.missing = nn.Parameter(torch.randn(self.covered.width) * 0.02)
        stride = self.covered.stride
        self.patch = max(stride, 2 * self.covered.first_stride) if patch is None else patch
        if self.patch % stride:
            raise SaccadeError(f"simmim: patch={patch} is no multiple of the last stride of the host, {stride}")
        self.pixels = nn.Linear(self.covered.dim, self.covered.in_chans * stride**2)

    def draw(self, image: Tensor) -> Tensor:
        """Which squares are hidden, (B, *size / patch) bool: as many in each image."""
        return hidden_patches("simmim", image, self.patch, self.ratio)

    def guess(self, image: Tensor, hidden: Tensor) -> Tensor:
        """A picture (B, C, *size) of guessed pixels, of what is not hidden."""
        places = self.covered(image, hidden, self.missing).movedim(1, -1)
        return image_of(self.pixels(places).flatten(1, -2), self.covered.stride, tuple(places.shape[1:-1]))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        hidden = self.draw(image)
        off = F.l1_loss(self.guess(image, hidden), image, reduction="none").mean(1)
        return {"loss": off[spread(hidden, tuple(image.shape[2:]))].mean()}

    def reconstruct(self, image: Tensor, hidden: Tensor | None = None) -> Tensor:
        """The image, its hidden squares (drawn if not given) replaced by what is guessed."""
        hidden = self.draw(image) if hidden is None else hidden
        return torch.where(spread(hidden, tuple(image.shape[2:]))[:, None], self.guess(image, hidden), image)
