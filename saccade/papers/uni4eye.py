"""Uni4Eye: pictures and volumes teach one transformer.

One patch embedding has a projection for pictures, over p x p pixels, and one for volumes, over p x p x p voxels, into
the same tokens; half of them, at random, go through one transformer. Two decoders guess what is hidden: the image, and
its gradient map, which is where the edges of vessels and layers lie,
    loss = mean over hidden patches of |image guess - image|^2 + |edge guess - |grad image||^2.

Cai, Lin, He, Cheng, Tang, "Uni4Eye: Unified 2D and 3D Self-supervised Pre-training via Masked Image Modeling
Transformer for Ophthalmic Image Classification", 2022, section 2.

The gradient is Sobel's. Quirk kept: the tokens of volumes have no positions (the authors' table for them is zero; that
of pictures holds sines and cosines). Sides are padded with zeros to whole patches; in pre-training they must be whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.keymap import KeyMap
from saccade.parts.attention import Attention
from saccade.parts.convolution import CONVOLUTIONS
from saccade.parts.masking import PatchDecoder, Visible
from saccade.parts.pixels import check_ratio, hidden_patches, image_of, patches_of, seen_numbers, whole_patches
from saccade.parts.plain import DEIT, DEIT_SIZES, Plain
from saccade.parts.position import sincos
from saccade.parts.stem import pad_image
from saccade.parts.tokens import join

CARD = Card(
    "Uni4Eye: Unified 2D and 3D Self-supervised Pre-training via Masked Image Modeling Transformer for Ophthalmic "
    "Image Classification",
    authors="Cai, Lin, He, Cheng, Tang",
    year=2022,
    systems=("uni4eye",),
    arxiv="2203.04614",
    code="Davidczy/Uni4Eye_pp@4e984a8",
    licence="unknown",
    read="paper",
    keywords="self-supervised learning, masked image modeling, unified patch embedding, volumes, gradient map, medical",
    kinds=("backbone", "pretraining"),
    methods={"uni4eye": "Uni4Eye"},
    goldens=("uni4eye_encoder_tiny", "op_uni4eye_patch_embed"),
    tests=("tests/papers/test_uni4eye.py",),
)


class UnifiedPatchEmbed(nn.Module):
    """Pictures (B, C, H, W) -> (B, h, w, dim), volumes (B, C, H, W, D) -> (B, h, w, d, dim), each by its projection."""

    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj2, self.proj3 = (CONVOLUTIONS[rank](in_chans, dim, patch, stride=patch) for rank in (2, 3))

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim not in (4, 5):
            raise SaccadeError(f"uni4eye: an input of shape {tuple(image.shape)}; give pictures (B, C, H, W) or "
                               "volumes (B, C, H, W, D)")
        proj = self.proj2 if image.ndim == 4 else self.proj3
        return proj(pad_image(image, self.patch)).movedim(1, -1).contiguous()


class UnifiedTransformer(Plain):
    """A Plain that takes pictures and volumes alike."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        proj: Any = self.stem.proj
        self.stem = UnifiedPatchEmbed(self.in_chans, self.num_features, proj.stride[0])  # type: ignore[assignment]
        self.register_parameter("position", None)

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        x = self.stem(image)
        grid = tuple(x.shape[1:-1])
        if len(grid) == 2:
            x = x + sincos(grid, x.shape[-1], device=x.device).to(x.dtype)
        return join(x, None if self.prefix is None else self.prefix.expand(x.shape[0], -1, -1)), grid


def gradient_map(image: Tensor) -> Tensor:
    """|grad image| (B, C, *size) of pictures and volumes, by Sobel's differences, edges repeated.

    Along an axis (x[i + 1] - x[i - 1]) / 2, smoothed by (1, 2, 1) / 4 along the others.
    """
    rank = image.ndim - 2
    smooth, difference = image.new_tensor([0.25, 0.5, 0.25]), image.new_tensor([-0.5, 0.0, 0.5])
    padded = F.pad(image, [1, 1] * rank, mode="replicate")
    total = torch.zeros_like(image)
    for along in range(rank):
        x = padded
        for axis in range(rank):
            kernel = difference if axis == along else smooth
            x = torch.stack([kernel[i] * x.narrow(axis + 2, i, image.shape[axis + 2]) for i in range(3)]).sum(0)
        total = total + x.square()
    return (total + 1e-12).sqrt()


