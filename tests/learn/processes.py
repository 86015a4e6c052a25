"""Runs in each of two processes: a classifier and an objective, trained by each strategy; run by test_processes.py."""

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

STRATEGIES = ("ddp", "fsdp")


def images() -> ImageSet:
    random = np.random.default_rng(0)

    def split(count: int) -> Split:
        labels = [i % 3 for i in range(count)]
        pictures = [random.normal(60 + 60 * label, 20, (16, 16)).clip(0, 255).astype(np.uint8) for label in labels]
        return Split(pictures, labels, [f"{i}.png" for i in range(count)])

    return ImageSet("shades", ["a", "b", "c"], split(24), split(6), split(6), [], "shades-1")


def both(folder: Path, machines: Machines) -> None:
    shades, common = images(), dict(epochs=2, batch_size=8, img_size=16)
    train.fit(lambda: create_model("deit_nano", num_classes=3, img_size=16), shades, train.Recipe(**common),
              folder / "train", machines=machines)
    pretrain.fit(lambda: pretraining(create_model("deit_nano", num_classes=0, img_size=16), "rotnet"), shades.train,
                 shades.fingerprint, pretrain.Recipe(average=0.9, accumulate=2, **common), folder / "pretrain",
                 machines=machines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in STRATEGIES:
        both(Path(sys.argv[1]) / name, Machines(devices=2, strategy=name))
