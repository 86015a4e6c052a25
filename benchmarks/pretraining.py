"""Does pre-training teach a narrow encoder anything: each method against the same encoder with random weights.

`python -m benchmarks.pretraining [METHOD...]` trains each on the built-in sets with three seeds, probes the frozen
features by a linear classifier, and writes the table, with 95 % intervals of the mean over the seeds. An encoder of
random weights is probed for the same seeds, hosts and pictures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.results import interval, write_section
from saccade import SaccadeError, create_model
from saccade.core.index import index
from saccade.core.pretraining import KIND, pretraining
from saccade.learn.data import ImageSet, Split, open_images
from saccade.learn.pretrain import Recipe, fit
from saccade.learn.probe import extract, probe

HOSTS = ("deit_nano", "convnext_nano", "multivit_nano")  # the first that a method takes
DECODER = dict(dim=64, depth=2, heads=4)
OPTIONS: dict[str, dict[str, Any]] = {  # decoders and heads as narrow as the hosts
    "mae": DECODER, "multimae": DECODER | dict(ratio=0.75), "uni4eye": DECODER, "spark": dict(width=64),
    "obow": dict(words=256), "sit_ssl": dict(out_dim=64, hidden=256),
}
SIDE, SEEDS, PICTURES = 32, 3, 640
STEPS, BATCH = 600, 64  # a minute or so on a core; half of it teaches MAE less than random weights know


def some(split: Split, count: int) -> Split:
    """Up to `count` pictures, evenly over the split."""
    chosen = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist()
    sources, labels, paths = ([column[i] for i in chosen] for column in (split.sources, split.labels, split.paths))
    return Split(sources, labels, paths)


def host_of(method: str) -> str:
    """The first host that the method takes."""
    for name in HOSTS:
        try:
            pretraining(create_model(name, num_classes=0, img_size=SIDE), method, **OPTIONS.get(method, {}))
            return name
        except SaccadeError:
            continue
    raise SaccadeError(f"{method} takes none of {', '.join(HOSTS)}")


def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Of a linear classifier on frozen features, on the test part."""
    found = [extract(model, split, img_size=SIDE) for split in (images.train, images.val, images.test)]
    answers = probe(found[0], images.train.labels, found[1], images.val.labels, found[2])["linear"]
    return float((answers.argmax(1) == torch.tensor(images.test.labels)).float().mean())


def trained(method: str, name: str, images: ImageSet, seed: int) -> nn.Module:
    """The host after so many steps of the method."""
    epochs = max(1, STEPS // (len(images.train) // BATCH))
    recipe = Recipe(epochs=epochs, batch_size=BATCH, img_size=SIDE, seed=seed,
                    smallest_crop=0.5, flip=images.name != "digits")

    def make() -> nn.Module:
        return pretraining(create_model(name, num_classes=0, img_size=SIDE), method, **OPTIONS.get(method, {}))

    with tempfile.TemporaryDirectory() as folder:
        return fit(make, images.train, images.fingerprint, recipe, Path(folder)).model


def main() -> None:
    known = index()
    methods = sorted(key for key, paper in known["methods"].items() if KIND in known["papers"][paper]["kinds"])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("methods", nargs="*", default=methods)
    parser.add_argument("--sets", default="digits,tiles", help="built-in sets, with commas between")
    asked = parser.parse_args()
    rows = ["| method | host | pictures | random weights | pre-trained | gain | seconds a run |",
            "| --- | --- | --- | --- | --- | --- | --- |"]
    random: dict[tuple[str, str, int], float] = {}
    for source in asked.sets.split(","):
        whole = open_images(source)
        parts: dict[str, Any] = {part: some(getattr(whole, part), PICTURES) for part in ("train", "val", "test")}
        images = ImageSet(source, whole.classes, **parts, notes=[], fingerprint=whole.fingerprint)
        for method in asked.methods:
            name, before, after, began = host_of(method), [], [], time.perf_counter()
            for seed in range(SEEDS):
                if (name, source, seed) not in random:
                    torch.manual_seed(seed)
                    random[name, source, seed] = accuracy(create_model(name, num_classes=0, img_size=SIDE), images)
                before.append(random[name, source, seed])
                after.append(accuracy(trained(method, name, images, seed), images))
            seconds = (time.perf_counter() - began) / SEEDS
            gains = [one - other for one, other in zip(after, before, strict=True)]
            cells = [f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in map(interval, (before, after, gains))]
            rows.append(f"| {method} | {name} | {source} | {' | '.join(cells)} | {seconds:.0f} |")
            print(rows[-1], flush=True)
    intro = (f"## Pre-training\n\nLinear probe of frozen features, test accuracy in percent, mean over {SEEDS} seeds "
             f"with its 95 % interval; {STEPS} steps of {BATCH} pictures (`python -m benchmarks.pretraining`).\n\n")
    write_section("pretraining", intro + "\n".join(rows))


if __name__ == "__main__":
    main()
