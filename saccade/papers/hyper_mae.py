"""Hyper-MAE: a hyperspectral image guessed from some of its bands at some of its places.

Bands and places are masked apart: of A bands and T places, a and t are drawn for each image, and the encoder (LESS ViT)
sees the a t tokens where they cross, with the class tokens of these bands and places. A narrow decoder of LESS blocks
gets them back in the full grid, one learned token in place of each that is missing, all with the codes of their
wavelengths and places, and guesses the pixels of every patch of every band. The loss counts what was hidden,
    loss = mean over hidden (a, t) of |guess(a, t) - pixels(a, t)|^2.

Si, Wan, Do, Vasisht, Zhao, Hamann, "Towards Scalable Foundation Model for Multi-modal and Hyperspectral Geospatial
Data", 2025, section 3 (Hyper-MAE).

Any grid: that of the encoder. Not in the text that could be read, so ours: the shares that are hidden, the decoder's
depth and width, pixels as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import mixer_factory
from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone
from saccade.core.site import Site
from saccade.parts.block import LAYER_NORM, Block
from saccade.parts.pixels import patches_of
from saccade.parts.stem import pad_image

CARD = Card(
    "Towards Scalable Foundation Model for Multi-modal and Hyperspectral Geospatial Data",
    authors="Si, Wan, Do, Vasisht, Zhao, Hamann",
    year=2025,
    arxiv="2503.12843",
    keywords="Hyper-MAE, hyperspectral masked autoencoder, spatial and spectral masking, LESS ViT, pre-training",
    kinds=("pretraining",),
    tests=("tests/papers/test_hyper_mae.py",),
)


class HyperMAE(nn.Module):
    """Pre-training of a LESS ViT `encoder` by masked bands and places: images (B, A, H, W) -> the loss and the guess.

    `hide_bands` and `hide_places` are the shares of bands and places that the encoder does not see; one of either is
    always left.
    """

    def __init__(
        self, encoder: Backbone, dim: int = 192, depth: int = 4, heads: int = 6, hide_bands: float = 0.5,
        hide_places: float = 0.75,
    ) -> None:
        super().__init__()
        if not (0 <= hide_bands < 1 and 0 <= hide_places < 1 and hide_bands + hide_places > 0):
            raise SaccadeError(f"hide_bands={hide_bands}, hide_places={hide_places}: give shares of at least 0 and "
                               "below 1, not both 0")
        self.encoder, self.hide_bands, self.hide_places = encoder, hide_bands, hide_places
        self.patch = encoder.feature_info.reduction()[0]
        self.embed = nn.Linear(encoder.num_features, dim)
        self.missing = nn.Parameter(torch.randn(dim) * 0.02)
        make = mixer_factory("less_attention")
        sites = [Site(dim, heads, 0, index, self.patch, (2, 2)) for index in range(depth)]
        self.decoder = nn.Sequential(*(Block(site, make(site)) for site in sites), LAYER_NORM(dim))
        self.pixels = nn.Linear(dim, self.patch**2)

    def forward(
        self, image: Tensor, wavelengths: Sequence[float] | None = None, resolution: float | None = None,
        seen: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """{"loss", "guess" (B, A, N, pixels of a patch), "hidden" (B, A, N)}.

        `seen` are the numbers of the bands (B, a) and places (B, t) that the encoder sees, drawn if not given.
        """
        bands_apart = image.flatten(0, 1).unsqueeze(1)
        target = patches_of(pad_image(bands_apart, self.patch), self.patch).unflatten(0, image.shape[:2])
        B, A, N, _ = target.shape
        bands, places = seen if seen is not None else (
            drawn(B, A, self.hide_bands, image.device), drawn(B, N, self.hide_places, image.device))
        told = wavelengths, resolution
        known = self.embed(self.encode(image, bands, places, *told))
        at = crossing(with_class(bands), with_class(places))
        whole = self.missing.to(known.dtype).expand(B, 1 + A, 1 + N, -1).index_put(at, known)
        grid = tuple(-(-side // self.patch) for side in image.shape[2:])
        code = self.encoder.codes(A, grid, whole, *told)  # type: ignore[operator]
        guess = self.pixels(self.decoder(whole + code)[:, 1:, 1:])
        hidden = torch.ones(B, A, N, dtype=torch.bool, device=image.device)
        hidden[crossing(bands, places)] = False
        error = (guess - target).square().mean(-1)
        return {"loss": (error * hidden).sum() / hidden.sum(), "guess": guess, "hidden": hidden}

    def encode(
        self, image: Tensor, bands: Tensor, places: Tensor, wavelengths: Sequence[float] | None = None,
        resolution: float | None = None,
    ) -> Tensor:
        """The encoder's tokens (B, 1 + a, 1 + t, C) of the bands and places that it sees, and of their class tokens."""
        model: Any = self.encoder
        patches = model.patches(image)
        grid = tuple(patches.shape[2:4])
        code = model.codes(patches.shape[1], grid, patches, wavelengths, resolution)
        rows, columns = with_class(bands), with_class(places)
        tokens = model.framed(patches.flatten(2, 3)[crossing(bands, places)]) + code[rows[:, :, None], columns[:, None]]
        field = model.mask(grid, patches, resolution)
        mask = None if field is None else field[columns[:, :, None], columns[:, None]][:, None]
        return model.norm(model.through(tokens, mask))


def drawn(batch: int, count: int, hide: float, device: torch.device) -> Tensor:
    """(batch, left) numbers below `count`, in order, drawn for each image; about `hide` of them are not there."""
    left = max(round(count * (1 - hide)), 1)
    return torch.rand(batch, count, device=device).argsort(1)[:, :left].sort(1).values


def with_class(numbers: Tensor) -> Tensor:
    """The numbers of the same tokens where a class token stands before them all, and its own."""
    return F.pad(numbers + 1, [1, 0])


def crossing(bands: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The index of (B, a, t) tokens, each image's own bands and places, in a tensor (B, A, T, ...)."""
    return torch.arange(bands.shape[0], device=bands.device)[:, None, None], bands[:, :, None], places[:, None]
