"""Runs in each of two processes, by each strategy: a classifier, an objective and a network that restores.

Run by test_processes.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from saccade import create_model
from saccade.core.pretraining import pretraining
from saccade.learn import pretrain, train
from saccade.learn.data import ImageSet, Split
from saccade.learn.loop import Machines
from saccade.learn.restoration import train as restoration
from saccade.learn.restoration.degradations import Noise
from saccade.learn.restoration.patches import Patches

STRATEGIES = ("ddp", "fsdp")


def images() -> ImageSet:
    random = np.random.default_rng(0)

    def split(count: int) -> Split:
        labels = [i % 3 for i in range(count)]
        pictures = [random.normal(60 + 60 * label, 20, (16, 16)).clip(0, 255).astype(np.uint8) for label in labels]
        return Split(pictures, labels, [f"{i}.png" for i in range(count)])

    return ImageSet("shades", ["a", "b", "c"], split(24), split(6), split(6), [], "shades-1")


class Cleaner(torch.nn.Sequential):
    """The least that is a network of restoration."""

    scale, in_chans = 1, 3


def all_kinds(folder: Path, machines: Machines) -> None:
    shades, common = images(), dict(epochs=2, batch_size=8, img_size=16)
    train.fit(lambda: create_model("deit_nano", num_classes=3, img_size=16), shades, train.Recipe(**common),
              folder / "train", machines=machines)
    pretrain.fit(lambda: pretraining(create_model("deit_nano", num_classes=0, img_size=16), "rotnet"), shades.train,
                 shades.fingerprint, pretrain.Recipe(average=0.9, accumulate=2, **common), folder / "pretrain",
                 machines=machines)
    random = np.random.default_rng(0)
    patches = Patches([random.integers(0, 256, (24, 24, 3), np.uint8) for _ in range(3)], Noise(25, 25))
    recipe = restoration.Recipe(epochs=2, steps=3, batch_size=8, patches=(8, 16), average=0.5)
    restoration.fit(lambda: Cleaner(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)), patches,
                    recipe, folder / "restoration", machines=machines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in STRATEGIES:
        all_kinds(Path(sys.argv[1]) / name, Machines(devices=2, strategy=name))
