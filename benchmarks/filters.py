"""Filters compared on digits: how they start, their shape, their number, and a first layer made without labels.

`python -m benchmarks.filters` trains each choice with `SEEDS` seeds (another split, start and order each) at the rate,
of `RATES`, with the best validation accuracy of a further run, and writes the tables, with 95 % intervals of the mean
and of the differences from the first row, seed by seed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import interval, write_section
from saccade.learn.data import open_images
from saccade.papers.filter_db import variance_entropy
from saccade.papers.survey_filters import FIRST_LAYERS, INITIALISERS, SHAPES, WIDTHS, FilterNet, initialise, lsuv
from saccade.tools.measure import count_macs

SEEDS, EPOCHS, BATCH, RATES = 5, 15, 64, (0.01, 0.03, 0.1)
FEW = 10  # labelled pictures a class, in the last table
DEEP: dict[str, Any] = dict(depth=3, norm=False)  # nine layers without norms: what a start must carry


class Choice(NamedTuple):
    """A row of a table: its group, its name, how the net is built, started and trained."""

    group: str
    name: str
    net: dict[str, Any]
    start: str = "he"
    bank: str = ""
    frozen: bool = False
    few: bool = False


class Result(NamedTuple):
    """What a run gives: accuracies, epochs to nine tenths of the last, how the start carries a picture, entropy."""

    val: float
    test: float
    learned: int
    carried: float
    entropy: float


def choices() -> Iterator[Choice]:
    for start in (*INITIALISERS, "lsuv"):
        yield Choice("start", start, DEEP, start)
    for shape in SHAPES:
        yield Choice("shape", shape, dict(shape=shape))
    for width in WIDTHS:
        yield Choice("number", width, dict(width=width))
    yield Choice("first layer", "he, trained", {}, few=True)
    yield Choice("first layer", "he, frozen", {}, frozen=True, few=True)
    for bank in FIRST_LAYERS:
        yield Choice("first layer", f"{bank}, trained", {}, bank=bank, few=True)
        yield Choice("first layer", f"{bank}, frozen", {}, bank=bank, frozen=True, few=True)


def pictures(seed: int) -> list[tuple[Tensor, Tensor]]:
    """train, val and test of one split, each (B, 1, 8, 8) of mean 0 and deviation 1, and labels."""
    images, found = open_images("digits", seed=seed), []
    for part in (images.train, images.val, images.test):
        pixels = torch.from_numpy(np.stack([np.asarray(source) for source in part.sources])).float()[:, None]
        found.append(((pixels - 78) / 96, torch.tensor(part.labels)))
    return found


def run(choice: Choice, rate: float, seed: int) -> Result:
    """One training: SGD with momentum, the rate falling along a cosine."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    (images, labels), val, test = pictures(seed)
    unlabelled = images
    if choice.few:
        kept = torch.cat([torch.nonzero(labels == label)[:FEW, 0] for label in range(10)])
        images, labels = images[kept], labels[kept]
    model = FilterNet(10, **choice.net)
    if choice.start == "lsuv":
        lsuv(model, images[:256])
    else:
        initialise(model, choice.start)
    first = model.body[0]
    if choice.bank:
        bank = FIRST_LAYERS[choice.bank](unlabelled, *first.weight.shape[::2][:2])
        with torch.no_grad():  # the bank's directions at He's scale, so that only the patterns differ
            first.weight.copy_(bank * (first.weight.std() / bank.std()))
    first.requires_grad_(not choice.frozen)
    with torch.no_grad():
        carried = float(model.eval().body(images).std() / images.std())
    epochs = EPOCHS * (8 if choice.few else 1)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], rate, 0.9, weight_decay=5e-4)
    steps = epochs * max(1, len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    course = []
    for _ in range(epochs):
        model.train()
        for part in torch.randperm(len(images)).split(BATCH)[: max(1, len(images) // BATCH)]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
        course.append(accuracy(model, *val))
    learned = next(epoch for epoch, value in enumerate(course, 1) if value >= 0.9 * course[-1])
    rows = [one.weight.detach().double().reshape(-1, 9) for one in model.modules()
            if isinstance(one, torch.nn.Conv2d) and one.kernel_size == (3, 3) and one.in_channels > 1]
    entropy = float(np.mean([variance_entropy(each) for each in rows])) if rows else float("nan")
    return Result(course[-1], accuracy(model, *test), learned, carried, entropy)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def compared(pool: ProcessPoolExecutor, asked: list[Choice]) -> list[str]:
    """The table of one group; the rate of each choice is chosen on a seed that is not counted."""
    tried = [[pool.submit(run, choice, rate, SEEDS) for rate in RATES] for choice in asked]
    rates = [max(zip(RATES, jobs, strict=True), key=lambda pair: pair[1].result().val)[0] for jobs in tried]
    counted = [[pool.submit(run, choice, rate, seed) for seed in range(SEEDS)]
               for choice, rate in zip(asked, rates, strict=True)]
    rows = [f"| {asked[0].group} | test accuracy % | less the first row | epochs to learn | carried | entropy | "
            "parameters | MACs | rate |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    reference = [job.result().test for job in counted[0]]
    for choice, rate, jobs in zip(asked, rates, counted, strict=True):
        results = [job.result() for job in jobs]
        mean, half = interval([one.test for one in results])
        less, width = interval([one.test - other for one, other in zip(results, reference, strict=True)])
        model = FilterNet(10, **choice.net)
        parameters = sum(one.numel() for one in model.parameters())
        macs = count_macs(model.eval(), (torch.zeros(1, 1, 8, 8),))
        entropy = float(np.mean([one.entropy for one in results]))
        rows.append(
            f"| {choice.name} | {100 * mean:.1f} ± {100 * half:.1f} | "
            f"{'' if choice == asked[0] else f'{100 * less:+.1f} ± {100 * width:.1f}'} | "
            f"{np.mean([one.learned for one in results]):.1f} | {np.mean([one.carried for one in results]):.2g} | "
            f"{'' if np.isnan(entropy) else f'{entropy:.2f}'} | {parameters:,} | {macs:,} | {rate} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    began, groups = time.perf_counter(), dict[str, list[Choice]]()
    for choice in choices():
        groups.setdefault(choice.group, []).append(choice)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        tables = ["\n".join(compared(pool, asked)) for asked in groups.values()]
    print(f"{time.perf_counter() - began:.0f} s")
    intro = (
        f"## Filters\n\n`python -m benchmarks.filters`: {EPOCHS} epochs on 1,079 digits of 8 x 8, {SEEDS} "
        "seeds (split, start, order), 95 % intervals of the mean and of the difference from the first row, seed by "
        "seed. Starts: nine layers without norms; shapes and numbers: three with batch norm; first layer: 100 labelled "
        "pictures, the bank made of all. Epochs to learn: to nine tenths of the last. Carried: deviation after "
        "the last layer at the start, over that of the picture. Entropy: of trained 3x3 filters (0.95: over all "
        "patterns).")
    write_section("filters", "\n\n".join([intro, *tables]))


if __name__ == "__main__":
    main()
