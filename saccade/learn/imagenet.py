"""Top-1 of trained weights on ImageNet's validation pictures, or on any folder with a sub-folder per class."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from saccade.core.card import Weights
from saccade.core.errors import SaccadeError
from saccade.core.files import write_whole
from saccade.core.optional import optional
from saccade.learn.data import Split, open_validation

v2 = optional("torchvision.transforms.v2", extra="train")

WORKERS = 2  # processes that decode


class Accuracy(NamedTuple):
    """Percent of pictures whose class is the first answer, and among the first five."""

    top1: float
    top5: float
    images: int


class Prepared(Dataset[tuple[Tensor, int]]):
    """Pictures as their weights want them: ((3, S, S) float32, label)."""

    def __init__(self, split: Split, weights: Weights) -> None:
        self.split, self.transform = split, picture_transform(weights)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        picture, label = self.split[place]
        return self.transform(picture), label


def picture_transform(weights: Weights) -> Any:
    """PIL image -> (3, S, S) float32: shorter side to floor(S / crop), central square, (x / 255 - mean) / std."""
    size = weights.img_size
    if not isinstance(size, int):
        raise SaccadeError(f"weights for {size} pixels: an evaluation is known for squares")
    mode = v2.InterpolationMode(weights.interpolation)
    return v2.Compose([
        v2.Resize(int(size / weights.crop), interpolation=mode), v2.CenterCrop(size), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(weights.mean), list(weights.std)),
    ])


@torch.no_grad()
def validate(
    model: nn.Module,
    folder: str | Path,
    weights: Weights,
    *,
    batch_size: int = 64,
    resume: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Top-1 and top-5 of a model on the pictures of `folder`, on the GPU where there is one.

    With a file `resume`, what was counted when the call was stopped is not counted anew. `progress` is told how many
    pictures of how many are done. Raises SaccadeError where the folder's classes are not as many as the model's.
    """
    data = Prepared(open_validation(folder), weights)
    classes = max(data.split.labels) + 1
    known = getattr(model, "num_classes", classes)
    if classes != known:
        raise SaccadeError(f"{folder} has {classes} classes, the model knows {known}: give the set that it learnt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval().to(device)
    done, first, five = _resumed(resume, len(data))
    for images, labels in DataLoader(Subset(data, range(done, len(data))), batch_size, num_workers=WORKERS):
        answers = model(images.to(device)).topk(min(5, classes)).indices.cpu()
        right = answers == labels[:, None]
        done, first, five = done + len(labels), first + int(right[:, 0].sum()), five + int(right.sum())
        if resume is not None:
            write_whole(resume, json.dumps([done, first, five, len(data)]))
        progress(done, len(data))
    if resume is not None:
        resume.unlink(missing_ok=True)
    return Accuracy(100 * first / done, 100 * five / done, done)


def _resumed(resume: Path | None, total: int) -> Sequence[int]:
    """Pictures done, right at first and among five, from a call that was stopped; zeros where there is none."""
    try:
        counts = json.loads(resume.read_text(encoding="utf-8")) if resume else []
    except (OSError, ValueError):
        counts = []
    return counts[:3] if len(counts) == 4 and counts[3] == total else (0, 0, 0)
