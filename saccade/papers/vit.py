"""ViT and DeiT: an image is worth 16x16 words.

Cut the image into patches, embed each linearly, put a class token before them, add a learned position, and run a plain
transformer: x_{l+1} = x_l + Attention(norm(x_l)) ; x += Mlp(norm(x)). The class token's last state is classified. DeiT
is the same network trained on ImageNet-1K alone; its distilled form has a second prefix token that learns from a
teacher, with a head of its own: the scores of the two heads are averaged.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", 2021.
Touvron et al., "Training data-efficient image transformers & distillation through attention", 2021.

Another image size: the position table is resampled (bicubic). Images that are no multiple of the patch are zero-padded
at their end.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.core.card import HALF, Card, Weights
from saccade.core.keymap import KeyMap, without_first_axis
from saccade.parts.attention import Attention
from saccade.parts.head import Pooling
from saccade.parts.plain import DEIT, Plain

_ADDRESS = "https://dl.fbaipublicfiles.com/deit/"

CARD = Card(
    "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale (and DeiT)",
    authors="Dosovitskiy et al.; Touvron et al.",
    year=2021,
    arxiv="2010.11929, 2012.12877",
    code="facebookresearch/deit",
    licence="Apache-2.0",
    weights_licence="Apache-2.0",
    read="paper, code",
    keywords="plain vision transformer, global multi-head self-attention, class token, distillation token",
    kinds=("backbone", "mixer"),
    mixers={"attention": "Attention"},
    params={"deit_tiny_patch16_224": 5.7e6, "deit_small_patch16_224": 22.1e6, "deit_base_patch16_224": 86.6e6,
            "deit_tiny_distilled_patch16_224": 6e6, "deit_small_distilled_patch16_224": 22e6,
            "deit_base_distilled_patch16_224": 87e6, "deit_base_patch16_384": 87e6,
            "deit_base_distilled_patch16_384": 88e6, "vit_base_patch16_224": 86e6, "vit_large_patch16_224": 307e6,
            "vit_huge_patch14_224": 632e6},
    macs={"deit_tiny_patch16_224": 1.26e9, "deit_small_patch16_224": 4.6e9, "deit_base_patch16_224": 17.6e9},
    # ViTs were trained on ImageNet-21K first.
    top1={"deit_tiny_patch16_224": 72.2, "deit_small_patch16_224": 79.9, "deit_base_patch16_224": 81.8,
          "deit_tiny_distilled_patch16_224": 74.5, "deit_small_distilled_patch16_224": 81.2,
          "deit_base_distilled_patch16_224": 83.4, "deit_base_patch16_384": 82.9,
          "deit_base_distilled_patch16_384": 85.2, "vit_base_patch16_224": 81.2, "vit_large_patch16_224": 82.7,
          "vit_base_patch16_384": 84.6, "vit_base_patch32_384": 81.8, "vit_large_patch16_384": 85.1,
          "vit_large_patch32_384": 81.8},
    aliases={"deit_tiny": "deit_tiny_patch16_224", "deit_small": "deit_small_patch16_224",
             "deit_base": "deit_base_patch16_224"},
    weights={
        name: Weights(f"{_ADDRESS}{name}-{check}.pth", check, licence="Apache-2.0")
        for name, check in {
            "deit_tiny_patch16_224": "a1311bcf",
            "deit_small_patch16_224": "cd65a155",
            "deit_base_patch16_224": "b5f2ef4d",
            "deit_tiny_distilled_patch16_224": "b40b3cf7",
            "deit_small_distilled_patch16_224": "649709d9",
            "deit_base_distilled_patch16_224": "df68dfff",
            "deit_base_patch16_384": "8de9b5d1",
            "deit_base_distilled_patch16_384": "d0272ac0",
        }.items()
    } | {
        name: Weights(f"timm:{name}.{tag}_in21k_ft_in1k", data="ImageNet-21K, ImageNet-1K", mean=HALF, std=HALF,
                      crop=1.0 if name.endswith("384") else 0.9, top1=top1, licence="Apache-2.0")
        for name, tag, top1 in (
            ("vit_tiny_patch16_224", "augreg", 75.5), ("vit_tiny_patch16_384", "augreg", 78.4),
            ("vit_small_patch16_224", "augreg", 81.4), ("vit_small_patch16_384", "augreg", 83.8),
            ("vit_small_patch32_224", "augreg", 76.0), ("vit_small_patch32_384", "augreg", 80.5),
            ("vit_base_patch16_224", "augreg2", 85.1), ("vit_base_patch16_384", "augreg", 86.0),
            ("vit_base_patch32_224", "augreg", 80.7), ("vit_base_patch32_384", "augreg", 83.4),
            ("vit_large_patch16_224", "augreg", 85.9), ("vit_large_patch16_384", "augreg", 87.1),
            ("vit_large_patch32_384", "orig", 81.5),
        )
    },
    tests=("tests/papers/test_vit.py",),
)


class Distilled(Plain):
    """DeiT with a distillation token: the class token's and the distillation token's scores, averaged at evaluation.

    In training, the pair (class scores, distillation scores) is returned as a dict.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, prefix=2, **options)

    def reset_classifier(self, num_classes: int, global_pool: Pooling | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_distilled = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.removed = () if num_classes else ("head", "head_distilled")

    def forward(self, image: Tensor) -> Any:
        tokens = self.forward_features(image)
        if self.global_pool != "token" or not self.num_classes:
            return self.forward_head(tokens)
        scores, distilled = self.head(tokens[:, 0]), self.head_distilled(tokens[:, 1])
        if self.training:
            return {"scores": scores, "distilled": distilled}
        return (scores + distilled) / 2


def _sizes() -> dict[str, dict[str, Any]]:
    widths = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
    table: dict[str, dict[str, Any]] = {}
    for size, (dim, depth, heads) in widths.items():
        shape = dict(dim=dim, depth=depth, heads=heads)
        for patch in (16, 32):
            for side in (224, 384):
                table[f"vit_{size}_patch{patch}_{side}"] = dict(shape, patch=patch, img_size=side)
        if size != "large":
            table[f"deit_{size}_patch16_224"] = dict(shape, patch=16)
            table[f"deit_{size}_distilled_patch16_224"] = dict(shape, patch=16, builder="deit_distilled")
    base = dict(dim=768, depth=12, heads=12, patch=16, img_size=384)
    return table | {
        "deit_base_patch16_384": base,
        "deit_base_distilled_patch16_384": dict(base, builder="deit_distilled"),
        "vit_huge_patch14_224": dict(dim=1280, depth=32, heads=16, patch=14),
        "deit_nano": dict(dim=64, depth=6, heads=2, patch=4, img_size=32),
    }


SIZES = _sizes()


def vit(dim: int, depth: int, heads: int, patch: int, mixer: Any = None, **common: Any) -> Plain:
    """A ViT/DeiT of a size; the names are timm's."""
    return Plain(dim, depth, heads, patch=patch, mixer=Attention, replace=mixer, **common)


def deit_distilled(dim: int, depth: int, heads: int, patch: int, mixer: Any = None, **common: Any) -> Distilled:
    """A DeiT with the distillation token."""
    return Distilled(dim, depth, heads, patch=patch, mixer=Attention, replace=mixer, **common)


AUTHORS: KeyMap = (
    (r"dist_token", "prefix#1", without_first_axis),
    (r"head_dist\.(.*)", r"head_distilled.\1"),
    *DEIT,
)
