"""Heads that read a frozen encoder's tokens, trained on tokens that are computed once."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.learn.data import ImageSet
from saccade.learn.epochs import check_finite
from saccade.learn.probe import extract, probe
from saccade.learn.reproducible import seed_of
from saccade.learn.train import outputs
from saccade.learn.transforms import Squares
from saccade.papers.efficient_probing import POOLINGS

RATES = (1e-3, 1e-2)  # of AdamW; validation chooses
BATCH = 128


def tokens_of(model: nn.Module) -> nn.Module:
    """A copy of a classifier, ours or timm's, that gives its tokens (B, N, C) without prefix tokens."""
    if not hasattr(model, "forward_features"):
        raise SaccadeError(f"{type(model).__name__} has no forward_features: attentive probes need the tokens of a "
                           "model of ours or timm's")
    return _Tokens(deepcopy(model))


class _Tokens(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        prefix = getattr(model, "num_prefix_tokens", None)
        self.prefix = int(getattr(model, "prefix_count", 0) if prefix is None else prefix)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.model.forward_features(image)  # type: ignore[operator]
        if found.ndim == 3:
            return found[:, self.prefix:]
        if found.shape[1] != getattr(self.model, "num_features", None):  # timm's Swin has channels last
            found = found.movedim(-1, 1)
        return found.flatten(2).transpose(1, 2)


def probes(
    model: nn.Module,
    images: ImageSet,
    poolings: tuple[str, ...],
    *,
    img_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    epochs: int = 50,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, Tensor]:
    """Probabilities (N, classes) of the test pictures by each of `poolings`, all on the frozen model.

    "knn" and "linear" read what the model hands to its classifier (`learn.probe`); the names of `POOLINGS` but for
    "linear" are heads on its tokens, trained for `epochs` epochs. Choices are made on val.
    Raises SaccadeError for unknown names.
    """
    known = ("linear", "knn", *(name for name in POOLINGS if name != "linear"))
    if wrong := [name for name in poolings if name not in known]:
        raise SaccadeError(f"there is no probe {wrong[0]!r}; choose from {', '.join(known)}")
    found: dict[str, Tensor] = {}
    if {"linear", "knn"} & set(poolings):
        train, val, test = (extract(model, split, img_size=img_size, mean=mean, std=std)
                            for split in (images.train, images.val, images.test))
        simple = probe(train, images.train.labels, val, images.val.labels, test)
        found |= {name: simple[name] for name in ("linear", "knn") if name in poolings}
    if heads := [name for name in poolings if name not in ("linear", "knn")]:
        encoder = tokens_of(model)
        parts = [outputs(encoder, Squares(split, img_size), BATCH, mean, std)
                 for split in (images.train, images.val, images.test)]
        labels = [torch.tensor(split.labels) for split in (images.train, images.val)]
        for name in heads:
            if say is not None:
                say(name)
            found[name] = _attentive(name, parts, labels, len(images.classes), epochs, seed)
    return {name: found[name] for name in poolings}


def _attentive(
    name: str, parts: list[Tensor], labels: list[Tensor], classes: int, epochs: int, seed: int
) -> Tensor:
    """Test probabilities by the head whose learning rate does best on val."""
    best: tuple[float, Tensor] | None = None
    for rate in RATES:
        torch.manual_seed(seed_of(seed))
        dim = parts[0].shape[-1]
        pool = POOLINGS[name](dim, **_options(name, dim))
        head = nn.Sequential(pool, nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, classes))
        optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=0.01)
        steps = max(len(parts[0]) // BATCH, 1) * epochs
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(epochs):
            for rows in torch.randperm(len(parts[0])).split(BATCH):
                if len(rows) < 2:
                    continue  # a batch norm of one
                loss = F.cross_entropy(head.train()(parts[0][rows]), labels[0][rows])
                check_finite(loss.detach(), epoch, 0, rate)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            head.eval()
            right = float((head(parts[1]).argmax(1) == labels[1]).float().mean())
            if best is None or right > best[0]:
                best = right, head(parts[2]).softmax(1)
    assert best is not None
    return best[1]


def _options(name: str, dim: int) -> dict[str, int]:
    """Queries or heads, where a pooling has some: as many as go into the channels, at most its own number."""
    most = {"efficient": ("queries", 32), "mean_query": ("heads", 12), "aim": ("heads", 12), "attention": ("heads", 12),
            "cae": ("heads", 12)}
    if name not in most:
        return {}
    option, count = most[name]
    return {option: next(each for each in range(count, 0, -1) if dim % each == 0)}
