"""The residual block that carries every mixer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.site import Site
from saccade.parts.mlp import Mlp

Norm = Callable[[int], nn.Module]
LAYER_NORM: Norm = partial(nn.LayerNorm, eps=1e-6)


class Scale(nn.Module):
    """Layer scale: a learned factor a channel (Touvron et al., "Going deeper with Image Transformers", 2021, eq. 4)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Affine(nn.Module):
    """x weight + bias, an entry a channel: layer scale with a bias."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), float(initial)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias

    @classmethod
    def where(cls, dim: int, initial: float | None) -> nn.Module:
        """One, or nothing where `initial` is None."""
        return nn.Identity() if initial is None else cls(dim, initial)


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the branch of an image with probability `rate` and rescales the others.

    (Huang et al., "Deep Networks with Stochastic Depth", 2016.)
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def residual_tail(dim: int, layer_scale: float | None, drop_path: float) -> nn.Module:
    """What stands between a branch and its sum: layer scale and drop path, where a paper has them."""
    tail = [Scale(dim, layer_scale)] if layer_scale is not None else []
    return nn.Sequential(*tail, *([DropPath(drop_path)] if drop_path else [])) if tail or drop_path else nn.Identity()


class Block(nn.Module):
    """x += position(x); x += tail(mixer(norm(x))); x += tail(mlp(norm(x))), on grids (B, *grid, C).

    `position` (a convolutional position term), layer scale and drop path stand only where a paper has them.
    """

    def __init__(
        self,
        site: Site,
        mixer: nn.Module,
        *,
        drop_path: float = 0.0,
        norm: Norm = LAYER_NORM,
        mlp: Callable[[int], nn.Module] = Mlp,
        layer_scale: float | None = None,
        position: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.site = site
        self.position = position
        self.norm1 = norm(site.dim)
        self.mixer = mixer
        self.scale1 = residual_tail(site.dim, layer_scale, drop_path)
        self.norm2 = norm(site.dim)
        self.mlp = mlp(site.dim)
        self.scale2 = residual_tail(site.dim, layer_scale, drop_path)

    def forward(self, x: Tensor, **optional: Any) -> Tensor:
        if self.position is not None:
            x = x + self.position(x)
        x = x + self.scale1(self.mixer(self.norm1(x), **optional))
        return x + self.scale2(self.mlp(self.norm2(x)))


class SingleBlock(nn.Module):
    """x += tail(mlp(norm(mixer(x)))): one residual branch for both kinds of mixing, on grids (B, *grid, C).

    (Liu et al., "A ConvNet for the 2020s", 2022, figure 4; Yu et al. name it MetaNeXt.)
    """

    def __init__(
        self,
        site: Site,
        mixer: nn.Module,
        *,
        drop_path: float = 0.0,
        norm: Norm = LAYER_NORM,
        mlp: Callable[[int], nn.Module] = Mlp,
        layer_scale: float | None = 1e-6,
    ) -> None:
        super().__init__()
        self.site = site
        self.mixer = mixer
        self.norm = norm(site.dim)
        self.mlp = mlp(site.dim)
        self.scale = residual_tail(site.dim, layer_scale, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.mlp(self.norm(self.mixer(x))))
