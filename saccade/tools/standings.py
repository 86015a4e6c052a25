"""The last stage of a contest: all models measured in turn in one process, then what is told of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from saccade.attribution.maps import as_data_uri, overlay, sensitivity
from saccade.learn import score
from saccade.learn.score import Candidate
from saccade.learn.train import Recipe
from saccade.learn.transforms import Squares, normalise
from saccade.tools.contestants import MAJORITY, Contestant, reason
from saccade.tools.export import open_session
from saccade.tools.measure import EAGER, INT8, ONNX, count_macs, peak_memory, race, summary
from saccade.tools.trials import Answers, Arena, device, final_model

ROUNDS = (10, 100)  # fewest and most rounds of a race
RACE_SECONDS = 20.0  # that it should take, between these
SHOWN = 6  # test images in the gallery
OVERLAY_SIDE = 112


@dataclass(frozen=True)
class Standing:
    """A contestant with its answers or the reason of its failure."""

    entrant: Contestant
    answers: list[Answers]
    failed: str | None = None


def race_all(
    arena: Arena,
    standings: Sequence[Standing],
    graphs: dict[str, dict[str, Path]],
    progress: Callable[[int, int], None],
) -> tuple[list[Standing], dict[str, dict[str, Any]], dict[str, nn.Module]]:
    """Parameters, MACs, latency, throughput and memory of every finished contestant, by name, and its model.

    Latency is of one image, throughput and memory of a batch of the contest's size. What cannot be measured failed.
    `graphs` are files for onnxruntime, {network: {ONNX: file, INT8: file}}, raced beside; the latency that counts is
    onnxruntime's where all networks have one, so that all are measured alike, else PyTorch's.
    """
    kept, numbers, models = [], dict[str, dict[str, Any]](), dict[str, nn.Module]()
    single, batch = _pixels(arena, 1), _pixels(arena, arena.batch_size)
    for standing in standings:
        name = standing.entrant.name
        if standing.failed is None and standing.entrant.build is not None:
            try:
                model, weights = final_model(arena, standing.entrant, standing.answers)
                numbers[name] = _numbers(model, single, batch)
                numbers[name]["weights"] = weights and weights.relative_to(arena.out).as_posix()
                models[name] = model
            except Exception as error:  # one model must not take the others down
                standing = replace(standing, failed=f"measured: {reason(error)}")
        kept.append(standing)
    seconds = {}
    for what, images in (("latency", single), ("throughput", batch)):
        # not inference_mode: tables that a model keeps from here serve gradients later
        with torch.no_grad():
            runs: dict[str, Callable[[], Any]] = {name: partial(model, images) for name, model in models.items()}
            if what == "latency":
                runs |= {f"{name} {how}": partial(open_session(file).run, None, {"image": single.cpu().numpy()})
                         for name in models for how, file in graphs.get(name, {}).items()}
            once = sum(times[0] for times in race(runs, rounds=1).values()) or 1.0
            rounds = round(min(max(RACE_SECONDS / 2 / once, ROUNDS[0]), ROUNDS[1]))
            seconds[what] = race(runs, rounds=rounds, progress=progress)
    counts = ONNX if models and all(ONNX in graphs.get(name, {}) for name in models) else EAGER
    for name in models:
        timed = {EAGER: name} | {how: f"{name} {how}" for how in graphs.get(name, {})}
        took = {how: summary([1000 * second for second in seconds["latency"][run]]) for how, run in timed.items()}
        throughput = len(batch) / summary(seconds["throughput"][name])["p50"]
        numbers[name] |= {"latency_ms": took[counts], "latencies_ms": took, "throughput": throughput}
    return kept, numbers, models


def _numbers(model: nn.Module, single: Tensor, batch: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        model(single)
        memory = peak_memory(lambda: model(batch))
    try:
        macs: int | None = count_macs(model, (single,))
    except Exception:  # an operator that cannot be counted is no reason to leave the contest
        macs = None
    return {"params": sum(parameter.numel() for parameter in model.parameters()), "macs": macs, "peak_memory": memory}


def _pixels(arena: Arena, number: int) -> Tensor:
    """The first test images as a model sees them; a set with fewer is repeated."""
    pictures = Squares(arena.images.test, arena.img_size)
    pixels = torch.stack([pictures[i % len(pictures)][0] for i in range(number)])
    return normalise(pixels, Recipe.mean, Recipe.std).to(device())


def row(arena: Arena, standing: Standing, numbers: dict[str, Any]) -> dict[str, Any]:
    """A contestant as it stands in results.json."""
    entrant, answers = standing.entrant, standing.answers
    found: dict[str, Any] = {
        "name": entrant.name, "kind": entrant.kind, "host": entrant.host and entrant.host.name,
        "method": entrant.method, "params": None, "macs": None, "learning_rate": None, "curves": [],
        "seeds": [], "metrics": None, "recall": None, "confusion": None, "latency_ms": None, "latencies_ms": {},
        "int8_accuracy": None, "graph_failed": None, "throughput": None, "peak_memory": None,
        "training_seconds": None, "weights": None, "failed": standing.failed}
    if standing.failed is not None:
        return found
    classes, truth = arena.images.classes, np.array(arena.images.test.labels)
    number = len(classes)
    predicted = np.array([one.predicted for one in answers])
    trainings = [one.seconds for one in answers if one.seconds is not None]
    if answers[0].by_neighbours is not None:
        found["knn_accuracy"] = score.proportion(np.array([answers[0].by_neighbours]) == truth).as_dict()
    return found | numbers | {
        "learning_rate": answers[0].learning_rate,
        "curves": [{"seed": one.seed} | one.curves for one in answers if one.curves],
        "seeds": [{"seed": one.seed} | score.metrics(np.array(one.predicted), truth, number) for one in answers],
        "metrics": {key: value.as_dict() for key, value in score.intervals(predicted, truth, number).items()},
        "recall": {name: value.as_dict()
                   for name, value in zip(classes, score.recalls(predicted, truth, number), strict=True) if value},
        "confusion": score.confusion(predicted, truth, number).tolist(),
        "training_seconds": sum(trainings) / len(trainings) if trainings else None,  # of one seed
    }


def advise(arena: Arena, standings: Sequence[Standing], numbers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The recommendation among those that finished."""
    truth = np.array(arena.images.test.labels)
    candidates = [Candidate(each.entrant.name, np.array([one.predicted for one in each.answers]) == truth,
                            numbers[each.entrant.name]["latency_ms"]["p50"] if each.entrant.build else None)
                  for each in standings if each.failed is None]
    return score.recommend(candidates, floor=MAJORITY)


