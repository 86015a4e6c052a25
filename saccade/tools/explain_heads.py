"""What a page needs to show what heads do: how much each matters, how far it looks, which pattern it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.record import Affinity, record
from saccade.papers.vit_analytics import SIDE, importance, patterns, reach
from saccade.tools.explain_attention import Layer, encoded, layers

GROUPS = 6
MOST_TOKENS = 1024  # of a layer whose maps are laid out whole
METRICS = {
    "drop": ("Probability lost", "by how much the class's probability falls without the head"),
    "moved": ("Answer moved", "Jensen-Shannon divergence of the answers with and without the head"),
    "turned": ("Vector turned", "1 - cosine of the vector that is classified, with and without the head"),
    "alone": ("Alone", "the class's probability where the head is the only one of its layer"),
}


def heads(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[int], progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Plain data on all heads over pictures (1, C, H, W), of one size or several, and the classes that are explained.

    Raises SaccadeError for a model without heads that can be put out.
    """
    found: list[dict[str, dict[str, Tensor]]] = []
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        def show(done: int, total: int, number: int = number) -> None:
            progress(number * total + done, len(images) * total)

        found.append(importance(model, image, torch.tensor([target], device=image.device), show))
    names = list(found[0]["drop"])
    metrics = [{"name": metric, "title": title, "about": about,
                "values": [torch.stack([one[metric][name] for one in found]).mean(0).tolist() for name in names]}
               for metric, (title, about) in METRICS.items()]
    far, maps = dict[str, list[Any]](), list[tuple[str, int, int, Tensor]]()
    for number, image in enumerate(images):
        with torch.no_grad(), record(model) as recorded:
            model(image)
        for layer in layers(model, recorded.affinities, (image.shape[2], image.shape[3]))[0]:
            weights = _whole(layer)
            if weights is None:
                continue
            far.setdefault(layer.name, []).append(reach(weights, layer.prefix, layer.grid))
            maps += [(layer.name, head, number, one[layer.prefix:, layer.prefix:])
                     for head, one in enumerate(weights[0])]
    return {"layers": names, "metrics": metrics, "reach": [_rings(name, each) for name, each in far.items()],
            "patterns": _patterns(maps) if len(maps) >= 2 * GROUPS else None}


def _whole(layer: Layer) -> Tensor | None:
    """The map (1, heads, P + N, P + N) of a layer, None where it is too large or groups pictures apart."""
    count = layer.prefix + layer.grid[0] * layer.grid[1]
    if count > MOST_TOKENS:
        return None
    dense = Affinity(layer.parts).dense()
    return torch.nn.functional.pad(dense, (0, count - dense.shape[-1], 0, count - dense.shape[-2]))


def _rings(name: str, each: list[Any]) -> dict[str, Any]:
    def mean(part: str) -> Any:
        return torch.stack([getattr(one, part) for one in each]).mean(0).tolist()
    return {"name": name, **{part: mean(part) for part in ("rings", "even", "prefix", "distance")}}


def _patterns(maps: list[tuple[str, int, int, Tensor]]) -> dict[str, Any]:
    found = patterns([one for *_, one in maps], GROUPS)
    small = torch.stack([torch.nn.functional.adaptive_avg_pool2d(one[None].float().cpu(), SIDE)[0]
                         for *_, one in maps])
    small = 255 * small / small.amax((1, 2), keepdim=True).clamp(min=1e-12)
    spread = found.plane.abs().amax(0).clamp(min=1e-12)
    points = [{"layer": name, "head": head, "picture": number, "group": int(group), "place": place.tolist(),
               "map": encoded(picture.round(), "u1")}
              for (name, head, number, _), group, place, picture in zip(maps, found.group, found.plane / spread, small,
                                                                        strict=True)]
    groups = [encoded(small[found.group == one].mean(0).round(), "u1") for one in range(GROUPS)]
    return {"side": SIDE, "groups": groups, "points": points, "error": found.error}
