"""GGeM: a generalized mean of the tokens for each group of channels, instead of a class token or their average.

The mean counts crucial and trivial tokens alike. A generalized mean, y = ((1/N) sum_n max(x_n, eps)^p)^(1/p), lies
between it (p = 1) and the maximum; GGeM learns a p for each group of consecutive channels, as a ViT's heads split them:
    y_c = ((1/N) sum_n max(x_{n,c}, eps)^{p_g})^(1/p_g),   g = floor(c / (C / G)).
One group is GeM. Every model of the library takes `global_pool="ggem"` (a group a head, or for 64 channels), "gem",
"max", "avg"; `partial(GeneralizedMean, groups=12, initial=1.0)` says more.

Ko, Kim, Heo, Yun, Chun, Gu, Kim, "Group Generalized Mean Pooling for Vision Transformer", 2022.

Any grid: a mean over its tokens; class tokens are left out.
Quirks kept: what is negative counts as eps, so half of a ViT's signed tokens vanish, with their gradients. Ours, as no
code is published: the norm stands before the pooling, and p starts at GeM's 3.
"""

from __future__ import annotations

from typing import Any

from saccade.core.build import create_model
from saccade.core.card import Card
from saccade.core.features import Backbone
from saccade.core.keymap import KeyMap
from saccade.core.load import key_maps

CARD = Card(
    "Group Generalized Mean Pooling for Vision Transformer",
    authors="Ko, Kim, Heo, Yun, Chun, Gu, Kim",
    year=2022,
    systems=("ggem",),
    arxiv="2212.04114",
    read="paper",
    keywords="global pooling, generalized mean, GeM, GGeM, class token, image retrieval",
    kinds=("backbone", "pooling"),
    tests=("tests/papers/test_ggem.py",),
)

SIZES: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224_ggem": dict(base="vit_base_patch16_224"),
    "vit_large_patch16_224_ggem": dict(base="vit_large_patch16_224"),
    "ggem_nano": dict(base="deit_nano", img_size=32),
}


def ggem(base: str, global_pool: Any = "ggem", **common: Any) -> Backbone:
    """A model whose tokens are pooled in groups: a ViT of the paper, or the registered model `base`."""
    return create_model(base, global_pool=global_pool, **common)


def AUTHORS(name: str) -> KeyMap:
    """ViT's names; the paper's code is not published."""
    return key_maps(SIZES[name]["base"])["authors"]
