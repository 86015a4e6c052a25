"""What a page needs to show where tokens look, and which tokens are left: small integers in base64, within a budget."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.record import Affinity, Part
from saccade.parts.host import Kept
from saccade.parts.tokens import token_grid

MOST_PREFIX = 5  # a class token and four registers; more are a wrong guess, where tokens were dropped
MOST_TOKENS = 2**15 - 1  # numbers of tokens are 16 bits wide


def encoded(values: Tensor, kind: str) -> str:
    """The values, in a little-endian type of numpy, as base64."""
    return base64.b64encode(values.cpu().numpy().astype(f"<{kind}").tobytes()).decode("ascii")


@dataclass(frozen=True)
class Layer:
    """The attention of a module: parts whose tokens are numbered, prefix first, then the grid row by row."""

    name: str
    parts: list[Part]
    prefix: int
    grid: tuple[int, int]

    @property
    def heads(self) -> int:
        return self.parts[0].weights.shape[1]

    def bytes(self, heads: int) -> int:
        """What the layer takes on the page with so many heads: weights, the peak of each row, the numbers."""
        total = 0
        for part in self.parts:
            groups, _, rows, columns = part.weights.shape
            total += groups * heads * rows * (columns + 4) + 2 * groups * (rows + columns)
        return total


def layers(
    model: nn.Module, recorded: dict[str, Affinity], size: tuple[int, int], count: int | None = None
) -> tuple[list[Layer], list[str]]:
    """Those of the recorded modules whose weights can be laid on a picture of `size`, and a line on those that cannot.

    `count` is the number of tokens where it is known: where tokens are dropped, the numbers left do not tell.
    """
    found, loose = list[Layer](), list[str]()
    for name, affinity in recorded.items():
        parts = [part if part.query is not None else _pooled(part, size) or _windows(part, size, model, name)
                 for part in affinity.parts]
        placed = [part for part in parts if part is not None and _is_placed(part)]
        laid = None
        if len(placed) == len(parts) and len({part.weights.shape[1] for part in placed}) == 1:
            laid = _laid(placed, size, count, found[-1] if found else None)
        if laid is None or laid[0] + prod(laid[1]) > MOST_TOKENS:
            loose.append(name)
        else:
            found.append(Layer(name, placed, *laid))
    lines = []
    if loose:
        lines.append(f"{_some(loose)}: weights that do not stand between places of the picture (between channels, in "
                     "windows of a model that does not say where they lie, between more tokens than a page holds).")
    return found, lines


def _is_placed(part: Part) -> bool:
    return all(ids is not None and len(ids) == len(part.weights) for ids in (part.query, part.key))


def _laid(
    parts: list[Part], size: tuple[int, int], count: int | None, before: Layer | None
) -> tuple[int, tuple[int, int]] | None:
    """Prefix and grid of the tokens that parts number: where some were dropped, those of the layer before."""
    numbers = torch.cat([ids.flatten() for part in parts for ids in (part.query, part.key) if ids is not None]).unique()
    tokens = count or 1 + int(numbers.max())
    laid = token_grid(tokens, *size)
    dropped = count is None and int((numbers >= 0).sum()) < tokens
    if not dropped and (laid is None or laid[0] <= MOST_PREFIX):
        return laid
    if before is not None and before.prefix + prod(before.grid) >= tokens:
        return before.prefix, before.grid
    return laid if laid is not None and laid[0] <= MOST_PREFIX else None


def packed(found: list[Layer], budget: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The layers as plain data of at most `budget` bytes before base64, and lines on what was left out.

    From the smallest on each layer gets an equal share of what is left: all heads where they fit, else their mean, else
    nothing.
    """
    kept, means, out = dict[str, dict[str, Any]](), list[str](), list[str]()
    for place, layer in enumerate(sorted(found, key=lambda one: one.bytes(one.heads))):
        share = budget // (len(found) - place)
        heads = next((heads for heads in (layer.heads, 1) if layer.bytes(heads) <= share), 0)
        if heads:
            kept[layer.name] = _plain(layer, mean=heads < layer.heads)
            budget -= layer.bytes(heads)
        if heads < layer.heads:
            (means if heads else out).append(layer.name)
    lines = [f"{_some(means)}: the mean of the heads alone, to keep the page small."] if means else []
    lines += [f"{_some(out)}: too many weights for a page."] if out else []
    return [kept[layer.name] for layer in found if layer.name in kept], lines


def _plain(layer: Layer, mean: bool) -> dict[str, Any]:
    parts = []
    for part in layer.parts:
        weights = part.weights.float().nan_to_num()
        weights = weights.mean(1, keepdim=True) if mean else weights
        peaks = weights.amax(-1)
        levels = (weights / peaks.clamp_min(1e-12)[..., None] * 255).round()
        groups, heads, rows, columns = weights.shape
        assert part.query is not None and part.key is not None
        parts.append({"groups": groups, "heads": heads, "rows": rows, "columns": columns,
                      "weights": encoded(levels, "u1"), "peaks": encoded(peaks, "f4"),
                      "query": encoded(part.query, "i2"), "key": encoded(part.key, "i2")})
    nearest = _nearest(layer)
    return {"name": layer.name, "heads": layer.heads, "mean": mean, "prefix": layer.prefix, "rows": layer.grid[0],
            "columns": layer.grid[1], "parts": parts, "nearest": None if nearest is None else encoded(nearest, "i2")}


