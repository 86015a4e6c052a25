"""Any image classifier by name, with what it takes to show it a picture: preprocessing and the names of its classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from saccade.core.build import create_model, native_size
from saccade.core.checkpoint import read_checkpoint
from saccade.core.errors import SaccadeError
from saccade.core.index import resolve_model
from saccade.core.names import closest
from saccade.core.optional import optional
from saccade.core.weights import list_weights, published
from saccade.learn.imagenet import picture_transform
from saccade.learn.runs import CARD, open_run
from saccade.learn.train import Recipe
from saccade.learn.transforms import evaluation_transform, normalise
from saccade.tools.contestants import check_timm, reason

timm = optional("timm", extra="train")
torchvision = optional("torchvision.models", extra="train")
transformers = optional("transformers", extra="hf")

UNTRAINED = ("These are random weights, which know nothing: the maps show the architecture alone. "
             "Give --checkpoint or --pretrained.")


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode; `see` makes of a picture (3, H, W) for it, normalised with `mean` and `std`.

    `classes` are the names of its classes where it knows them; `notes` say what a reader has to know.
    """

    model: nn.Module
    name: str
    see: Callable[[Image.Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str] | None = None
    notes: tuple[str, ...] = ()

    def shown(self, image: Tensor) -> Image.Image:
        """What the model saw, (3, H, W) normalised, as a picture."""
        pixels = (self.pixels(image.cpu()[None])[0] * 255).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def pixels(self, image: Tensor) -> Tensor:
        """What the model saw, (B, 3, H, W) normalised, in [0, 1]."""
        mean, std = self._scale()
        return (image * std + mean).clamp(0, 1)

    def normalised(self, pixels: Tensor) -> Tensor:
        """The inverse of `pixels`."""
        mean, std = self._scale()
        return (pixels - mean) / std

    def _scale(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        return mean, std

    def class_name(self, number: int) -> str:
        return self.classes[number] if self.classes and number < len(self.classes) else f"class {number}"

    def number(self, target: str) -> int:
        """The class that a person named or numbered; raises where there is none."""
        if self.classes and target in self.classes:
            return self.classes.index(target)
        if target.isdecimal():
            return int(target)
        known = self.classes or []
        raise SaccadeError(f"{self.name} has no class {target!r}{closest(target, known) or '; give its number'}")


def open_classifier(name: str, checkpoint: Path | None = None, pretrained: bool = False) -> Classifier:
    """A registered model, timm:NAME, torchvision:NAME, hf:FOLDER_OR_ID, or a folder that `saccade train` made.

    Weights come from `checkpoint`, or, `pretrained`, from who published them (downloaded); the last two have their own.
    Raises SaccadeError for unknown names and weights that do not fit.
    """
    if checkpoint is not None and pretrained:
        raise SaccadeError("--pretrained and --checkpoint are two sources of weights: give one")
    kind, _, rest = name.partition(":")
    if kind in FOREIGN and rest:
        found = FOREIGN[kind](rest, checkpoint, pretrained)
    elif Path(name).is_dir():
        found = _from_run(Path(name), checkpoint or pretrained)
    else:
        found = _registered(name, checkpoint, pretrained)
    found.model.eval()
    return found


def _from_run(folder: Path, other_weights: object) -> Classifier:
    if not (folder / CARD).exists() and (folder / "config.json").exists():
        raise SaccadeError(f"{folder} holds a model of transformers, it seems: give hf:{folder}")
    if other_weights:
        raise SaccadeError(f"{folder} is a trained model with its own weights: leave --checkpoint and --pretrained out")
    run = open_run(folder)
    squares = evaluation_transform(run.img_size)
    return Classifier(run.model, f"{run.name} ({folder.name})", lambda one: normalise(squares(one), run.mean, run.std),
                      run.mean, run.std, run.classes)


def _registered(name: str, checkpoint: Path | None, pretrained: bool) -> Classifier:
    """What others published wants pictures as its card says; weights under our names, as `saccade train` shows them."""
    model = create_model(name, checkpoint_path=checkpoint, pretrained=pretrained, **_classes_in(name, checkpoint))
    name, notes = resolve_model(name), _notes(checkpoint, pretrained)
    layout = getattr(getattr(model, "load_report", None), "format", "saccade")  # random weights have no report
    if layout != "saccade" and name in list_weights() and isinstance(published(name).img_size, int):
        weights = published(name)
        return Classifier(model, name, picture_transform(weights), weights.mean, weights.std, notes=notes)
    squares = evaluation_transform(native_size(name))
    mean, std = Recipe.mean, Recipe.std
    return Classifier(model, name, lambda one: normalise(squares(one), mean, std), mean, std, notes=notes)


def _classes_in(name: str, checkpoint: Path | None) -> dict[str, Any]:
    """num_classes, where a checkpoint under our names has another count than the model's own."""
    if checkpoint is None:
        return {}
    state, own = read_checkpoint(checkpoint), create_model(name).state_dict()
    counts = {len(state[key]) for key, value in own.items() if key.startswith("head") and key in state
              and value.shape[1:] == state[key].shape[1:] and value.shape != state[key].shape}
    return {"num_classes": counts.pop()} if len(counts) == 1 else {}


def _timm(name: str, checkpoint: Path | None, pretrained: bool) -> Classifier:
    check_timm(name)
    state = read_checkpoint(checkpoint) if checkpoint else {}
    head = (timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).classifier
    heads = [state[key] for key in (f"{head}.weight",) if key in state]
    try:
        model = timm.create_model(name, pretrained=pretrained, **({"num_classes": len(heads[0])} if heads else {}))
    except Exception as error:  # weights are not published, or the network is away
        raise SaccadeError(f"timm:{name} cannot be made: {reason(error)}") from error
    _fill(model, state, f"timm:{name}", checkpoint)
    settings = timm.data.resolve_model_data_config(model)
    see = timm.data.create_transform(**settings)
    return Classifier(model, f"timm:{name}", see, tuple(settings["mean"]), tuple(settings["std"]),
                      notes=_notes(checkpoint, pretrained))


def _torchvision(name: str, checkpoint: Path | None, pretrained: bool) -> Classifier:
    known = torchvision.list_models(module=torchvision)
    if name not in known:
        raise SaccadeError(f"torchvision has no classifier {name!r}"
                           f"{closest(name, known) or '; torchvision.models.list_models() shows all'}")
    published = torchvision.get_model_weights(name).DEFAULT
    try:
        model = torchvision.get_model(name, weights=published if pretrained else None)
    except Exception as error:  # the network is away
        raise SaccadeError(f"torchvision:{name} cannot be made: {reason(error)}") from error
    _fill(model, read_checkpoint(checkpoint) if checkpoint else {}, f"torchvision:{name}", checkpoint)
    see = published.transforms()
    return Classifier(model, f"torchvision:{name}", see, tuple(see.mean), tuple(see.std),
                      published.meta["categories"] if pretrained else None, _notes(checkpoint, pretrained))


def _transformers(where: str, checkpoint: Path | None, pretrained: bool) -> Classifier:
    if checkpoint is not None or pretrained:
        raise SaccadeError(f"hf:{where} comes with its own weights: leave --checkpoint and --pretrained out")
    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise SaccadeError(f"hf:{where} cannot be opened: {reason(error)}") from error
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    classes = None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(where)
    except (OSError, ValueError):
        size, mean, std = getattr(model.config, "image_size", 224), Recipe.mean, Recipe.std
        squares = evaluation_transform(size)
        note = f"It brings no preprocessing: pictures were scaled to {size} pixels and normalised as for ImageNet."
        return Classifier(model, f"hf:{where}", lambda one: normalise(squares(one), mean, std), mean, std, classes,
                          (note,))
    normal = getattr(processor, "do_normalize", True)
    mean, std = (tuple(values) if normal and values is not None else (default,) * 3 for values, default in
                 ((getattr(processor, "image_mean", None), 0.0), (getattr(processor, "image_std", None), 1.0)))

    def see(picture: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    return Classifier(model, f"hf:{where}", see, mean, std, classes)


FOREIGN = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}


def _fill(model: nn.Module, state: dict[str, Tensor], name: str, checkpoint: Path | None) -> None:
    if not checkpoint:
        return
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        raise SaccadeError(f"{checkpoint} does not fit {name}: {what}") from error


def _notes(checkpoint: Path | None, pretrained: bool) -> tuple[str, ...]:
    return () if checkpoint or pretrained else (UNTRAINED,)
