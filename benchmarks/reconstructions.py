"""What masked methods guess: a picture for the docs, docs/pretraining.png.

    python -m benchmarks.reconstructions [--epochs 60]

Narrow models trained for minutes on the tiles of scikit-image's photographs; three held-out tiles, each as it is, as
the method saw it, and as it was guessed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from saccade import create_model
from saccade.core.pretraining import pretraining
from saccade.learn.data import open_images
from saccade.learn.pretrain import Recipe, fit
from saccade.learn.transforms import Squares, normalise
from saccade.tools.pages import DOCS

SIDE, ENLARGED, SHOWN = 32, 4, (3, 40, 77)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("deit_nano", dict(dim=64, depth=2, heads=4)), "simmim": ("swin_nano", {}),
    "spark": ("convnext_nano", dict(width=64)),
}


def drawn(pixels: Tensor) -> Image.Image:
    """(3, H, W), normalised, as an enlarged picture."""
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (Recipe.mean, Recipe.std))
    values = ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.repeat(np.repeat(values, ENLARGED, 0), ENLARGED, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    epochs = parser.parse_args().epochs
    tiles = open_images("tiles")
    held_out = Squares(tiles.test, SIDE)
    images = normalise(torch.stack([held_out[number][0] for number in SHOWN]), Recipe.mean, Recipe.std)
    step = SIDE * ENLARGED + 8
    sheet = Image.new("RGB", (100 + 3 * len(SHOWN) * step, len(METHODS) * step + 24), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (method, (host, options)) in enumerate(METHODS.items()):
        torch.manual_seed(0)
        objective: Any = pretraining(create_model(host, num_classes=0, img_size=SIDE), method, **options)
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe(epochs=epochs, batch_size=32, img_size=SIDE, smallest_crop=0.5)
            fit(lambda kept=objective: kept, tiles.train, tiles.fingerprint, recipe, Path(folder))
        objective.eval()
        with torch.no_grad():
            torch.manual_seed(1)
            guessed = objective.reconstruct(images)
        seen = torch.where(guessed == images, images, torch.zeros_like(images))
        for number in range(len(SHOWN)):
            for column, pixels in enumerate((images[number], seen[number], guessed[number])):
                sheet.paste(drawn(pixels), (100 + (3 * number + column) * step, 24 + row * step))
        pen.text((8, 24 + row * step + step // 2), method, fill="black")
        print(method, flush=True)
    for number in range(3 * len(SHOWN)):
        pen.text((100 + number * step, 6), ("picture", "what is seen", "guess")[number % 3], fill="black")
    sheet.save(DOCS / "pretraining.png", optimize=True)


if __name__ == "__main__":
    main()
