"""Does pre-training teach a narrow encoder anything: each method against the same encoder with random weights.

`python -m benchmarks.pretraining [METHOD...]` trains each on the built-in sets with five seeds, probes the frozen
features by a linear classifier, and writes the table, with 95 % intervals of the mean over the seeds. An encoder of
random weights is probed for the same seeds, hosts and pictures. Settings were chosen a method, on digits and with other
seeds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.results import interval, write_section
from saccade import create_model
from saccade.core.pretraining import pretraining
from saccade.learn.data import ImageSet, Split, open_images
from saccade.learn.pretrain import Recipe, fit
from saccade.learn.probe import extract, probe

SIDE, PICTURES = 16, 640
SEEDS = range(6, 11)  # settings were chosen with seed 0, and some changed after tables of the seeds up to 5


@dataclass(frozen=True)
class Setting:
    """A host, a method and how long it learns: a quarter of a minute or so of one core each."""

    host: str
    epochs: int
    batch_size: int
    learning_rate: float
    build: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        return create_model(self.host, num_classes=0, img_size=SIDE, **self.build)


PLAIN = dict(patch=4, depth=3, global_pool="avg")  # patches are guessed from their own tokens, which are probed
PYRAMID = dict(patch=2)
DECODER = dict(dim=64, depth=1, heads=4)
SETTINGS = {
    "mae": Setting("deit_nano", 40, 64, 2e-3, PLAIN, DECODER | dict(ratio=0.5)),
    "simmim": Setting("deit_nano", 40, 64, 2e-3, PLAIN, dict(patch=4)),
    "multimae": Setting("multivit_nano", 40, 64, 2e-3, dict(patch=4), DECODER | dict(ratio=0.6)),
    "uni4eye": Setting("uni4eye_nano", 20, 32, 3e-3, PLAIN, DECODER),
    "sit_ssl": Setting("deit_nano", 25, 32, 2e-3, PLAIN, dict(out_dim=64, hidden=256)),
    "rotnet": Setting("convnext_nano", 8, 32, 2e-3, PYRAMID),
    "spark": Setting("convnext_nano", 30, 64, 2e-3, PYRAMID, dict(width=32)),
    "obow": Setting("convnext_nano", 10, 32, 2e-3, PYRAMID, dict(words=128)),
}


def some(split: Split, count: int) -> Split:
    """Up to `count` pictures, evenly over the split."""
    chosen = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist()
    sources, labels, paths = ([column[i] for i in chosen] for column in (split.sources, split.labels, split.paths))
    return Split(sources, labels, paths)


def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Of a linear classifier on frozen features, on the test part."""
    found = [extract(model, split, img_size=SIDE) for split in (images.train, images.val, images.test)]
    answers = probe(found[0], images.train.labels, found[1], images.val.labels, found[2])["linear"]
    return float((answers.argmax(1) == torch.tensor(images.test.labels)).float().mean())


def trained(method: str, images: ImageSet, seed: int) -> nn.Module:
    """The host after the method."""
    setting = SETTINGS[method]
    recipe = Recipe(epochs=setting.epochs, batch_size=setting.batch_size, learning_rate=setting.learning_rate,
                    img_size=SIDE, seed=seed, smallest_crop=0.5, flip=images.name != "digits")

    def make() -> nn.Module:
        return pretraining(setting.model(), method, **setting.options)

    with tempfile.TemporaryDirectory() as folder:
        return fit(make, images.train, images.fingerprint, recipe, Path(folder)).model


def row(method: str, images: ImageSet) -> str:
    """A method on a set, as a line of the table."""
    setting, before, after, began = SETTINGS[method], [], [], time.process_time()
    for seed in SEEDS:
        torch.manual_seed(seed)
        before.append(accuracy(setting.model(), images))
        after.append(accuracy(trained(method, images, seed), images))
    seconds = (time.process_time() - began) / len(SEEDS)
    gains = [one - other for one, other in zip(after, before, strict=True)]
    cells = [f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in map(interval, (before, after, gains))]
    host = setting.host + "".join(f", {name} {value}" for name, value in setting.build.items())
    steps = setting.epochs * (len(images.train) // setting.batch_size)
    how = f"{steps} x {setting.batch_size}, {setting.learning_rate:g}"
    how += "".join(f", {name} {value}" for name, value in setting.options.items())
    return f"| {method} | {host} | {how} | {images.name} | {' | '.join(cells)} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("methods", nargs="*", default=list(SETTINGS))
    parser.add_argument("--sets", default="digits,tiles", help="built-in sets, with commas between")
    asked = parser.parse_args()
    rows = ["| method | host | steps x pictures, rate, options | pictures | random weights | pre-trained | gain "
            "| CPU seconds a run |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for source in asked.sets.split(","):
        whole = open_images(source)
        parts: dict[str, Any] = {part: some(getattr(whole, part), PICTURES) for part in ("train", "val", "test")}
        images = ImageSet(source, whole.classes, **parts, notes=[], fingerprint=whole.fingerprint)
        for method in asked.methods:
            rows.append(row(method, images))
            print(rows[-1], flush=True)
    intro = ("## Pre-training\n\nLinear probe of frozen features, test accuracy in percent, mean over the seeds "
             f"{', '.join(map(str, SEEDS))} with its 95 % interval; up to {PICTURES} pictures of {SIDE} x {SIDE} "
             "pixels a part (`python -m benchmarks.pretraining`).\n\n")
    write_section("pretraining", intro + "\n".join(rows))


if __name__ == "__main__":
    main()
