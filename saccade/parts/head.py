"""From a map to class scores."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError

# A pooling said by the caller: a name, or what builds one for a number of channels.
Pooling = str | Callable[[int], nn.Module]

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.flatten(1, -2).mean(1),
    "max": lambda x: x.flatten(1, -2).amax(1),
    "": lambda x: x,
}


def pool(x: Tensor, how: str) -> Tensor:
    """(B, *grid, C) -> (B, C) by "avg" or "max"; "" leaves the map."""
    return POOLS[how](x)


class Pool(nn.Module):
    """A pooling without parameters, by its name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return pool(x, self.how)

    def extra_repr(self) -> str:
        return repr(self.how)


class GeneralizedMean(nn.Module):
    """(mean over the grid of max(x, eps)^p)^(1/p), a learned p for each group of channels: (B, *grid, C) -> (B, C).

    p = 1 is the mean and p -> infinity the maximum of what is positive. `groups` are pieces of consecutive channels, as
    heads are; one group is GeM. Powers are taken by logarithms, in float32 at least, so that none overflows.
    (Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018, section 3.2; Ko et al., "Group
    Generalized Mean Pooling for Vision Transformer", 2022.)
    """

    undecayed = ("power",)

    def __init__(self, dim: int, groups: int = 1, initial: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise SaccadeError(f"{groups} groups do not divide {dim} channels; choose a divisor")
        self.eps = eps
        self.power = nn.Parameter(torch.full((groups,), float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        precise = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        power = self.power.to(precise.dtype).clamp(min=1e-3).repeat_interleave(x.shape[-1] // len(self.power))
        logs = power * precise.flatten(1, -2).clamp(min=self.eps).log()
        top = logs.detach().amax(1)
        return (((logs - top[:, None]).exp().mean(1).log() + top) / power).exp().to(x.dtype)


def pooling(how: Pooling, dim: int, heads: int | None = None) -> nn.Module:
    """The pooling (B, *grid, C) -> (B, C) called `how`: "avg", "max", "gem", "ggem", "" (none), or `how(dim)`.

    "ggem" has a group for each of `heads`, or for 64 channels (where they do not divide, for the divisor they share).
    """
    if not isinstance(how, str):
        return how(dim)
    if how == "gem":
        return GeneralizedMean(dim)
    if how == "ggem":
        return GeneralizedMean(dim, heads if heads is not None and dim % heads == 0 else dim // gcd(dim, 64))
    if how not in POOLS:
        raise SaccadeError(f"global_pool={how!r}: choose one of {sorted((*POOLS, 'gem', 'ggem'))}, or give a callable "
                           "dim -> Module")
    return Pool(how)


def grid_pooling(how: Pooling, dim: int, heads: int | None = None) -> nn.Module | None:
    """`pooling` beside a class token: None where `how` is "token", or "" (every token goes on)."""
    return None if how in ("token", "") else pooling(how, dim, heads)


def pool_tokens(tokens: Tensor, how: Pooling, prefix: int, module: nn.Module | None) -> Tensor:
    """(B, P + N, C) -> (B, C): the class token or the pooled grid tokens; all tokens where `how` is ""."""
    if module is not None:
        return module(tokens[:, prefix:])
    return tokens[:, 0] if how == "token" else tokens


class Head(nn.Module):
    """fc(norm(pool(x))): (B, *grid, C) -> (B, classes)."""

    def __init__(
        self, dim: int, num_classes: int, global_pool: Pooling = "avg", norm: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.dim, self.global_pool = dim, global_pool
        self.pool = pooling(global_pool, dim)
        self.norm = norm(dim) if norm is not None else nn.Identity()
        self.fc: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.pool(x)))


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
