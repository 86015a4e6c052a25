"""RveRNet: one network sees the region of interest alone, another all but it, and a small one decides.

A promptable segmenter gives the mask m of the object; both networks keep their own classifier, and their scores meet,
    o = [roi(m x); surroundings((1 - m) x)],   out = log_softmax(W2 relu(W1 o)).
The best pair are DeiTs distilled from a convolutional network.

Jin, "Knowledge distillation to effectively attain both region-of-interest and global semantics
from an image where multiple objects appear", 2024.

Any size that both networks take. Quirks: pictures are not normalised; of a distilled DeiT the class token alone speaks,
in evaluation too; the published training flips the two pictures of a pair independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.build import create_model
from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone
from saccade.core.keymap import KeyMap, within, without_first_axis
from saccade.parts.mobilenet import torchvision_names

CARD = Card(
    "Knowledge distillation to effectively attain both region-of-interest and global semantics from an image where "
    "multiple objects appear",
    authors="Jin",
    year=2024,
    systems=("rvernet",),
    arxiv="2407.08257",
    code="Seonwhee-Genome/RveRNet@1a1238a",
    read="fact sheet, golden",
    keywords="region of interest, surroundings, segment anything, distilled DeiT, two-branch classification, food",
    kinds=("classification",),
    goldens=("rvernet_mnet_mnet",),
    tests=("tests/papers/test_rvernet.py",),
)
GREY = 125 / 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RveRNet(nn.Module):
    """Two classifiers, ours or anybody's, under a head of two layers: images (B, C, *size) -> log p (B, classes)."""

    def __init__(
        self, roi: nn.Module, surroundings: nn.Module, num_classes: int, outputs: Sequence[int] = (1000, 1000),
        hidden: int = 640,
    ) -> None:
        super().__init__()
        self.roi, self.surroundings = roi, surroundings
        self.fc1, self.fc2 = nn.Linear(sum(outputs), hidden), nn.Linear(hidden, num_classes)

    def forward(self, roi: Tensor, surroundings: Tensor) -> Tensor:
        joined = torch.cat([scores(self.roi, roi), scores(self.surroundings, surroundings)], 1)
        return self.fc2(self.fc1(joined).relu()).log_softmax(1)


def scores(model: nn.Module, image: Tensor) -> Tensor:
    """Class scores (B, classes) of ours (the class token's alone), of torchvision's, timm's or transformers'."""
    if isinstance(model, Backbone):
        found: Tensor = model.forward_head(model.forward_features(image))  # type: ignore[operator]
        return found
    out = model(image)
    return getattr(out, "logits", out)


def rvernet(
    roi: str = "deit_base_distilled_patch16_224", surroundings: str = "deit_base_distilled_patch16_224",
    num_classes: int = 103, hidden: int = 640, **options: Any,
) -> RveRNet:
    """A RveRNet of two models by name; `options` go to both (`img_size`, `pretrained`, ...)."""
    return RveRNet(create_model(roi, **options), create_model(surroundings, **options), num_classes, hidden=hidden)


