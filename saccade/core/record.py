"""Watching the weights with which tokens look at tokens, without slowing the forward that nobody watches.

    with record(model) as r:
        model(image)
    r["stages.1.blocks.0.mixer"].dense()      # (B, heads, tokens, tokens)

Modules that are not ours are watched too, by what they call of PyTorch: scaled_dot_product_attention, the attention of
nn.MultiheadAttention, a softmax of four axes. Their tokens are numbered where they attend to all tokens of the image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade.core.errors import SaccadeError
from saccade.core.names import closest, match_modules

Where = Callable[[], tuple[Tensor, Tensor]]
Change = Callable[[str, Tensor], Tensor]  # a module's name and its weights -> the weights to go on with


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


@dataclass(frozen=True)
class _Frame:
    """A module that is running: its name (None where the pattern left it out) and the shape of its first tensor."""

    name: str | None
    module: nn.Module
    shape: tuple[int, ...]

    def tokens(self) -> tuple[int, ...]:
        """How many tokens an image of (B, N, C), (B, H, W, C) or (B, C, H, W) can have."""
        if len(self.shape) == 3:
            return (self.shape[1],)
        return (self.shape[1] * self.shape[2], self.shape[2] * self.shape[3]) if len(self.shape) == 4 else ()


class Recording:
    """What `record` gives: the affinity of each module that computed one, by the module's name."""

    def __init__(self, attached: bool = False, change: Change | None = None) -> None:
        self.affinities: dict[str, Affinity] = {}
        self.attached, self.change = attached, change
        self._running: list[_Frame] = []

    @property
    def decides(self) -> bool:
        """Whether outputs have to come through the weights that are kept."""
        return self.attached or self.change is not None

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

    def add(self, weights: Tensor, where: Where | None) -> Tensor:
        """Keep the weights; what stands for them in the forward."""
        named = [frame.name for frame in self._running if not isinstance(frame.module, nn.Softmax)]
        if not named or named[-1] is None:
            return weights  # a module that the pattern left out
        query, key = where() if where is not None else (None, None)
        weights = weights if self.change is None else self.change(named[-1], weights)
        part = Part(weights if self.attached else weights.detach(), query, key)
        self.affinities.setdefault(named[-1], Affinity()).parts.append(part)
        return weights

    def add_foreign(self, weights: Tensor) -> Tensor:
        """Weights (B', heads, Nq, Nk) that PyTorch computed; those of our own code are noted by `attend`."""
        if weights.ndim != 4 or _ours_calls():
            return weights
        count, tokens = weights.shape[-2:]
        batch = next((frame.shape[0] for frame in self._running if frame.shape), None)
        whole = count == tokens and weights.shape[0] == batch and any(count in one.tokens() for one in self._running)
        numbers = torch.arange(count, device=weights.device)[None]
        return self.add(weights, (lambda: (numbers, numbers)) if whole else None)


def _ours_calls() -> bool:
    """Whether our own code, and nobody's beside PyTorch's between, calls what is running."""
    frame, name = inspect.currentframe(), __name__
    while frame is not None and (name == __name__ or name.startswith("torch.")):
        frame = frame.f_back
        name = frame.f_globals.get("__name__", "") if frame is not None else ""
    return name.startswith(OWN)


OWN = ("saccade.ops.", "saccade.parts.", "saccade.papers.")


class _Foreign(TorchFunctionMode):
    """Sees the attention that modules of others compute, and changes nothing of its numbers."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.multi_head_attention_forward:  # the fused form inside is out of sight here
            asked = inspect.signature(func).bind(*args, **kwargs).arguments
            out, weights = func(**asked | {"need_weights": True, "average_attn_weights": False})
            assert weights is not None
            weights = self.recording.add_foreign(weights)
            if self.recording.decides:
                out = _mixed(weights, asked)
            mean = asked.get("average_attn_weights", True)
            return out, (weights.mean(-3) if mean else weights) if asked.get("need_weights", True) else None
        if func is F.scaled_dot_product_attention:
            weights = _weights(*args, **kwargs)
            weights = self.recording.add_foreign(weights)
            if self.recording.decides and not kwargs.get("enable_gqa"):  # what comes of them has to come through them
                return weights @ (kwargs["value"] if "value" in kwargs else args[2])
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4 and kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, 3):
            out = self.recording.add_foreign(out)
        return out


def _mixed(weights: Tensor, asked: Mapping[str, Any]) -> Tensor:
    """The output (L, B, C) of multi_head_attention_forward, as it comes of the weights (B, heads, L, S)."""
    rows = slice(2 * asked["embed_dim_to_check"], None)
    bias = asked["in_proj_bias"]
    v = F.linear(asked["value"], asked["in_proj_weight"][rows], None if bias is None else bias[rows])
    mixed = weights @ v.unflatten(-1, (asked["num_heads"], -1)).permute(1, 2, 0, 3)
    return F.linear(mixed.permute(2, 0, 1, 3).flatten(2), asked["out_proj_weight"], asked["out_proj_bias"])


SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def _weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """The weights of a call of scaled_dot_product_attention."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1)


def _is_foreign(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or not type(module).__module__.startswith(("saccade.", "torch."))


_recordings: list[Recording] = []


def recording() -> bool:
    """Whether somebody watches. The only cost of `record` where nobody does."""
    return bool(_recordings)


def note(weights: Tensor, where: Where | None = None) -> Tensor:
    """Hand weights to whoever watches; returned is what to go on with, which a watcher may have changed."""
    for watcher in _recordings:
        weights = watcher.add(weights, where)
    return weights


def note_rows(weights: Tensor) -> Tensor:
    """`note` of rows of weights (..., N) between things that are no tokens of a grid: shown as (rows, 1, 1, N)."""
    return note(weights.flatten(0, -2)[:, None, None]).view(weights.shape) if recording() else weights


@contextmanager
def record(
    model: nn.Module, layers: str = "*", attached: bool = False, change: Change | None = None
) -> Iterator[Recording]:
    """Record the weights of the modules of `model` that the pattern `layers` names, in forwards inside the block.

    `attached` weights stay in the graph of an evaluation, so that the slopes of a score can be asked of them. What
    `change(name, weights)` returns goes on in their place, where a module gets its output from them (attention does).
    """
    result = Recording(attached, change)

    def enter(name: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            shapes = [tuple(value.shape) for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
            result._running.append(_Frame(name, module, shapes[0] if shapes else ()))
        return hook

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        result._running.pop()

    handles = []
    for name in (None, *match_modules(model, layers)):
        module = model if name is None else model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    _recordings.append(result)
    try:
        with _Foreign(result) if any(map(_is_foreign, model.modules())) else nullcontext():
            yield result
    finally:
        _recordings.remove(result)
        for handle in handles:
            handle.remove()