def looks(arena: Arena, models: dict[str, nn.Module], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """What each network looks at in a few test images, one each of classes spread over the list."""
    labels, classes = arena.images.test.labels, arena.images.classes
    shown = [labels.index(label) for label in sorted({len(classes) * i // SHOWN for i in range(SHOWN)})]
    pictures = Squares(arena.images.test, arena.img_size)
    squares = [pictures[i][0] for i in shown]
    images = [Image.fromarray(square.permute(1, 2, 0).numpy()) for square in squares]
    maps: dict[str, list[dict[str, Any]]] = {}
    for done, (name, model) in enumerate(models.items()):
        try:
            maps[name] = [_look(model, square, image, classes) for square, image in zip(squares, images, strict=True)]
        except Exception:  # a model without a gradient has no map; its numbers stand
            maps.pop(name, None)
        progress(done + 1, len(models))
    return {"images": [{"picture": as_data_uri(image), "truth": classes[labels[i]], "path": arena.images.test.paths[i]}
                       for i, image in zip(shown, images, strict=True)], "maps": maps}


def _look(model: nn.Module, square: Tensor, image: Image.Image, classes: list[str]) -> dict[str, Any]:
    pixels = normalise(square, Recipe.mean, Recipe.std).to(device())
    with torch.no_grad():
        probability, label = model(pixels[None])[0].float().softmax(0).max(0)
    heat = sensitivity(model, pixels, int(label))
    return {"overlay": as_data_uri(overlay(image, heat, OVERLAY_SIDE)), "predicted": classes[int(label)],
            "probability": float(probability)}


def table(contestants: Sequence[dict[str, Any]]) -> str:
    """results.csv: one line a contestant, one column a number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    plain = ("learning_rate", "params", "macs", "throughput", "peak_memory", "training_seconds", "weights", "failed")
    spans = [f"{name}{end}" for name in score.METRICS for end in ("", "_low", "_high")]
    timed = (EAGER, ONNX, INT8)
    writer.writerow(["name", "kind", *spans, "latency_ms_p50", "latency_ms_p95", *plain,
                     *(f"{how.replace(' ', '_').lower()}_ms_p50" for how in timed), "int8_accuracy"])
    for one in contestants:
        metrics, latency = one["metrics"] or {}, one["latency_ms"] or {}
        values = [metrics.get(name, {}).get(end) for name in score.METRICS for end in ("value", "low", "high")]
        writer.writerow([one["name"], one["kind"], *values, latency.get("p50"), latency.get("p95"),
                         *(one[key] for key in plain), *(one["latencies_ms"].get(how, {}).get("p50") for how in timed),
                         (one["int8_accuracy"] or {}).get("value")])
    return text.getvalue()