def parted(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The object on black, and the picture with the object black: image (B, C, H, W), mask (B, H, W) of bools."""
    if mask.shape != image.shape[:1] + image.shape[2:]:
        raise SaccadeError(f"a mask {tuple(mask.shape)} for pictures {tuple(image.shape)}: give (B, H, W), same size")
    inside = mask[:, None].bool()
    return image.masked_fill(~inside, 0.0), image.masked_fill(inside, 0.0)


@torch.no_grad()
def segment(
    segmenter: Any, image: Tensor, points: Tensor | None = None, boxes: Tensor | None = None
) -> Tensor:
    """The masks (B, H, W) of bools that a promptable segmenter (transformers' `SamModel`) is surest of.

    image (B, 3, H, W) between 0 and 1; points (B, N, 2) that lie on the object or boxes (B, 4), as x, y in pixels. The
    longer side becomes the segmenter's, the rest is padded with zeros, as its own processor does.
    """
    if (points is None) == (boxes is None):
        raise SaccadeError("a segmenter needs to be told the object: give points (B, N, 2) or boxes (B, 4), not both")
    height, width = image.shape[2:]
    side = segmenter.config.vision_config.image_size
    scale = side / max(height, width)
    inner = (round(height * scale), round(width * scale))
    sized = F.interpolate(image, inner, mode="bilinear", antialias=True, align_corners=False)
    normal = (sized - sized.new_tensor(MEAN).view(3, 1, 1)) / sized.new_tensor(STD).view(3, 1, 1)
    prompt: dict[str, Tensor] = {}
    if points is not None:
        prompt["input_points"] = (points * scale)[:, None].to(image.dtype)
    if boxes is not None:
        prompt["input_boxes"] = (boxes * scale)[:, None].to(image.dtype)
    out = segmenter(pixel_values=F.pad(normal, (0, side - inner[1], 0, side - inner[0])), **prompt)
    surest = out.iou_scores[:, 0].argmax(1)
    mask = out.pred_masks[torch.arange(len(image)), 0, surest][:, None]
    mask = F.interpolate(mask, (side, side), mode="bilinear", align_corners=False)[..., :inner[0], :inner[1]]
    return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)[:, 0] > 0


def squared(image: Tensor, side: int = 224, fill: float = GREY) -> Tensor:
    """(B, C, H, W) with its longer side resized to `side`, the shorter padded to it; an odd pixel goes left or top."""
    height, width = image.shape[2:]
    longest = max(height, width)
    inner = [max(1, size * side // longest) for size in (height, width)]
    sized = F.interpolate(image, inner, mode="bilinear", antialias=True, align_corners=False)
    below, right = ((side - size) // 2 for size in inner)
    return F.pad(sized, (side - inner[1] - right, right, side - inner[0] - below, below), value=fill)


def permuted(image: Tensor, patch: int = 16, generator: torch.Generator | None = None) -> Tensor:
    """The probe of permutation: patches in random places, (B, C, H, W) padded with black to whole patches."""
    image = F.pad(image, (0, -image.shape[3] % patch, 0, -image.shape[2] % patch))
    rows, columns = image.shape[2] // patch, image.shape[3] // patch
    patches = image.unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).transpose(3, 4).flatten(2, 3)
    patches = patches[:, :, torch.randperm(rows * columns, generator=generator).to(image.device)]
    return patches.unflatten(2, (rows, columns)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def translocated(image: Tensor, right: int = 60, down: int = -85, fill: float = GREY) -> Tensor:
    """The probe of translocation: (B, C, H, W) shifted, what comes in filled with grey."""
    return F.pad(image, (right, -right, down, -down), value=fill)


# torchvision's names of the networks that may stand on a side.
VIT: KeyMap = (
    (r"class_token", "prefix", without_first_axis),
    (r"conv_proj\.(.*)", r"stem.proj.\1"),
    (r"encoder\.pos_embedding", "position"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(.*)", r"blocks.\1.mixer.qkv.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(.*)", r"blocks.\1.mixer.proj.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.ln\.(.*)", r"norm.\1"),
    (r"heads\.head\.(.*)", r"head.\1"),
)
SIDES: dict[str, KeyMap] = {
    "mobilenet_v2": (*torchvision_names(), (r"classifier\.1\.(.*)", r"head.fc.\1")),
    "vit_base_patch16_224": VIT,
}


def authors_names(roi: str, surroundings: str) -> KeyMap:
    """The authors' names where these models stand on the sides; those not in SIDES keep their own."""
    return (
        *within(SIDES.get(roi, ((r"(.*)", r"\1"),)), r"roi_module\.", "roi."),
        *within(SIDES.get(surroundings, ((r"(.*)", r"\1"),)), r"extra_roi_module\.", "surroundings."),
        (r"integrated_(fc[12]\..*)", r"\1"),
    )
