"""Draws train, val and test: by class, and by whole groups where images belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from warnings import catch_warnings, simplefilter

import numpy as np

from saccade.core.errors import SaccadeError
from saccade.core.optional import optional

model_selection = optional("sklearn.model_selection", extra="train")

SPLITS = ("train", "val", "test")
HELD_OUT = 0.2  # of the images, for each held-out split
GROUP_DRAWS = 20


def draw_splits(where: str, labels: Sequence[str], groups: Sequence[str], held: Sequence[str], seed: int) -> list[str]:
    """A split for each image: a fifth of every class to each of the `held` splits, the rest to train.

    Args:
        where: the source, for messages.
        groups: images of one group stay together; all empty: there are none.
        held: ("val", "test") or ("val",).

    Raises:
        SaccadeError: a class has too few images or groups to stand in every split.
    """
    grouped = any(groups)
    names = ("train", *held)
    for label, members in _by_label(labels).items():
        count = len({groups[number] if grouped else number for number in members})
        if count < len(names):
            noun = ("group" if grouped else "image") + ("s" if count > 1 else "")
            why = "; groups never cross splits" if grouped else ""
            raise SaccadeError(f"{where}: class {label} has {count} {noun} and needs {len(names)}, "
                               f"one each for {', '.join(names[:-1])} and {names[-1]}{why}")
    return _draw_groups(where, labels, groups, held, seed) if grouped else _draw(labels, held, seed)


def _by_label(labels: Sequence[str]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for number, label in enumerate(labels):
        members[label].append(number)
    return members


def _draw(labels: Sequence[str], held: Sequence[str], seed: int) -> list[str]:
    """Not scikit-learn's train_test_split: that may leave a small class out of a split."""
    generator = np.random.default_rng(seed)
    splits = ["train"] * len(labels)
    for members in _by_label(labels).values():
        size = max(1, round(HELD_OUT * len(members)))
        for position, number in enumerate(generator.permutation(members)[: size * len(held)]):
            splits[number] = held[position // size]
    return splits


def _draw_groups(where: str, labels: Sequence[str], groups: Sequence[str], held: Sequence[str], seed: int) -> list[str]:
    """A fold of whole groups to each held-out split: the first draw in which every split has every class."""
    folds = min(round(1 / HELD_OUT), len(set(groups)), max(Counter(labels).values()))
    generator = np.random.default_rng(seed)
    for _ in range(GROUP_DRAWS):
        state = int(generator.integers(2**31))
        splitter = model_selection.StratifiedGroupKFold(folds, shuffle=True, random_state=state)
        with catch_warnings():
            simplefilter("ignore", UserWarning)  # a class smaller than the number of folds: looked at below
            members = [rows for _, rows in splitter.split(labels, labels, groups)]
        for chosen in permutations(range(folds), len(held)):
            splits = ["train"] * len(labels)
            for split, fold in zip(held, chosen, strict=True):
                for number in members[fold]:
                    splits[number] = split
            if len(set(zip(splits, labels, strict=True))) == len(set(labels)) * (len(held) + 1):
                return splits
    raise SaccadeError(f"{where}: no way was found to keep groups whole and have every class in every split; "
                       "say the splits in a split column")
