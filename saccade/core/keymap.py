"""Key maps: how the authors' parameter names become ours, as data that is checked both ways.

A rule is `(pattern, replacement)`, or `(pattern, replacement, change)`:
- `pattern` is a regular expression for the authors' whole name; the first rule that matches wins;
- `replacement` is our name (`\\1` as in `re.sub`); `name#i` is the i-th piece of `name`, joined along axis 0 (authors'
  separate q, k, v become one projection); a tuple of names splits the tensor evenly along axis 0;
- `change` turns the tensor's layout (`flatten` of a 1x1 convolution to a linear layer's matrix, ...), differentiably;
  for a tuple of names it may give the pieces itself;
- `Dropped(pattern, reason)` names entries that a model does not need: derived buffers, dead parameters.
A name that no rule matches stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

Change = Callable[[Tensor], Any]
pattern = lru_cache(maxsize=None)(re.compile)  # re's own cache holds 512, and deep models have more rules


class Dropped(NamedTuple):
    """Names that are left out of a model on purpose, and why."""

    pattern: str
    reason: str


Rule = tuple[str, str | tuple[str, ...]] | tuple[str, str | tuple[str, ...], Change] | Dropped
KeyMap = Sequence[Rule]


class Renamed(NamedTuple):
    """State in our names, which authors' names each came from, and the names dropped with their reason."""

    state: dict[str, Tensor]
    sources: dict[str, list[str]]
    dropped: dict[str, str]


def without_first_axis(value: Tensor) -> Tensor:
    """(1, ...) as (...)."""
    return value.squeeze(0)


def matrix_from_1x1(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight (O, I, 1, ...) as the linear layer's (O, I)."""
    return weight.flatten(1)


def kernel(value: Tensor) -> Tensor:
    """A kernel of flax's dense layer or convolution (*grid, I, O) as a weight (O, I, *grid)."""
    return value.movedim((-1, -2), (0, 1))


def transposed_kernel(value: Tensor) -> Tensor:
    """A kernel of flax's transposed convolution (*grid, I, O) as a weight (I, O, *grid): flax does not mirror it."""
    return value.movedim((-2, -1), (0, 1)).flip(tuple(range(2, value.ndim)))


def chain(*changes: Change) -> Change:
    """One change after the other."""
    return lambda value: reduce(lambda changed, change: change(changed), changes, value)


def pointwise(weight: Tensor) -> Tensor:
    """The weight of a 1x1 convolution as a linear layer's matrix; anything else as it is."""
    return weight.flatten(1) if weight.ndim > 2 and weight.shape[2:].numel() == 1 else weight


def flax(rules: KeyMap) -> list[Rule]:
    """The rules of a PyTorch port that kept flax's names, for flax's own trees: a/b/kernel is its a.b.weight, turned.

    A rule for all entries of a layer ends in `\\.(.*)`; gamma and beta of a layer norm are scale and bias in flax.
    """
    turned: list[Rule] = []
    for rule in rules:
        theirs, ours = rule[0].replace(r"\.", "/"), rule[1]
        assert isinstance(ours, str)
        if not theirs.endswith("/(.*)"):
            turned.append((theirs.replace("gamma", "scale").replace("beta", "bias"), ours))
            continue
        layer, ours = theirs.removesuffix("(.*)"), ours.rpartition(".")[0]
        layout = transposed_kernel if "ConvTranspose" in layer else kernel
        turned += [(f"{layer}kernel", f"{ours}.weight", chain(layout, *rule[2:])), (f"{layer}bias", f"{ours}.bias")]
    return turned


def within(rules: KeyMap, theirs: str, ours: str) -> list[Rule]:
    """The rules of a module for where it stands in a model: at `theirs` (a pattern) there, at `ours` here.

    The groups of `theirs` come first; those of the rules are counted on.
    """
    count = pattern(theirs).groups

    def moved(target: str) -> str:
        return ours + re.sub(r"\\(\d)", lambda group: f"\\{int(group[1]) + count}", target)

    placed: list[Rule] = []
    for rule in rules:
        if isinstance(rule, Dropped):
            placed.append(Dropped(theirs + rule.pattern, rule.reason))
            continue
        target = tuple(map(moved, rule[1])) if isinstance(rule[1], tuple) else moved(rule[1])
        placed.append((theirs + rule[0], target, *rule[2:]))
    return placed


def pvt_names(block: KeyMap, stages: int = 4) -> list[Rule]:
    """The names of PVT v2's code, which others build on: patch_embedN, blockN, normN; `block` has a block's rules."""
    rules: list[Rule] = [(r"patch_embed1\.(.*)", r"stem.\1"), (r"head\.(.*)", r"head.fc.\1")]
    for stage in range(stages):
        rules += [
            *within((*block, (r"(.*)", r"\1")), rf"block{stage + 1}\.(\d+)\.", rf"stages.{stage}.blocks.\1."),
            (rf"patch_embed{stage + 1}\.proj\.(.*)", rf"stages.{stage}.downsample.0.\1"),
            (rf"patch_embed{stage + 1}\.norm\.(.*)", rf"stages.{stage}.downsample.1.\1"),
            (rf"norm{stage + 1}\.(.*)", rf"stages.{stage}.norm.\1"),
        ]
    return rules


def rename(state: Mapping[str, Tensor], rules: KeyMap) -> Renamed:
    """Turn a state in the authors' names into ours; differentiable, so gradients reach the authors' tensors."""
    result: dict[str, Tensor] = {}
    sources: dict[str, list[str]] = {}
    dropped: dict[str, str] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        for rule in rules:
            match = pattern(rule[0]).fullmatch(name)
            if match:
                break
        else:
            result[name], sources[name] = value, [name]
            continue
        if isinstance(rule, Dropped):
            dropped[name] = rule.reason
            continue
        if len(rule) == 3:
            value = rule[2](value)
        if isinstance(rule[1], tuple):
            split = value.chunk(len(rule[1])) if isinstance(value, Tensor) else value
            for target, piece in zip(rule[1], split, strict=True):
                ours = match.expand(target)
                result[ours], sources[ours] = piece, [name]
            continue
        ours, _, part = match.expand(rule[1]).partition("#")
        sources.setdefault(ours, []).append(name)
        if part:
            pieces.setdefault(ours, {})[int(part)] = value
        else:
            result[ours] = value
    for ours, parts in pieces.items():  # a missing piece shows as a wrong shape when the state is loaded
        result[ours] = torch.cat([parts[number] for number in sorted(parts)])
    return Renamed(result, sources, dropped)
