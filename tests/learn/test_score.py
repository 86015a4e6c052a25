"""The statistics on synthetic answers whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from saccade.core.errors import SaccadeError
from saccade.learn import score
from saccade.learn.score import Candidate


def answers(seeds: int, images: int, classes: int, skill: float, key: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(key)
    truth = random.integers(classes, size=images)
    guess = random.integers(classes, size=(seeds, images))
    return np.where(random.random((seeds, images)) < skill, truth, guess), truth


def candidate(name: str, accuracy: float, latency: float | None, *, seeds: int = 3, key: int = 0) -> Candidate:
    """Image n is hard for everyone alike: exactly `accuracy` of the images are right, in an order that all share."""
    images = 600
    hardness = np.random.default_rng(7).permutation(images) / images
    noise = np.random.default_rng(key).normal(0, 0.05, (seeds, images))
    return Candidate(name, np.argsort(np.argsort(hardness + noise)) < accuracy * images, latency)


def test_metrics_are_those_of_torchmetrics() -> None:
    predicted, truth = answers(1, 211, 5, 0.6, 0)
    found = score.metrics(predicted[0], truth, 5)
    given, wanted = torch.from_numpy(predicted[0]), torch.from_numpy(truth)
    assert found["accuracy"] == pytest.approx(float(multiclass_accuracy(given, wanted, 5, average="micro")))
    assert found["balanced_accuracy"] == pytest.approx(float(multiclass_accuracy(given, wanted, 5, average="macro")))
    assert found["macro_f1"] == pytest.approx(float(multiclass_f1_score(given, wanted, 5, average="macro")))


def test_metrics_of_a_small_example_by_hand() -> None:
    truth, predicted = np.array([0, 0, 0, 1]), np.array([[0, 0, 1, 1], [0, 0, 0, 0]])
    assert score.metrics(predicted[0], truth, 2) == pytest.approx(
        {"accuracy": 3 / 4, "balanced_accuracy": (2 / 3 + 1) / 2, "macro_f1": (4 / 5 + 2 / 3) / 2})
    assert score.confusion(predicted, truth, 2).tolist() == [[5, 1], [1, 1]]


def test_a_class_without_images_has_no_recall_and_does_not_lower_the_balanced_accuracy() -> None:
    predicted, truth = np.array([[0, 1, 1]]), np.array([0, 1, 1])
    assert score.recalls(predicted, truth, 3)[2] is None
    assert score.metrics(predicted[0], truth, 3)["balanced_accuracy"] == 1


def test_intervals_hold_the_mean_over_seeds_and_agree_with_the_proportion() -> None:
    predicted, truth = answers(3, 300, 4, 0.7, 1)
    found = score.intervals(predicted, truth, 4)
    plain = score.proportion(predicted == truth)
    assert found["accuracy"].value == pytest.approx((predicted == truth).mean()) == plain.value
    assert found["accuracy"].low == pytest.approx(plain.low, abs=0.005)
    assert found["accuracy"].high == pytest.approx(plain.high, abs=0.005)
    for interval in found.values():
        assert 0 <= interval.low < interval.value < interval.high <= 1
    assert score.intervals(predicted, truth, 4) == found  # the resamples are fixed: the same page twice


def test_one_seed_gives_the_width_of_a_binomial_interval() -> None:
    right = np.arange(1000)[None] < 800
    found = score.proportion(right)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.0), (5, 0.04)])
def test_the_interval_covers_the_true_accuracy(seeds: int, spread: float) -> None:
    """Images differ in hardness and seeds in luck; the true accuracy is the mean over both populations."""
    random, covered, trials = np.random.default_rng(seeds), 0, 150
    for _ in range(trials):
        hardness = random.beta(4, 1, 120)  # mean 0.8
        luck = random.normal(0, spread, (seeds, 1))
        right = random.random((seeds, 120)) < np.clip(hardness + luck, 0, 1)
        found = score.proportion(right)
        covered += found.low <= 0.8 <= found.high
    assert covered / trials >= 0.90


@pytest.mark.parametrize("images", [3, 20, 200])
def test_few_images_that_all_agree_do_not_claim_certainty(images: int) -> None:
    found = score.proportion(np.ones((3, images), dtype=bool))
    assert found.high == 1 == found.value
    assert 0.5 / images < 1 - found.low < 5 / images + 0.1


def test_false_winners_between_equals_are_rare_and_true_ones_are_found() -> None:
    random, false, found, trials = np.random.default_rng(3), 0, 0, 150
    for _ in range(trials):
        hardness = random.beta(4, 1, 150)
        first, second = (random.random((3, 150)) < hardness for _ in range(2))
        worse = random.random((3, 150)) < hardness - 0.25
        equal = score.difference(first, second)
        false += not equal.low <= 0 <= equal.high
        found += score.difference(first, worse).low > 0
    assert false / trials <= 0.07
    assert found / trials >= 0.95


def test_pairing_finds_what_two_separate_intervals_hide() -> None:
    first, second = np.arange(400)[None] < 320, np.arange(400)[None] < 300  # 20 images more, none lost
    gap = score.difference(first, second)
    assert gap.value == pytest.approx(0.05)
    assert gap.low > 0
    assert score.proportion(first).low < score.proportion(second).high


@pytest.mark.parametrize(("wins", "told"), [(3, False), (8, True)])
def test_a_handful_of_images_proves_nothing(wins: int, told: bool) -> None:
    """The exact sign test needs six wins of six; the joined win and loss keep the bootstrap as careful."""
    first = np.ones((1, 40), dtype=bool)
    assert (score.difference(first, np.arange(40)[None] >= wins).low > 0) is told


def test_a_reference_without_seeds_is_paired_with_every_seed_and_other_sizes_are_refused() -> None:
    many, one = candidate("a", 0.8, 1).right, candidate("b", 0.6, 1, seeds=1).right
    assert score.difference(many, one).value == pytest.approx(0.2)
    with pytest.raises(SaccadeError, match="pair the same"):
        score.difference(many, many[:2])
    with pytest.raises(SaccadeError, match="pair the same"):
        score.difference(many, many[:, :9])


def test_a_clear_winner_is_taken_and_its_lead_is_told() -> None:
    found = score.recommend([candidate("good", 0.8, 2.0), candidate("bad", 0.6, 1.5, key=1)])
    assert (found["best"], found["tied"], found["choice"]) == ("good", [], "good")
    assert found["sentence"].startswith("Take good: 80.0 % accuracy (")
    assert "bad, next in accuracy, is 20.0 points behind (" in found["sentence"]


def test_among_the_tied_the_cheapest_is_taken() -> None:
    found = score.recommend([candidate("slow", 0.80, 2.3), candidate("quick", 0.795, 1.4, key=1),
                             candidate("poor", 0.5, 1.0, key=2)])
    assert (found["best"], found["tied"], found["choice"]) == ("slow", ["quick"], "quick")
    assert found["sentence"].startswith("Take quick: 79.5 % accuracy (")
    assert "slow (80.0 %, 2.3 ms) is indistinguishable from it and slower; slow measured most" in found["sentence"]
    assert "poor" not in found["sentence"]


def test_the_best_stays_the_choice_when_its_equals_are_slower() -> None:
    found = score.recommend([candidate("a", 0.80, 1.0), candidate("b", 0.795, 2.0, key=1),
                             candidate("c", 0.79, 3.0, key=2)])
    assert (found["best"], found["choice"]) == ("a", "a")
    assert "b (79.5 %, 2.0 ms), c (79.0 %, 3.0 ms) are indistinguishable from it and slower" in found["sentence"]


def test_a_much_faster_one_is_named_for_the_small_budget() -> None:
    found = score.recommend([candidate("good", 0.9, 4.0), candidate("fast", 0.7, 0.9),
                             candidate("weak", 0.5, 0.5, key=1)])
    assert found["choice"] == "good"
    assert "under 2.0 ms take fast: 70.0 % accuracy (" in found["sentence"]


def test_what_ties_with_the_majority_class_is_not_recommended() -> None:
    blind, model = candidate("majority class", 0.30, None, seeds=1), candidate("model", 0.31, 2.0, key=1)
    found = score.recommend([blind, model], floor="majority class")
    assert found["choice"] == "majority class"
    assert found["sentence"].startswith("Nothing is recommended: the most accurate, model with 31.0 %")
    useful = score.recommend([blind, candidate("model", 0.6, 2.0)], floor="majority class")
    assert useful["choice"] == "model" and "under" not in useful["sentence"]


def test_what_needs_no_network_is_the_cheapest_of_the_tied_but_no_answer_to_a_small_budget() -> None:
    neighbours = candidate("pixel k-NN", 0.98, None, seeds=1)
    found = score.recommend([neighbours, candidate("model", 0.985, 2.0)])
    assert found["choice"] == "pixel k-NN"
    assert found["sentence"].startswith("Take pixel k-NN: 98.0 % accuracy (")
    assert ") without any training; model (98.5 %" in found["sentence"]
    beaten = score.recommend([candidate("pixel k-NN", 0.3, None, seeds=1), candidate("model", 0.9, 2.0)])
    assert beaten["choice"] == "model" and "under" not in beaten["sentence"]


def test_one_seed_is_admitted_and_nothing_finished_is_said() -> None:
    one = score.recommend([candidate("a", 0.8, 1.0, seeds=1)])
    assert one["sentence"].endswith("with one seed these intervals know the luck of the images, not that of training.")
    assert score.recommend([])["choice"] is None
