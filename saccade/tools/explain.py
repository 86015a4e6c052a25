"""Why did a classifier say so?  `saccade explain` collects maps, attention and scores of trust, and writes one page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor, nn

import saccade
from saccade.attribution.explanation import METHODS, explain, list_explainers
from saccade.attribution.maps import SCALE, as_data_uri
from saccade.attribution.trust import deletion, insertion, rank_correlation, shuffled
from saccade.core.apply import apply, parse_method
from saccade.core.errors import SaccadeError
from saccade.core.files import write_whole
from saccade.core.index import method as declared
from saccade.core.names import closest
from saccade.core.record import record
from saccade.learn.pictures import read_image
from saccade.parts.scores import scores
from saccade.tools.classifiers import Classifier, open_classifier
from saccade.tools.contestants import reason
from saccade.tools.explain_attention import encoded, layers, packed, tokens_left, watching_kept
from saccade.tools.explain_heads import heads
from saccade.tools.render import render

TOP = 5  # classes shown
STEPS = 16  # of deletion and insertion: forwards of the model, twice a method
SIDE = 224  # pixels of a map's longer side on the page; larger ones are averaged down
BUDGET = 6 * 2**20  # bytes of attention on a page, before base64
CLIPPED = 0.995  # of a map's values set its scale: a few bright pixels would hide the rest
NO_ATTENTION = "This model computes no attention weights: none of its modules has a softmax over places."


@dataclass(frozen=True)
class Question:
    """What `saccade explain` is asked; `methods` are names or "all", `applied` is as in "evit:keep=0.7"."""

    pictures: Sequence[Path]
    model: str
    checkpoint: Path | None = None
    pretrained: bool = False
    methods: Sequence[str] = ("all",)
    target: str | None = None
    applied: str | None = None
    heads: bool = False
    command: str = ""


Progress = Callable[[str, int, int], None]


def write_page(question: Question, path: Path, progress: Progress = lambda text, done, total: None) -> dict[str, Any]:
    """Answer the question in one HTML file that needs no network; returns what it shows, as plain data.

    Raises SaccadeError for what cannot be used: a picture, model, method or class, and where no method gives a map.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # told before the work, not after it
        answer = collect(question, progress)
        data = json.dumps(answer, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        write_whole(path, render("explain.html.jinja", answer=answer, data=Markup(data)))
    except OSError as error:
        raise SaccadeError(f"{path} cannot be written ({error.strerror}): choose another --out") from error
    return answer


def collect(question: Question, progress: Progress = lambda text, done, total: None) -> dict[str, Any]:
    """All that the page shows, as plain data (JSON); progress(text, done, total) is called before each method."""
    methods = chosen_methods(question.methods)
    pictures = [read_image(path) for path in question.pictures]
    if not pictures:
        raise SaccadeError("there is no picture: name one or more image files")
    classifier = open_classifier(question.model, question.checkpoint, question.pretrained)
    if question.applied:
        method, options = parsed_method(question.applied)
        apply(classifier.model, method, **options)
        classifier = replace(classifier, notes=(*classifier.notes, f"Applied to the model: {question.applied}."))
    asked = None if question.target is None else classifier.number(question.target)
    mixed, total = _copy(classifier.model), len(pictures) * len(methods)
    found, images = [], []
    for number, (path, picture) in enumerate(zip(question.pictures, pictures, strict=True)):
        image = classifier.see(picture)[None]
        images.append(image)

        def show(text: str, done: int, number: int = number) -> None:
            progress(text, number * len(methods) + done, total)

        entry = {"name": path.name, "picture": as_data_uri(classifier.shown(image[0])), "width": image.shape[3],
                 "height": image.shape[2], **_classes(classifier, image, asked)}
        entry |= _maps(classifier.model, mixed, image, entry["target"]["number"], methods, show)
        found.append(entry | _attention(classifier.model, image, BUDGET // len(pictures)))
    failed = [one["failed"] for entry in found for one in entry["maps"]]
    if all(failed):
        raise SaccadeError(f"no method gives a map: {'; '.join(dict.fromkeys(failed))}")
    targets = [entry["target"]["number"] for entry in found]
    return {
        "heads": heads(classifier.model, images, targets, partial(progress, "heads")) if question.heads else None,
        "saccade": saccade.__version__, "command": question.command, "model": classifier.name,
        "applied": question.applied, "notes": list(classifier.notes), "pictures": found, "scale": SCALE,
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
    }


def chosen_methods(names: Sequence[str]) -> list[str]:
    """The methods named, each known; "all" stands for every one."""
    known = list_explainers()
    if not names or "all" in names:
        return known
    for name in names:
        if name not in known:
            raise SaccadeError(f"there is no attribution method {name!r}"
                               f"{closest(name, known) or '; there are ' + ', '.join(known)}")
    return list(dict.fromkeys(names))


def parsed_method(text: str) -> tuple[str, dict[str, Any]]:
    """evit:keep=0.7,layers=(3,6) as ("evit", {"keep": 0.7, "layers": (3, 6)}); none of these methods takes a word."""
    try:
        name, options = parse_method(text)
        for key, value in options.items():
            if isinstance(value, str):
                raise SaccadeError(f"{key}={value} is no number, truth value or list")
    except SaccadeError as error:
        raise SaccadeError(f"--apply {text}: give METHOD or METHOD:OPTION=VALUE,..., as in evit:keep=0.7 "
                           f"({error})") from error
    return name, options


def _classes(classifier: Classifier, image: Tensor, asked: int | None) -> dict[str, Any]:
    """The most probable classes, and the one that is explained: asked for, else the first."""
    with torch.no_grad():
        chances = scores(classifier.model, image)[0].softmax(0)
    if not chances.isfinite().all():
        raise SaccadeError(f"the scores of {classifier.name} are not finite: are these its weights?")
    if asked is not None and asked >= len(chances):
        raise SaccadeError(f"--target {asked}: the model has the classes 0 to {len(chances) - 1}")

    def entry(number: int) -> dict[str, Any]:
        return {"number": number, "name": classifier.class_name(number), "probability": float(chances[number])}

    best = chances.topk(min(TOP, len(chances))).indices.tolist()
    return {"classes": [entry(number) for number in best], "target": entry(best[0] if asked is None else asked),
            "asked": asked is not None, "of": len(chances)}


def _maps(
    model: nn.Module, mixed: nn.Module | None, image: Tensor, target: int, methods: Sequence[str],
    progress: Callable[[str, int], None],
) -> dict[str, Any]:
    """Each method's map with its scores of trust, or why there is none, and what a random order scores."""
    wanted, maps = torch.tensor([target]), []
    for done, method in enumerate(methods):
        progress(method, done)
        entry: dict[str, Any] = {"method": method, "title": method.replace("_", " "), "failed": None}
        try:
            said = explain(model, image, method, target)
            if not said.maps.isfinite().all():
                raise SaccadeError("its map is not finite")
            if said.maps.max() == said.maps.min():
                raise SaccadeError("its map is the same everywhere")
            entry |= {"about": _about(method), "signed": said.signed, "seconds": said.seconds,
                      **levels(said.maps[0], said.signed)}
            entry |= {**_faithful(model, image, said.maps, wanted),
                      "shuffled": _follows(mixed, image, method, target, said.maps)}
        except Exception as error:  # one method, or one model that it does not suit, does not stop the page
            entry["failed"] = f"{method}: {reason(error)}".replace(f"{method}: {method}", method)
        maps.append(entry)
    order = torch.rand(image.shape[2:], generator=torch.Generator().manual_seed(0))[None]
    return {"maps": maps, "random": _faithful(model, image, order, wanted)}


def _faithful(model: nn.Module, image: Tensor, maps: Tensor, target: Tensor) -> dict[str, float]:
    found = {score.__name__: float(score(model, image, maps, target, STEPS)) for score in (deletion, insertion)}
    if not all(map(isfinite, found.values())):
        raise SaccadeError("the scores of changed pictures are not finite")
    return found


def levels(heat: Tensor, signed: bool) -> dict[str, Any]:
    """A map (H, W) as bytes: 0 to 255 from its least to its largest value; a signed one 1 to 255, 128 being its 0."""
    ratio = SIDE / max(heat.shape)
    if ratio < 1:
        size = [max(1, round(side * ratio)) for side in heat.shape]
        heat = F.interpolate(heat[None, None], size, mode="area")[0, 0]
    if signed:
        peak = heat.abs().flatten().quantile(CLIPPED).clamp_min(1e-20)
        values = 128 + (127 * heat / peak).round().clamp(-127, 127)
    else:
        low, high = heat.min(), heat.flatten().quantile(CLIPPED)
        high = high if high > low else heat.max()
        values = (255 * (heat - low) / (high - low).clamp_min(1e-20)).round().clamp(0, 255)
    return {"values": encoded(values, "u1"), "rows": heat.shape[0], "columns": heat.shape[1]}


def _follows(mixed: nn.Module | None, image: Tensor, method: str, target: int, maps: Tensor) -> float | None:
    """The rank correlation with the map of the shuffled model; None where that model cannot be mapped, or flatly."""
    if mixed is None:
        return None
    try:
        found = float(rank_correlation(maps, explain(mixed, image, method, target).maps))
    except Exception:  # shuffled weights may overflow
        return None
    return found if found == found else None


def _copy(model: nn.Module) -> nn.Module | None:
    try:
        return shuffled(model)
    except Exception:  # a model that cannot be copied has no check
        return None


def _about(method: str) -> str:
    """The first sentence of what a method says of itself: its formula."""
    function = METHODS[method].function if method in METHODS else declared(method, "attribution")
    text = " ".join((function.__doc__ or "").split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".:").replace("`", "")


def _attention(model: nn.Module, image: Tensor, budget: int) -> dict[str, Any]:
    """Where tokens look, layer by layer, which of them are left, and what of it the page does not show."""
    size = (image.shape[2], image.shape[3])
    with torch.no_grad(), record(model) as recorded, watching_kept(model) as left:
        model(image)
    found, left_out = layers(model, recorded.affinities, size, left[0]["count"] if left else None)
    plain, lines = packed(found, budget)
    why = [] if recorded.affinities else [NO_ATTENTION]
    return {"attention": plain, "left_out": [*why, *left_out, *lines], "tokens": tokens_left(left, size)}
