"""A run of restoration: one network trained to a folder, which `saccade restore --checkpoint` takes.

The folder holds restoration.json (model, degradation, what was reached), weights.safetensors, curves.json and
recipe.json; the weights are an ordinary checkpoint of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.core.build import create_model
from saccade.core.errors import SaccadeError
from saccade.core.files import write_whole
from saccade.core.index import index, model_paper, resolve_model
from saccade.learn.loop import Machines, Progress, first_process
from saccade.learn.restoration.degradations import Degradation, degradation
from saccade.learn.restoration.sets import LEAST, open_pictures
from saccade.learn.restoration.tiling import Bicubic
from saccade.learn.restoration.train import Recipe, fit, measured
from saccade.learn.runs import RESTORATION, WEIGHTS, weights_file, writable


def restores(name: str) -> bool:
    """Whether a registered model restores pictures."""
    return "restoration" in index()["papers"][model_paper(name)]["kinds"]


def train(
    data: Path,
    name: str,
    out: Path,
    recipe: Recipe,
    *,
    how: str | Path = "",
    checkpoint: Path | None = None,
    strict: bool = False,
    machines: Machines | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train a registered model of restoration on a folder of clean pictures; the same call resumes.

    `how` they are degraded is a name (see `degradation`; that of a network that enlarges is the bicubic resize), or the
    folder of their degraded partners. It starts from the weights in `checkpoint`, a file or a folder. Returns what
    restoration.json tells: PSNR and SSIM on held-out pictures, as degraded ("before", enlarged by the bicubic resize)
    and as restored ("after").
    """

    def make() -> Any:
        return create_model(name, checkpoint_path=None if checkpoint is None else weights_file(checkpoint))

    model: Any = make().eval()  # a wrong name or checkpoint is told before anything is read or written
    with torch.no_grad():
        model(torch.zeros(1, model.in_chans, LEAST, LEAST))  # so is that it takes more than a picture
    chosen = how if isinstance(how, Path) else _degradation(how, name, model.scale)
    pictures = open_pictures(data, chosen, scale=model.scale, channels=model.in_chans, smallest=max(recipe.patches),
                             strict=strict)
    fitted = fit(make, pictures.patches, recipe, writable(out), held=pictures.held, machines=machines,
                 progress=progress)
    device = next(fitted.model.parameters()).device

    def restored(image: Tensor) -> Tensor:
        made: Tensor = fitted.model(image.to(device)).cpu()
        return made

    found = {"model": resolve_model(name), "degradation": str(how) or f"x{model.scale}",
             "before": measured(Bicubic(model.scale, model.in_chans), pictures.held, model.scale),
             "after": measured(restored, pictures.held, model.scale), "training_seconds": fitted.seconds,
             "data": {"name": pictures.name, "fingerprint": pictures.patches.fingerprint, "notes": pictures.notes}}
    if first_process():
        write_whole(out / RESTORATION, json.dumps(found, indent=1, ensure_ascii=False))
    return found


def _degradation(how: str, name: str, scale: int) -> Degradation:
    if not how and scale == 1:
        raise SaccadeError(f"{name} does not enlarge: say what it shall learn to undo, as in --degradation noise25, or "
                           "give --degraded FOLDER")
    made = degradation(how or f"x{scale}")
    if made.scale != scale:
        fits = f"x{scale}" if scale > 1 else "noise25, jpeg40, rain or haze"
        raise SaccadeError(f"{name} makes pictures {scale} times as large and {how} makes them {made.scale} times as "
                           f"small: choose {fits}, or another model")
    return made


def opened(place: Path, name: str | None) -> tuple[str, Path]:
    """The model's name and the file of weights of a folder that `train` made, or of any checkpoint with its name."""
    if (place / RESTORATION).is_file():
        known = json.loads((place / RESTORATION).read_text(encoding="utf-8"))["model"]
        return name or known, place / WEIGHTS
    if name is None:
        raise SaccadeError(f"{place} does not say which model it belongs to ({RESTORATION} is missing): give --model "
                           "NAME")
    ours = place / WEIGHTS
    return name, ours if ours.is_file() else place