class Uni4Eye(nn.Module):
    """Pictures (B, C, H, W) or volumes (B, C, H, W, D) -> {"loss", "image", "edges"}.

    `model` is a plain transformer, this paper's or any other; the one here takes both kinds, batch by batch. `ratio` is
    the share of patches hidden; each decoder has `depth` blocks of `dim` channels.
    """

    def __init__(self, model: nn.Module, ratio: float = 0.5, dim: int = 512, depth: int = 8, heads: int = 16) -> None:
        super().__init__()
        self.model, self.ratio = model, check_ratio("uni4eye", ratio)
        self.visible = Visible(model, "uni4eye")
        self.patch, chans = self.visible.patch, self.visible.in_chans
        ranks = (2, 3) if isinstance(model, UnifiedTransformer) else (len(getattr(model, "grid", (0, 0))),)
        self.takes = tuple({2: "pictures", 3: "volumes"}[rank] for rank in ranks)
        self.decoders = nn.ModuleDict({
            what: PatchDecoder(self.visible.dim, dim, depth, heads) for what in ("image", "edges")})
        self.pixels = nn.ModuleDict({
            f"{what}{rank}": nn.Linear(dim, chans * self.patch**rank) for what in self.decoders for rank in ranks})

    def draw(self, image: Tensor) -> Tensor:
        """Which patches are hidden, (B, N) bool: as many in each image."""
        return hidden_patches("uni4eye", image, self.patch, self.ratio).flatten(1)

    def guesses(self, image: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Of the image and of its gradient map, (B, N, C p^n), from what is not hidden."""
        rank = image.ndim - 2
        if f"image{rank}" not in self.pixels:
            raise SaccadeError(f"uni4eye: this host takes no {'volumes' if rank == 3 else 'pictures'}; "
                               "uni4eye_vit_base_patch16 takes both")
        grid = whole_patches("uni4eye", image, self.patch)
        seen = seen_numbers(hidden)
        tokens = self.visible(image, seen)
        return {what: self.pixels[f"{what}{rank}"](decoder(tokens, seen, grid))
                for what, decoder in self.decoders.items()}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        hidden = self.draw(image)
        truth = {"image": image, "edges": gradient_map(image)}
        losses = {what: (guess - patches_of(truth[what], self.patch)).square().mean(-1)[hidden].mean()
                  for what, guess in self.guesses(image, hidden).items()}
        return {"loss": losses["image"] + losses["edges"], **losses}

    def reconstruct(self, image: Tensor, hidden: Tensor | None = None) -> Tensor:
        """The image, its hidden patches (drawn if not given) replaced by what is guessed."""
        hidden = self.draw(image) if hidden is None else hidden
        whole = torch.where(hidden[..., None], self.guesses(image, hidden)["image"], patches_of(image, self.patch))
        return image_of(whole, self.patch, whole_patches("uni4eye", image, self.patch))


SIZES: dict[str, dict[str, Any]] = {
    **{f"uni4eye_vit_{size}_patch16": dict(shape, patch=16) for size, shape in DEIT_SIZES.items()},
    "uni4eye_vit_large_patch16": dict(dim=1024, depth=24, heads=16, patch=16),
    "uni4eye_nano": dict(dim=64, depth=2, heads=2, patch=4, img_size=32),
}


def uni4eye(dim: int, depth: int, heads: int, patch: int, mixer: Any = None, **common: Any) -> UnifiedTransformer:
    """A transformer of a size for pictures and volumes."""
    return UnifiedTransformer(dim, depth, heads, patch=patch, mixer=Attention, replace=mixer, **common)


AUTHORS: KeyMap = ((r"patch_embed\.proj([23])\.(.*)", r"stem.proj\1.\2"), *DEIT)
