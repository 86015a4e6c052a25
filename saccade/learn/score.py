"""Scores of classifiers, their intervals over training seeds and images, and what may honestly be concluded from them.

Intervals are percentile bootstraps over both sources of luck at once: images are drawn with replacement, the same ones
for every seed, and so are seeds (Owen, "The pigeonhole bootstrap", 2007: at worst a little too wide). Of S seeds S - 1
are drawn, which makes the variance of a mean over few seeds unbiased (Rao and Wu, "Resampling inference with complex
survey data", 1988). A bootstrap of few images that all agree would claim certainty; so two right and two wrong answers
join every proportion (Agresti and Coull, 1998), and one win and one loss join every comparison (Bonett and Price,
"Adjusted Wald confidence interval for a difference of binomial proportions based on paired data", 2012).

Letters: S seeds, N images, K classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saccade.core.errors import SaccadeError
from saccade.core.optional import optional

classification = optional("torchmetrics.functional.classification", extra="train")

RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 200  # resamples drawn at a time: bounds the memory at CHUNK x N numbers
METRICS = ("accuracy", "balanced_accuracy", "macro_f1")

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Numbers = Floats | Integers


@dataclass(frozen=True)
class Interval:
    """A value and the bounds that hold it with probability 0.95."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """`{"value", "low", "high"}`, as it stands in results.json."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def percent(self) -> str:
        """`78.1 % (75.9 to 80.2)`."""
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class Candidate:
    """One contestant as the recommendation sees it: which answers were right, (S, N) or (1, N), and what one costs.

    What is no network has no latency and counts as the cheapest.
    """

    name: str
    right: NDArray[np.bool_]
    latency_ms: float | None

    @property
    def cost(self) -> float:
        """Milliseconds an image."""
        return self.latency_ms or 0.0


def confusion(predicted: Integers, truth: Integers, classes: int) -> Integers:
    """Confusion matrix, (K, K): rows are the truth, columns the answers of all seeds in `predicted`, (S, N)."""
    truths = torch.from_numpy(np.broadcast_to(truth, predicted.shape).copy())
    matrix = classification.multiclass_confusion_matrix(torch.from_numpy(predicted), truths, num_classes=classes)
    return np.asarray(matrix.numpy(), dtype=np.int64)


def metrics(predicted: Integers, truth: Integers, classes: int) -> dict[str, float]:
    """Accuracy, balanced accuracy (mean recall of the classes that occur) and macro-F1 of one seed's answers, (N,)."""
    matrix = confusion(predicted[None], truth, classes)
    values = _from_counts(np.diag(matrix)[None], matrix.sum(1)[None], matrix.sum(0)[None])
    return {name: float(value[0]) for name, value in values.items()}


