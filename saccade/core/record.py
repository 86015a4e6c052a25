"""Watching the weights with which tokens look at tokens, without slowing the forward that nobody watches.

    with record(model) as r:
        model(image)
    r["stages.1.blocks.0.mixer"].dense()      # (B, heads, tokens, tokens)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.names import closest, match_modules

Where = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Part:
    """One softmax: weights (B*G, heads, Nq, Nk), and the token numbers (G or B*G, N) of its rows and columns."""

    weights: Tensor
    query: Tensor | None
    key: Tensor | None


@dataclass
class Affinity:
    """All weights that one module computed in a forward, whatever windows, tiles or regions it computed them in.

    Tokens are numbered prefix first, then the grid in row-major order; -1 stands for padding.
    """

    parts: list[Part] = field(default_factory=list)

    @property
    def placed(self) -> bool:
        """Whether every weight is known to stand between two numbered tokens (channel attention's are not)."""
        return all(part.query is not None for part in self.parts)

    def dense(self, batch: int = 1) -> Tensor:
        """The map A of shape (B, heads, T, T): A[b, h, i, j] is the weight with which token i looks at token j.

        `batch` is the number of images of the forward (each part's leading axis is batch x groups). A pair seen in
        several parts (the two passes of a decomposed attention) gets the sum.
        """
        if not self.parts or not self.placed:
            raise SaccadeError("these weights do not stand between numbered tokens; read .parts instead")
        tokens = 1 + max(int(ids.max()) for part in self.parts for ids in (part.query, part.key) if ids is not None)
        out = torch.zeros(batch, self.parts[0].weights.shape[1], tokens * tokens + 1, dtype=self.parts[0].weights.dtype,
                          device=self.parts[0].weights.device)
        for part in self.parts:
            heads = part.weights.shape[1]
            weights = part.weights.unflatten(0, (batch, -1)).transpose(1, 2)  # (B, heads, G, Nq, Nk)
            groups = weights.shape[2]
            query, key = (self._by_image(ids, batch, groups) for ids in (part.query, part.key))
            cell = query[..., :, None] * tokens + key[..., None, :]
            cell = torch.where((query[..., :, None] < 0) | (key[..., None, :] < 0), tokens * tokens, cell)
            cell = cell[:, None].expand(batch, heads, *cell.shape[1:])
            out.scatter_add_(2, cell.flatten(2), weights.flatten(2))
        return out[..., :-1].unflatten(-1, (tokens, tokens))

    @staticmethod
    def _by_image(ids: Tensor | None, batch: int, groups: int) -> Tensor:
        assert ids is not None
        if ids.shape[0] == groups:
            return ids.expand(batch, *ids.shape)
        return ids.unflatten(0, (batch, groups))


class Recording:
    """What `record` gives: the affinity of each module that computed one, by the module's name."""

    def __init__(self) -> None:
        self.affinities: dict[str, Affinity] = {}
        self._running: list[str] = []

    def keys(self) -> list[str]:
        return list(self.affinities)

    def __contains__(self, name: str) -> bool:
        return any(key == name or key.startswith(f"{name}.") for key in self.affinities)

    def __getitem__(self, name: str) -> Affinity:
        parts = [part for key, found in self.affinities.items() if key == name or key.startswith(f"{name}.")
                 for part in found.parts]
        if not parts:
            raise SaccadeError(f"nothing was recorded for {name!r}{closest(name, self.affinities)}")
        return Affinity(parts)

    def add(self, weights: Tensor, where: Where | None) -> None:
        if not self._running:
            return  # a module that the pattern left out
        query, key = where() if where is not None else (None, None)
        part = Part(weights.detach(), query, key)
        self.affinities.setdefault(self._running[-1], Affinity()).parts.append(part)


_recordings: list[Recording] = []


def recording() -> bool:
    """Whether somebody watches. The only cost of `record` where nobody does."""
    return bool(_recordings)


def note(weights: Tensor, where: Where | None = None) -> None:
    """Hand weights that did not come from `attend` (routing scores, gates) to whoever watches."""
    for watcher in _recordings:
        watcher.add(weights, where)


@contextmanager
def record(model: nn.Module, layers: str = "*") -> Iterator[Recording]:
    """Record the weights of the modules of `model` that the pattern `layers` names, in forwards inside the block."""
    result = Recording()

    def enter(name: str) -> Callable[..., None]:
        return lambda module, inputs: result._running.append(name)

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        result._running.pop()

    handles = []
    for name in match_modules(model, layers):
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    _recordings.append(result)
    try:
        yield result
    finally:
        _recordings.remove(result)
        for handle in handles:
            handle.remove()
