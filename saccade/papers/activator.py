"""Activator: gated linear units, and nothing that moves between tokens.

The attention of a transformer is replaced by a gated unit on each token alone,
    out = (norm(gelu(x W1)) * norm(x W2)) W3,
followed by the usual feed-forward network, or, in the `only_geglu` form, by nothing. Tokens meet in the patches of the
stem and in the mean before the classifier only.

Abdullah and Aydin, "Activator: GLU Activations as The Core Functions of a Vision Transformer", 2024, section 3.

Any grid: nothing is bound to a size.
Quirks kept: one norm (the same parameters) for both factors of the unit; another one before the unit and before the
feed-forward network; no position, no final norm, the mean is classified.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.keymap import KeyMap, within
from saccade.core.site import Site
from saccade.core.template import Template
from saccade.parts.isotropic import Isotropic, OneNormBlock
from saccade.parts.mlp import Mlp

CARD = Card(
    "Activator: GLU Activations as The Core Functions of a Vision Transformer",
    authors="Abdullah, Aydin",
    year=2024,
    systems=("activator",),
    arxiv="2405.15953",
    code="Abdullah-88/Activator@631c38a",
    licence="BSD-3-Clause",
    read="paper, code",
    keywords="gated linear unit, GEGLU, attention-free, no token mixing",
    kinds=("backbone", "mixer"),
    mixers={"activator_gating": "ActivatorGating"},
    goldens=("activator_cifar10", "activator_only_geglu_cifar10", "op_activator_gating_unit"),
    tests=("tests/papers/test_activator.py",),
)


class ActivatorGating(nn.Module):
    """out = (norm(gelu(x W1)) * norm(x W2)) W3 of each token and prefix token: (B, *grid, C) -> (B, *grid, C).

    The hidden width is `ratio` C.
    """

    ranks, prefix = (1, 2, 3), True
    template = Template("none: a token by itself", "layer norm of both factors", "gated product W3(gelu(W1 x) W2 x)")

    def __init__(self, site: Site, ratio: float = 2.0) -> None:
        super().__init__()
        hidden = int(site.dim * ratio)
        self.gate = nn.Linear(site.dim, hidden)
        self.value = nn.Linear(site.dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.proj = nn.Linear(hidden, site.dim)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Any:
        out = self.proj(self.norm(F.gelu(self.gate(x))) * self.norm(self.value(x)))
        return out if prefix is None else (out, self(prefix))

    def cost(self, site: Site, grid: tuple[int, ...], prefix: int = 0) -> int:
        """Multiply-adds of N tokens: 3 ratio N C^2."""
        return 3 * (prod(grid) + prefix) * site.dim * self.gate.out_features

    def reach(self, site: Site) -> tuple[int, ...]:
        """A token sees itself."""
        return (0,) * site.rank


_CIFAR: dict[str, Any] = dict(dim=256, depth=4, patch=4, img_size=32, num_classes=10)
SIZES: dict[str, dict[str, Any]] = {
    "activator_cifar10": _CIFAR,
    "activator_only_geglu_cifar10": _CIFAR | dict(feed_forward=False),
    "activator_nano": dict(dim=64, depth=2, patch=4, img_size=32),
    "activator_only_geglu_nano": dict(dim=64, depth=2, patch=4, img_size=32, feed_forward=False),
}


def activator(
    dim: int,
    depth: int,
    patch: int,
    ratio: float = 2.0,
    feed_forward: bool = True,
    mixer: Any = None,
    **common: Any,
) -> Isotropic:
    """An Activator; `ratio` is the hidden width of its units and, where it has them, feed-forward networks."""
    mlp = partial(Mlp, ratio=ratio) if feed_forward else None

    def block(site: Site, built: nn.Module, drop_path: float, **_: Any) -> OneNormBlock:
        return OneNormBlock(site, built, drop_path=drop_path, mlp=mlp)

    return Isotropic(dim, depth, max(dim // 32, 1), patch=patch, mixer=partial(ActivatorGating, ratio=ratio),
                     block=block, norm=nn.Identity, replace=mixer, **common)


MIXER: KeyMap = ((r"proj_1\.(.*)", r"gate.\1"), (r"proj_2\.(.*)", r"value.\1"), (r"proj_3\.(.*)", r"proj.\1"),
                 (r"norm\.(.*)", r"norm.\1"))
AUTHORS: KeyMap = (
    *within(MIXER, r"model\.(\d+)\.actgu\.", r"blocks.\1.mixer."),
    (r"model\.(\d+)\.ffn\.net\.0\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"model\.(\d+)\.ffn\.net\.3\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"model\.(\d+)\.(.*)", r"blocks.\1.\2"),
    (r"patcher\.(.*)", r"stem.proj.\1"),
    (r"classifier\.(.*)", r"head.\1"),
)
TAPS = {r"block(\d+)": r"blocks.\1"}
