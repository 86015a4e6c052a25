"""Salient relevance: which pixels a score came from, and where they gather.

The relevance of the pixels (layer-wise relevance propagation: `parts.relevance`, here with positive weights alone in
linear layers and signed ones in convolutions) is scattered. Looked at as a picture, what stands out in it from its
surroundings at several scales is where the network attends. A patch stands out that is unlike even the K patches most
like it, near ones counting more,
    S_i = 1 - exp(-1/K sum_k d(p_i, q_k)),   d(p, q) = |colours| / (1 + 3 |places|),
taken over scales, and what is near the places of most attention counts with them.

Li, Tian, Mueller, Chen, "Beyond Saliency: Understanding Convolutional Neural Networks from Saliency Prediction on
Layer-wise Relevance Propagation", 2017, section 3; Goferman, Zelnik-Manor, Tal, "Context-Aware Saliency Detection",
2010, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.errors import SaccadeError
from saccade.parts.relevance import relevance

CARD = Card(
    "Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise relevance "
    "propagation",
    authors="Li, Tian, Mueller, Chen",
    year=2017,
    systems=("salient_relevance",),
    arxiv="1712.08268",
    code="Hey1Li/Salient-Relevance-Propagation@65c2835",
    licence="unknown",
    read="paper",
    keywords="layer-wise relevance propagation, context-aware saliency, salient relevance map, attention areas",
    kinds=("explain", "attribution"),
    methods={"salient_relevance": "salient_relevance"},
    goldens=("op_lrp_salient",),
    tests=("tests/papers/test_salient_relevance.py",),
)

PATCH, NEAREST, PLACES = 7, 64, 3.0
SCALES, FOCUS, LONGEST = (1.0, 0.8, 0.5, 0.3), 0.8, 250


def salient_relevance(model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    """Where the relevance of `target` (B,) gathers: (B, H, W) in [0, 1).

    As the paper shows them, the maps are absolute relevance, one a colour, spread to [0, 1].
    """
    heat = relevance(model, image, target, "mixed").abs()
    low, high = (heat.flatten(1).aminmax(dim=1)[which][:, None, None, None] for which in (0, 1))
    return context_saliency((heat - low) / (high - low).clamp(min=1e-12))


@torch.no_grad()
def context_saliency(pictures: Tensor) -> Tensor:
    """What stands out in pictures (B, 3, H, W) in [0, 1]: (B, H, W) in [0, 1).

    Sides are brought to at most 250 pixels and back. Colours are compared in CIE Lab, each axis spread over [0, 1]; a
    patch is not among its own nearest. (Goferman et al., equations 1 to 5.)
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise SaccadeError(f"pictures of shape {tuple(pictures.shape)}: give colours, (B, 3, H, W)")
    height, width = pictures.shape[2:]
    factor = min(1.0, LONGEST / max(height, width))
    small = F.interpolate(lab(pictures), scale_factor=factor, mode="bilinear") if factor < 1 else lab(pictures)
    found = torch.stack([_one(each) for each in small])
    return F.interpolate(found[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]


def _one(picture: Tensor) -> Tensor:
    """(3, H, W) -> (H, W)."""
    sizes = [tuple(max(PATCH, round(side * scale)) for side in picture.shape[1:]) for scale in SCALES]
    patches = [_patches(F.interpolate(picture[None], size, mode="bilinear", align_corners=False)) for size in sizes]
    maps = []
    for number, (colours, places, grid) in enumerate(patches):
        others = patches[number:]  # at this scale and below
        colour = torch.cat([torch.cdist(colours, each) for each, _, _ in others], 1) / colours.shape[1] ** 0.5
        place = torch.cat([torch.cdist(places, each) for _, each, _ in others], 1)
        apart = colour / (1 + PLACES * place)
        own = torch.arange(len(colours), device=apart.device)
        apart[own, own] = torch.inf
        count = min(NEAREST, apart.shape[1] - 1)
        nearest = apart.topk(count, largest=False).values.mean(1) if count else apart.new_zeros(len(apart))
        standing = (1 - (-nearest).exp()).view(1, 1, *grid)
        maps.append(F.interpolate(standing, picture.shape[1:], mode="bilinear", align_corners=False)[0, 0])
    mean = torch.stack(maps).mean(0)
    foci = (mean > FOCUS * mean.amax()).nonzero().to(mean.dtype) if mean.amax() > 0 else mean.new_zeros(0, 2)
    if not len(foci):
        return mean
    pixels = torch.cartesian_prod(*(torch.arange(side, device=mean.device, dtype=mean.dtype) for side in mean.shape))
    distance = torch.cat([torch.cdist(part, foci).amin(1) for part in pixels.split(4096)])
    distance = distance.view(mean.shape) / max(mean.shape)
    return mean * (1 - distance.clamp(max=1))


def _patches(picture: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Patches of (1, 3, H, W) that overlap by half: colours (N, 3 x 49), centres (N, 2) in longer sides, their grid."""
    step = PATCH // 2 + 1
    grid = tuple((side - PATCH) // step + 1 for side in picture.shape[2:])
    colours = F.unfold(picture, PATCH, stride=step)[0].T
    rows, columns = (torch.arange(count, device=picture.device, dtype=picture.dtype) * step for count in grid)
    places = torch.cartesian_prod(rows, columns) / max(picture.shape[2:])
    return colours, places, (grid[0], grid[1])


def lab(pictures: Tensor) -> Tensor:
    """sRGB in [0, 1] as CIE Lab (D65), each axis spread over [0, 1]: L / 100, (a + 128) / 255, (b + 128) / 255."""
    linear = torch.where(pictures > 0.04045, ((pictures + 0.055) / 1.055) ** 2.4, pictures / 12.92)
    to_xyz = linear.new_tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169],
                                [0.019334, 0.119193, 0.950227]])
    white = linear.new_tensor([0.95047, 1.0, 1.08883]).view(1, 3, 1, 1)
    xyz = torch.einsum("kc,bchw->bkhw", to_xyz, linear) / white
    bent = torch.where(xyz > 0.008856, xyz.clamp(min=1e-12) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = bent.unbind(1)
    return torch.stack([(116 * y - 16) / 100, (500 * (x - y) + 128) / 255, (200 * (y - z) + 128) / 255], 1)
