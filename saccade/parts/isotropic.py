"""Plain backbones that know no position table, and a block whose two branches share a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saccade.core.site import Site
from saccade.parts.block import Norm, residual_tail
from saccade.parts.mlp import Mlp
from saccade.parts.plain import Plain


class Isotropic(Plain):
    """A Plain without class token and position table: its blocks tell where tokens stand, or nothing does."""

    undecayed = ()

    def __init__(self, dim: int, depth: int, heads: int, *, global_pool: str = "avg", **options: Any) -> None:
        super().__init__(dim, depth, heads, prefix=0, global_pool=global_pool, **options)
        self.register_parameter("position", None)

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The sequence (B, N, C) that enters the first block, and its grid."""
        x = self.stem(image)
        return x.flatten(1, -2), tuple(x.shape[1:-1])


class OneNormBlock(nn.Module):
    """x += tail(mixer(norm(x))); x += tail(mlp(norm(x))), both with the same norm, on sequences (B, N, C).

    Without an `mlp` the mixer's branch is all.
    """

    def __init__(
        self,
        site: Site,
        mixer: nn.Module,
        *,
        drop_path: float = 0.0,
        norm: Norm = nn.LayerNorm,
        mlp: Callable[[int], nn.Module] | None = Mlp,
    ) -> None:
        super().__init__()
        self.site = site
        self.norm = norm(site.dim)
        self.mixer = mixer
        self.mlp = mlp(site.dim) if mlp is not None else None
        self.tail = residual_tail(site.dim, None, drop_path)

    def forward(self, tokens: Tensor, count: int, grid: tuple[int, ...]) -> Tensor:
        """`count`, the number of prefix tokens, is 0 in an Isotropic."""
        tokens = tokens + self.tail(self.mixer(self.norm(tokens).unflatten(1, grid)).flatten(1, -2))
        return tokens if self.mlp is None else tokens + self.tail(self.mlp(self.norm(tokens)))
