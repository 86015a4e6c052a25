"""Pictures in which one known patch decides the class, and small classifiers that learned them in seconds."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from saccade import create_model

SIDE, PATCH = 32, 8


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (B, 3, 32, 32) with one 8 x 8 square of lying (class 0) or standing (class 1) stripes; where it is."""
    generator = torch.Generator().manual_seed(seed)
    image = 0.25 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    label = torch.randint(2, (count,), generator=generator)
    where = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    places = torch.randint(SIDE // PATCH, (count, 2), generator=generator) * PATCH
    stripes = (torch.arange(PATCH) // 2 % 2 * 2.0 - 1).expand(PATCH, PATCH)
    for number, (row, column) in enumerate(places.tolist()):
        rows, columns = slice(row, row + PATCH), slice(column, column + PATCH)
        image[number, :, rows, columns] += stripes if label[number] else stripes.T
        where[number, rows, columns] = True
    return image, label, where


@lru_cache(maxsize=4)
def trained(name: str) -> nn.Module:
    """"cnn", or the name of a model of ours, trained until it is right on more than 95 % of new pictures."""
    torch.manual_seed(0)
    model = convolutional() if name == "cnn" else create_model(name, num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(400):
        image, label, _ = pictures(64, seed=step + 1)
        loss = nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    model.eval()
    image, label, _ = pictures(200, seed=0)
    with torch.no_grad():
        right = (model(image).argmax(1) == label).float().mean()
    assert right > 0.95, f"{name} learned only {right:.2f}: the planted patch decides nothing"
    return model


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 2))


def auc(heat: Tensor, where: Tensor) -> float:
    """Mean over pictures of the chance that a pixel of the patch stands above one outside; ties count half."""
    found = []
    for one, mask in zip(heat, where, strict=True):
        inside, outside = one[mask], one[~mask].sort().values
        below = torch.searchsorted(outside, inside) + torch.searchsorted(outside, inside, right=True)
        found.append(below.double().mean() / (2 * len(outside)))
    return float(torch.stack(found).mean())
