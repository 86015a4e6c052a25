"""From a map to class scores."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from saccade.core.errors import SaccadeError

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.flatten(1, -2).mean(1),
    "max": lambda x: x.flatten(1, -2).amax(1),
    "": lambda x: x,
}


def pool(x: Tensor, how: str) -> Tensor:
    """(B, *grid, C) -> (B, C) by "avg" or "max"; "" leaves the map."""
    return POOLS[how](x)


class Head(nn.Module):
    """fc(norm(pool(x))): (B, *grid, C) -> (B, classes)."""

    def __init__(
        self, dim: int, num_classes: int, global_pool: str = "avg", norm: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        if global_pool not in POOLS:
            raise SaccadeError(f"global_pool={global_pool!r}: choose one of {sorted(POOLS)}")
        self.dim, self.global_pool = dim, global_pool
        self.norm = norm(dim) if norm is not None else nn.Identity()
        self.fc: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(pool(x, self.global_pool)))


def head_on(width: int, dim: int, num_classes: int, global_pool: str = "avg") -> Head:
    """A head on a map projected to `width` channels, whatever the width `dim` of the last stage."""
    return Head(width, num_classes, global_pool)


class LabelledHead(Head):
    """fc(norm(pool(x))) + max over the tokens of fc'(token) / 2: the head of models trained with token labels.

    (Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", 2021.)
    """

    def __init__(
        self, dim: int, num_classes: int, global_pool: str = "avg", norm: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__(dim, num_classes, global_pool, norm)
        if num_classes:
            self.fc.tokens = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        if not isinstance(self.fc, nn.Linear):
            return scores
        return scores + 0.5 * self.fc.tokens(x.flatten(1, -2)).amax(1)  # type: ignore[operator]