def _nearest(layer: Layer) -> Tensor | None:
    """Where all tokens look at pooled ones: for each place of the grid the number of the one that stands for it, or -1.

    Pooled tokens leave rows and columns free at even distances; tokens that routing never chose do not.
    """
    height, width = layer.grid
    asks, seen = (torch.cat([ids.flatten() for part in layer.parts if (ids := getattr(part, side)) is not None])
                  .unique().cpu() - layer.prefix for side in ("query", "key"))
    asks, seen = asks[asks >= 0], seen[seen >= 0]
    if not len(seen) or len(asks) < height * width:
        return None
    rows, columns = _nearest_of(seen // width, height), _nearest_of(seen % width, width)
    if rows is None and columns is None:
        return None
    rows, columns = (torch.arange(length) if found is None else found
                     for found, length in ((rows, height), (columns, width)))
    return torch.where((rows[:, None] < 0) | (columns < 0), -1, rows[:, None] * width + columns)


def _nearest_of(taken: Tensor, length: int) -> Tensor | None:
    """For each place of an axis the nearest that is taken, -1 where that is far; None where neighbours are taken."""
    taken = taken.unique()
    step = int(taken.diff().min()) if len(taken) > 1 else length
    if step == 1:
        return None
    away = (torch.arange(length)[:, None] - taken).abs()
    distance, place = away.min(1)
    return torch.where(2 * distance <= step + 1, taken[place], -1) if len(taken) > 1 else taken.expand(length)


def _pooled(part: Part, size: tuple[int, int]) -> Part | None:
    """A part of a foreign model whose tokens all look at all of a coarser grid (PVT), numbered by the grids."""
    groups, _, rows, columns = part.weights.shape
    fine, coarse = token_grid(rows, *size), token_grid(columns, *size)
    if groups > 1 or rows <= columns or fine is None or coarse is None or fine[0] or coarse[0]:
        return None
    (height, width), (fewer_rows, fewer_columns) = fine[1], coarse[1]
    down = (torch.arange(fewer_rows) * 2 + 1) * height // (2 * fewer_rows)
    across = (torch.arange(fewer_columns) * 2 + 1) * width // (2 * fewer_columns)
    key = (down[:, None] * width + across).flatten()
    return Part(part.weights, torch.arange(rows)[None], key[None])


def _windows(part: Part, size: tuple[int, int], model: nn.Module, name: str) -> Part | None:
    """A part of a foreign model that says window_size and shift_size, as Swin in timm, torchvision and transformers.

    The map, padded below and at the right, was rolled by the shift and cut into windows row by row.
    """
    groups, _, rows, columns = part.weights.shape
    window, shift = (_said(model, name, attribute) for attribute in ("window_size", "shift_size"))
    if window is None or shift is None or not rows == columns == prod(window):
        return None
    for stride in (1, 2, 4, 8, 16, 32):
        grid = [-(-side // stride) for side in size]
        count = [-(-side // of) for side, of in zip(grid, window, strict=True)]
        if prod(count) == groups:
            break
    else:
        return None
    down, across = (  # windows x places in a window; a map of one window is not rolled
        (torch.arange(many * of) + (roll if many > 1 else 0)).remainder(many * of).view(many, of)
        for many, of, roll in zip(count, window, shift, strict=True))
    y, x = down[:, None, :, None], across[None, :, None, :]
    numbers = torch.where((y < grid[0]) & (x < grid[1]), y * grid[1] + x, -1).flatten(2).flatten(0, 1)
    return Part(part.weights, numbers, numbers)


def _said(model: nn.Module, name: str, attribute: str) -> tuple[int, int] | None:
    """A pair that a module, or the nearest around it, says by that name."""
    while name:
        value = getattr(model.get_submodule(name), attribute, None)
        if isinstance(value, int):
            return value, value
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return int(value[0]), int(value[1])
        name = name.rpartition(".")[0]
    return None


@contextmanager
def watching_kept(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Which tokens are left behind each block on which a method of `saccade.apply` works.

    Fills a list of {"name", "numbers": (N,), "count"}; the first picture of a batch counts.
    """
    left: list[dict[str, Any]] = []

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            kept = module.kept
            left.append({"name": name, "numbers": kept.numbers[0].clone(), "count": kept.count})
        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()
             if isinstance(getattr(module, "kept", None), Kept)]
    try:
        yield left
    finally:
        for hook in hooks:
            hook.remove()


def tokens_left(left: list[dict[str, Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The blocks, the places of the grid that are left (a byte each), how many, and how many were made of several."""
    found = []
    for one in left:
        laid = token_grid(one["count"], *size)
        if laid is None:
            continue
        prefix, (height, width) = laid
        numbers = one["numbers"].cpu()
        places = numbers[numbers >= prefix] - prefix
        mask = torch.zeros(height * width, dtype=torch.uint8).index_fill_(0, places, 1)
        found.append({"name": one["name"], "rows": height, "columns": width, "mask": encoded(mask, "u1"),
                      "left": int(mask.sum()), "of": height * width, "made": int((numbers < 0).sum())})
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