def intervals(predicted: Integers, truth: Integers, classes: int) -> dict[str, Interval]:
    """Mean over seeds of each of METRICS, with its interval over seeds and images; `predicted` is (S, N)."""
    middles = np.sort(truth)[len(truth) * np.arange(1, 8, 2) // 8]  # true classes of the four images that join
    answers = np.where(np.arange(4) % 2, middles, (middles + 1) % classes)
    extended_truth = np.concatenate([truth, middles])
    extended = np.concatenate([predicted, np.tile(answers, (len(predicted), 1))], axis=1)
    one_hot = np.eye(classes)
    draws: dict[str, list[Floats]] = {name: [] for name in METRICS}
    for seeds, images in _weights(len(predicted), len(extended_truth)):
        support = images @ one_hot[extended_truth]
        one_seed: dict[str, list[Floats]] = {name: [] for name in METRICS}
        for row in extended:
            right = one_hot[extended_truth] * (row == extended_truth)[:, None]
            for name, value in _from_counts(images @ right, support, images @ one_hot[row]).items():
                one_seed[name].append(value)
        for name, values in one_seed.items():
            draws[name].append((seeds * np.stack(values, axis=1)).sum(1))
    seed_values = [metrics(row, truth, classes) for row in predicted]
    return {name: _interval(float(np.mean([values[name] for values in seed_values])), draws[name]) for name in METRICS}


def recalls(predicted: Integers, truth: Integers, classes: int) -> list[Interval | None]:
    """Recall of each class over seeds and images; None for a class without an image."""
    found: list[Interval | None] = []
    for label in range(classes):
        right = (predicted == truth)[:, truth == label]
        found.append(proportion(right) if right.size else None)
    return found


def proportion(right: NDArray[np.bool_]) -> Interval:
    """The share of right answers among `right`, (S, N), over seeds and images."""
    joined = np.tile([1.0, 1.0, 0.0, 0.0], (len(right), 1))
    return _mean(right.astype(np.float64), joined)


def difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Interval:
    """Accuracy of `first` minus accuracy of `second`, each (S, N) or (1, N), paired by image and by seed."""
    if first.shape[1] != second.shape[1] or (len(first) != len(second) and 1 not in (len(first), len(second))):
        raise SaccadeError(f"answers {first.shape} and {second.shape} are of other seeds or images: pair the same ones")
    gaps = first.astype(np.float64) - second.astype(np.float64)
    return _mean(gaps, np.tile([1.0, -1.0], (len(gaps), 1)))


def recommend(candidates: Sequence[Candidate], *, floor: str | None = None) -> dict[str, Any]:
    """Which candidate to take: the cheapest of those that the paired bootstrap cannot tell from the most accurate.

    `floor` names the candidate that answers without looking (the majority class): where even that one is among the
    tied, the sentence says so. Returns `{"best", "tied", "choice", "sentence"}`; `tied` leaves out the best itself.
    """
    if not candidates:
        return {"best": None, "tied": [], "choice": None, "sentence": "No contestant finished: nothing to recommend."}
    best, tied, choice = _choose(candidates)
    names = [candidate.name for candidate in tied]
    if floor in [best.name, *names]:
        found = next(candidate for candidate in candidates if candidate.name == floor)
        text = (f"Nothing is recommended: the most accurate, {best.name} with {proportion(best.right).percent()}, is "
                f"indistinguishable from {floor} with {proportion(found.right).percent()}, which does not look at the "
                "image; train longer or bring more images")
        return {"best": best.name, "tied": names, "choice": floor, "sentence": text + "."}
    parts = [f"Take {_described(choice)}", _rivals(best, tied, choice, candidates)]
    fast = [each for each in candidates if each.latency_ms is not None and each.cost <= choice.cost / 2]
    if fast:
        parts.append(f"under {_milliseconds(choice.cost / 2)} take {_described(_choose(fast)[2])}")
    if max(len(candidate.right) for candidate in candidates) == 1:
        parts.append("with one seed these intervals know the luck of the images, not that of training")
    return {"best": best.name, "tied": names, "choice": choice.name, "sentence": "; ".join(filter(None, parts)) + "."}


def _choose(candidates: Sequence[Candidate]) -> tuple[Candidate, list[Candidate], Candidate]:
    """The most accurate, those that cannot be told from it, and the fastest of them all."""
    best = max(candidates, key=lambda candidate: (candidate.right.mean(), -candidate.cost))
    rest = [candidate for candidate in candidates if candidate is not best]
    tied = [candidate for candidate in rest if difference(best.right, candidate.right).low <= 0]
    return best, tied, min([best, *tied], key=lambda candidate: candidate.cost)


def _rivals(best: Candidate, tied: list[Candidate], choice: Candidate, candidates: Sequence[Candidate]) -> str:
    """What the choice was weighed against, in half a sentence."""
    others = sorted((each for each in [best, *tied] if each is not choice), key=lambda each: -each.right.mean())
    if others:
        listed = ", ".join(f"{each.name} ({100 * each.right.mean():.1f} %, {_milliseconds(each.cost)})"
                           for each in others)
        place = "" if choice is best else f"; {best.name} measured most accurate"
        return f"{listed} {'is' if len(others) == 1 else 'are'} indistinguishable from it and slower{place}"
    rest = [candidate for candidate in candidates if candidate is not best]
    if not rest:
        return ""
    second = max(rest, key=lambda candidate: candidate.right.mean())
    gap = difference(best.right, second.right)
    return (f"{second.name}, next in accuracy, is {100 * gap.value:.1f} points behind "
            f"({100 * gap.low:.1f} to {100 * gap.high:.1f})")


def _described(candidate: Candidate) -> str:
    accuracy = proportion(candidate.right).percent().replace("%", "% accuracy")
    price = "without any training" if candidate.latency_ms is None else f"at {_milliseconds(candidate.cost)}"
    return f"{candidate.name}: {accuracy} {price}"


def _milliseconds(value: float) -> str:
    return f"{value:.2f} ms" if value < 1 else f"{value:.1f} ms"


def _from_counts(right: Numbers, support: Numbers, answered: Numbers) -> dict[str, Floats]:
    """METRICS from counts of each class, (R, K): right answers, images of the class, answers of the class."""
    occurs = support > 0
    recall = np.divide(right, support, out=np.zeros(right.shape), where=occurs)
    f1 = np.divide(2 * right, support + answered, out=np.zeros(right.shape), where=support + answered > 0)
    number = np.maximum(occurs.sum(-1), 1)
    seen = np.maximum(((support + answered) > 0).sum(-1), 1)
    return {"accuracy": right.sum(-1) / support.sum(-1), "balanced_accuracy": recall.sum(-1) / number,
            "macro_f1": f1.sum(-1) / seen}


def _weights(seeds: int, images: int) -> Iterator[tuple[Floats, Floats]]:
    """Bootstrap weights in chunks: of seeds, (CHUNK, S), summing to one, and draws of each image, (CHUNK, N)."""
    random = np.random.default_rng(0)
    for _ in range(RESAMPLES // CHUNK):
        yield _draw(random, seeds, max(seeds - 1, 1)) / max(seeds - 1, 1), _draw(random, images, images)


def _draw(random: np.random.Generator, among: int, number: int) -> Floats:
    """How often each of `among` things comes when `number` are drawn with replacement, CHUNK times over."""
    drawn = random.integers(among, size=(CHUNK, number)) + among * np.arange(CHUNK)[:, None]
    return np.bincount(drawn.ravel(), minlength=CHUNK * among).reshape(CHUNK, among).astype(np.float64)


def _mean(values: Floats, joined: Floats) -> Interval:
    extended = np.concatenate([values, joined], axis=1)
    draws = [(seeds * (images @ extended.T)).sum(1) / extended.shape[1]
             for seeds, images in _weights(len(extended), extended.shape[1])]
    return _interval(float(values.mean()), draws)


def _interval(value: float, draws: list[Floats]) -> Interval:
    low, high = np.quantile(np.concatenate(draws), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, min(float(low), value), max(float(high), value))
