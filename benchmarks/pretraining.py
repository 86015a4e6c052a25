"""Does pre-training teach a narrow encoder anything: each method against the same encoder with random weights.

`python -m benchmarks.pretraining [METHOD...]` trains each on digits and on upright tiles of photographs with four
seeds, in two processes of one thread, probes the frozen features by a linear classifier, and writes the table, with
95 % intervals of the mean over the seeds. An encoder of random weights is probed for the same seeds and pictures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.results import interval, write_section
from saccade import create_model
from saccade.core.pretraining import pretraining
from saccade.learn.builtin import BUILTIN, tiles
from saccade.learn.data import Split, open_images
from saccade.learn.pretrain import Recipe, fit
from saccade.learn.probe import extract, probe

SIDE = 32
LABELLED = 640  # pictures of train whose labels the probe sees; the methods see all, without labels
SEEDS = (18, 19, 20, 21)  # settings were chosen with seeds 100 to 103, judged by the pictures of val


@dataclass(frozen=True)
class Setting:
    """A host, a method and how long it learns: half a minute or so of one core."""

    host: str
    steps: int
    batch_size: int
    build: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-3

    def model(self) -> nn.Module:
        return create_model(self.host, num_classes=0, img_size=SIDE, **self.build)


# Patches are guessed from their own tokens, which are therefore probed; SiT's class token is what is contrasted.
PLAIN: dict[str, Any] = dict(dim=32, depth=2, heads=2, global_pool="avg")
RESNET: dict[str, Any] = dict(basic=True, depths=(1, 1, 1))
DECODER = dict(dim=32, depth=1, heads=2)
SETTINGS = {
    "mae": Setting("deit_nano", 400, 64, PLAIN, DECODER | dict(ratio=0.5)),
    "simmim": Setting("deit_nano", 400, 64, PLAIN, dict(patch=4)),
    "multimae": Setting("multivit_nano", 400, 64, dict(dim=32, patch=4), DECODER | dict(ratio=0.6)),
    "uni4eye": Setting("uni4eye_nano", 600, 64, PLAIN, DECODER),
    # groups of at most 2 x 2 of the 8 x 8 patches: were they as large as the picture, nothing would be left to look at
    "sit_ssl": Setting("deit_nano", 200, 64, PLAIN | dict(global_pool="token"),
                       dict(ratio=0.25, group=2, out_dim=64, hidden=256)),
    "rotnet": Setting("resnet_nano", 500, 32, RESNET, learning_rate=5e-3),
    "spark": Setting("convnext_nano", 300, 32, dict(dims=(16, 32, 64), patch=2), dict(width=16)),
    "obow": Setting("resnet_nano", 300, 32, RESNET | dict(dim=8), dict(words=128), learning_rate=4e-3),
}
# Digits are turned back so soon that a ResNet's last map keeps nothing but the turn; tiles are too hard for a ConvNeXt,
# where RotNet and OBoW want more steps. SparK hides squares of the last stride: at 4 pixels a tile has 64 of them.
OTHERWISE = {
    ("rotnet", "digits"): Setting("convnext_nano", 300, 32, dict(dims=(16, 32, 64), patch=4)),
    ("rotnet", "upright tiles"): replace(SETTINGS["rotnet"], steps=1000),
    ("spark", "upright tiles"): replace(SETTINGS["spark"], steps=400,
                                        build=dict(dims=(16, 64), depths=(1, 2), patch=2), learning_rate=4e-3),
    ("obow", "upright tiles"): replace(SETTINGS["obow"], steps=700),
}


class Run(NamedTuple):
    """What one seed gave: accuracies and seconds of processor time."""

    random: float
    trained: float
    seconds: float


def setting_of(method: str, source: str) -> Setting:
    return OTHERWISE.get((method, source), SETTINGS[method])


# Tiles as they lie in their photographs: of pictures turned at random RotNet learns nothing.
BUILTIN["upright tiles"] = partial(tiles, upright=True)
opened = cache(open_images)


@cache
def labelled(source: str) -> Split:
    """LABELLED pictures, evenly over the train part."""
    split = opened(source).train
    chosen = np.linspace(0, len(split) - 1, LABELLED).astype(int).tolist()
    sources, labels, paths = ([column[i] for i in chosen] for column in (split.sources, split.labels, split.paths))
    return Split(sources, labels, paths)


def accuracy(model: nn.Module, source: str) -> float:
    """Of a linear classifier on frozen features, on the test part."""
    images, known = opened(source), labelled(source)
    found = [extract(model, split, img_size=SIDE) for split in (known, images.val, images.test)]
    answers = probe(found[0], known.labels, found[1], images.val.labels, found[2])["linear"]
    return float((answers.argmax(1) == torch.tensor(images.test.labels)).float().mean())


def trained(method: str, source: str, seed: int) -> nn.Module:
    """The host after the method."""
    setting, images = setting_of(method, source), opened(source)
    epochs = round(setting.steps / (len(images.train) // setting.batch_size))
    recipe = Recipe(epochs=epochs, batch_size=setting.batch_size, learning_rate=setting.learning_rate,
                    img_size=SIDE, seed=seed, smallest_crop=0.5, flip=source != "digits")

    def make() -> nn.Module:
        return pretraining(setting.model(), method, **setting.options)

    with tempfile.TemporaryDirectory() as folder:
        return fit(make, images.train, images.fingerprint, recipe, Path(folder)).model


def run(method: str, source: str, seed: int) -> Run:
    """The host with random weights and after the method."""
    torch.set_num_threads(1)
    began = time.process_time()
    torch.manual_seed(seed)
    before = accuracy(setting_of(method, source).model(), source)
    after = accuracy(trained(method, source, seed), source)
    return Run(before, after, time.process_time() - began)


def row(method: str, source: str, runs: list[Run]) -> str:
    """A method on a set, as a line of the table."""
    setting = setting_of(method, source)
    before, after, seconds = zip(*runs, strict=True)
    gains = [one - other for one, other in zip(after, before, strict=True)]
    cells = [f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in map(interval, (before, after, gains))]
    host = setting.host + "".join(f", {name} {value}" for name, value in setting.build.items())
    how = f"{setting.steps} x {setting.batch_size}, {setting.learning_rate:g}"
    how += "".join(f", {name} {value}" for name, value in setting.options.items())
    return f"| {method} | {host} | {how} | {source} | {' | '.join(cells)} | {np.mean(seconds):.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("methods", nargs="*", default=list(SETTINGS))
    parser.add_argument("--sets", default="digits,upright tiles", help="with commas between")
    asked = parser.parse_args()
    rows = ["| method | host | steps x pictures, rate, options | pictures | random weights | pre-trained | gain "
            "| CPU seconds a run |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    began = time.perf_counter()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        asked_for = [(method, source) for source in asked.sets.split(",") for method in asked.methods]
        runs = [[pool.submit(run, *each, seed) for seed in SEEDS] for each in asked_for]
        for each, futures in zip(asked_for, runs, strict=True):
            rows.append(row(*each, [future.result() for future in futures]))
            print(rows[-1], flush=True)
    intro = ("## Pre-training\n\nLinear probe of frozen features, test accuracy in percent, mean over the seeds "
             f"{', '.join(map(str, SEEDS))} with its 95 % interval; pictures of {SIDE} x {SIDE} pixels, all of "
             f"train to learn from and {LABELLED} labels of it to probe by (`python -m benchmarks.pretraining`, "
             f"{(time.perf_counter() - began) / 60:.0f} minutes).\n\n")
    write_section("pretraining", intro + "\n".join(rows))


if __name__ == "__main__":
    main()
