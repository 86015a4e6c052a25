"""MAE: hide three quarters of a picture and compute only the rest.

A random quarter of the patches goes through the encoder, without any stand-in for the others; a small decoder takes
what came out, a mask token wherever a patch is missing, and positions, and guesses the pixels,
    loss = mean over hidden patches of |guess - pixels|^2, pixels normalised a patch.

He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners", 2022, section 3.

Hosts are plain transformers of softmax attention, ours or timm's. A side that is no multiple of the patch is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.parts.masking import PatchDecoder, Visible
from saccade.parts.pixels import (
    check_ratio,
    denormalised,
    hidden_patches,
    image_of,
    normalised,
    patches_of,
    seen_numbers,
    whole_patches,
)

CARD = Card(
    "Masked Autoencoders Are Scalable Vision Learners",
    authors="He, Chen, Xie, Li, Dollár, Girshick",
    year=2022,
    arxiv="2111.06377",
    code="facebookresearch/mae",
    licence="CC-BY-NC-4.0",
    read="paper",
    keywords="self-supervised learning, masked image modeling, masked autoencoder, asymmetric encoder and decoder",
    kinds=("pretraining",),
    methods={"mae": "MaskedAutoencoder"},
    tests=("tests/papers/test_mae.py",),
)


class MaskedAutoencoder(nn.Module):
    """Images (B, C, H, W) -> {"loss"}: `model`, a plain transformer, sees the share 1 - `ratio` of their patches.

    The decoder is a plain transformer of `dim` channels with `depth` blocks of `heads` heads.
    """

    def __init__(self, model: nn.Module, ratio: float = 0.75, dim: int = 512, depth: int = 8, heads: int = 16) -> None:
        super().__init__()
        self.model, self.ratio = model, check_ratio("mae", ratio)
        self.visible = Visible(model, "mae")
        self.patch, chans = self.visible.patch, self.visible.in_chans
        self.decoder = PatchDecoder(self.visible.dim, dim, depth, heads)
        self.pixels = nn.Linear(dim, chans * self.patch**2)

    def draw(self, image: Tensor) -> Tensor:
        """Which patches are hidden, (B, N) bool: as many in each image."""
        return hidden_patches("mae", image, self.patch, self.ratio).flatten(1)

    def guess(self, image: Tensor, hidden: Tensor) -> Tensor:
        """The pixels of all patches (B, N, C p p), normalised, from those that are not `hidden` (B, N)."""
        grid = whole_patches("mae", image, self.patch)
        seen = seen_numbers(hidden)
        return self.pixels(self.decoder(self.visible(image, seen), seen, grid))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        hidden = self.draw(image)
        off = self.guess(image, hidden) - normalised(patches_of(image, self.patch))
        return {"loss": off.square().mean(-1)[hidden].mean()}

    def reconstruct(self, image: Tensor, hidden: Tensor | None = None) -> Tensor:
        """The image, its hidden patches (drawn if not given) replaced by what is guessed."""
        hidden = self.draw(image) if hidden is None else hidden
        pixels = patches_of(image, self.patch)
        whole = torch.where(hidden[..., None], denormalised(self.guess(image, hidden), pixels), pixels)
        return image_of(whole, self.patch, whole_patches("mae", image, self.patch))
