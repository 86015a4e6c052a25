"""The two pictures of docs/examples/reduction.md, docs/reduction.png and docs/kept.png, by the commands of that page.

    python -m benchmarks.reduction_pictures [--out runs/reduction]

What was trained is kept in the folder and not trained again. Screenshots are taken in a browser (playwright, chromium).
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from playwright.sync_api import Page

from benchmarks.browser import browser_page
from saccade.tools.pages import DOCS

PAGE = DOCS / "examples" / "reduction.md"
PHOTOGRAPHS = ("astronaut", "camera", "cat", "coffee", "coins", "hubble_deep_field", "rocket", "retina")


def crops(root: Path, count: int = 120) -> None:
    """A folder of square crops for each photograph, and cat.png, a square that is none of them."""
    draw = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        for number in range(count):
            side = int(draw.integers(min(picture.size) // 3, min(picture.size) + 1))
            left, top = (int(draw.integers(whole - side + 1)) for whole in picture.size)
            path = root / "photographs" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.crop((left, top, left + side, top + side)).resize((96, 96), Image.Resampling.LANCZOS).save(path)
    Image.fromarray(skimage.data.cat()[:, 60:360]).save(root / "cat.png")


def commands() -> list[list[str]]:
    """The lines of the page that call saccade, as words."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    (saccade .*)$", text, re.M)]


def screenshot(view: Page, source: Path, title: str, target: Path) -> None:
    """The section of a page whose heading has the id `title`."""
    view.goto(source.resolve().as_uri())
    view.wait_for_timeout(1500)
    box = view.locator(f"section:has(#{title})").bounding_box()
    assert box is not None
    edge = 24  # of the page around the section
    view.screenshot(path=target, full_page=True, clip={
        "x": box["x"] - edge, "y": box["y"] - edge, "width": box["width"] + 2 * edge,
        "height": box["height"] + 2 * edge})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reduction"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    crops(out)
    for words in commands():
        print(shlex.join(words), flush=True)
        subprocess.run([sys.executable, "-m", "saccade.cli", *words[1:]], cwd=out, check=True)
    with browser_page(900, scale=1.5) as view:
        screenshot(view, out / "reduced" / "report.html", "reductions-title", DOCS / "reduction.png")
        screenshot(view, out / "kept.html", "tokens-title", DOCS / "kept.png")


if __name__ == "__main__":
    main()
