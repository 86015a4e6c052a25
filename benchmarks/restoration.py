"""A narrow network, trained in minutes on bundled pictures, beside the bicubic resize on pictures it never saw.

    python -m benchmarks.restoration [--steps 1100] [--out runs/restoration]

Doubling: MATLAB's bicubic halves the pictures, the network doubles them. Trained on ten pictures of scikit-image,
measured on five others; PSNR and SSIM on Y less two pixels of border. The folder receives weights.safetensors (for
`saccade restore --model hat_nano_x2`), measured.json and details.png, details side by side. A full run writes its
section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from benchmarks.results import write_section
from saccade import create_model
from saccade.core.files import write_whole
from saccade.core.optional import optional
from saccade.learn.loop import Progress
from saccade.learn.restoration.degradations import Smaller
from saccade.learn.restoration.measures import quality
from saccade.learn.restoration.patches import Patches
from saccade.learn.restoration.tiling import Bicubic
from saccade.learn.restoration.train import Recipe, fit
from saccade.tools.watch import Watch

data = optional("skimage.data", extra="train")

TRAINED_ON = ("astronaut", "brick", "coins", "grass", "gravel", "hubble_deep_field", "page", "retina", "rocket",
              "immunohistochemistry")
HELD_OUT = ("camera", "chelsea", "coffee", "motorcycle", "text")
DETAILS = {"camera": (190, 90), "chelsea": (120, 90), "coffee": (210, 60), "motorcycle": (330, 160)}  # left, top
MODEL, SCALE, SIDE = "hat_nano_x2", 2, 96
STEPS, EPOCHS = 1100, 10


def picture(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, 3), whole multiples of the scale."""
    pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)
    height, width = (side // SCALE * SCALE for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[:height, :width, :3])


def recipe(steps: int) -> Recipe:
    """Small patches first, then larger ones for the last fifth."""
    return Recipe(epochs=EPOCHS, steps=max(steps // EPOCHS, 1), patches=(24,) * 4 + (48,), learning_rate=2e-3,
                  warmup=0.5, losses={"charbonnier": 1.0})


def measure(model: nn.Module, out: Path) -> list[dict[str, Any]]:
    """A row for each held-out picture; details.png shows some."""
    rows, strips = [], []
    for name in HELD_OUT:
        truth = tensor(picture(name))
        small = Smaller(SCALE)(truth[0], torch.Generator())[None]
        with torch.no_grad():
            made = {"bicubic": Bicubic(SCALE)(small), MODEL: model(small)}
        rows.append({"picture": name, **{which: quality(image, truth, SCALE) for which, image in made.items()}})
        if name in DETAILS:
            left, top = DETAILS[name]
            strips.append([image[..., top:top + SIDE, left:left + SIDE] for image in (*made.values(), truth)])
    sheet(strips, ["bicubic", MODEL, "original"]).save(out / "details.png")
    return rows


def tensor(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    return torch.from_numpy(pixels).movedim(-1, 0)[None].float() / 255


def sheet(strips: list[list[Tensor]], titles: list[str]) -> Image.Image:
    """Rows of details, twice as large, each pixel as it is."""
    side, head = 2 * SIDE, 18
    page = Image.new("RGB", (len(titles) * (side + 4), head + len(strips) * (side + 4)), "white")
    pen = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        pen.text((column * (side + 4) + 4, 3), title, fill="black")
        for row, strip in enumerate(strips):
            pixels = (strip[column][0].clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
            detail = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            page.paste(detail, (column * (side + 4), head + row * (side + 4)))
    return page


def gain(row: dict[str, Any], on: str) -> float:
    """dB of PSNR over the bicubic resize, on "y" or "rgb"."""
    return float(row[MODEL][f"psnr_{on}"] - row["bicubic"][f"psnr_{on}"])


def table(rows: list[dict[str, Any]], steps: int, seconds: float) -> str:
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    lines = [f"`python -m benchmarks.restoration --steps {steps}`: {machine}, {seconds:.0f} seconds of processor time "
             f"to train. PSNR (dB) and SSIM on Y, border {SCALE}; trained on {len(TRAINED_ON)} other bundled pictures.",
             "",
             f"| picture | bicubic | {MODEL} | gain | gain on RGB |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        cells = [f"{row[which]['psnr_y']:.2f} / {row[which]['ssim_y']:.4f}" for which in ("bicubic", MODEL)]
        cells += [f"{gain(row, on):+.2f}" for on in ("y", "rgb")]
        lines.append(f"| {row['picture']} | {' | '.join(cells)} |")
    means = [np.mean([gain(row, on) for row in rows]) for on in ("y", "rgb")]
    return "\n".join([*lines, f"| mean | | | **{means[0]:+.2f}** | {means[1]:+.2f} |"])


def train(steps: int, out: Path, watch: Watch) -> nn.Module:
    """The narrow network after so many steps; a folder that was stopped goes on."""
    # half of the pictures are gray and one is a red eye: with its channels in every order a picture teaches all colours
    pictures = [np.ascontiguousarray(picture(name)[..., list(order)])
                for name in TRAINED_ON for order in permutations(range(3))]
    patches = Patches(pictures, Smaller(SCALE))
    with watch.bar("training", steps) as bar:
        def show(now: Progress) -> None:
            bar.at((now.epoch - 1) * now.steps + now.step, f"epoch {now.epoch}/{now.epochs}, loss {now.loss:.4f}")
        return fit(lambda: create_model(MODEL), patches, recipe(steps), out, progress=show).model.cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/restoration"))
    options = parser.parse_args()
    watch, began = Watch(), time.process_time()
    model = train(options.steps, options.out, watch)
    seconds = time.process_time() - began
    rows = measure(model, options.out)
    write_whole(options.out / "measured.json", json.dumps(rows, indent=1))
    watch.line(table(rows, options.steps, seconds))
    if options.steps == STEPS:
        title = "## A narrow restoration network beside the bicubic resize"
        write_section("restoration", f"{title}\n\n{table(rows, options.steps, seconds)}")


if __name__ == "__main__":
    main()
