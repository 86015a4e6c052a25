"""Training a backbone on pictures without labels, to a folder; and what its features are worth afterwards.

The folder holds model.json (the backbone and its options), weights.safetensors (the backbone alone, without a head),
curves.json and recipe.json. The weights are an ordinary checkpoint: `create_model(name, checkpoint_path=..., fresh=
("head*",))`, `saccade train --checkpoint`, `saccade probe`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade.core.build import create_model
from saccade.core.errors import SaccadeError
from saccade.core.files import fill_whole, write_whole
from saccade.core.index import model_paper, paper_module, resolve_model
from saccade.core.optional import optional
from saccade.core.pretraining import pretraining
from saccade.learn.data import Pictures, Split
from saccade.learn.epochs import HERE, Devices, Say, Schedule, train_epochs
from saccade.learn.probe import extract
from saccade.learn.reproducible import claim, describe, reproducible, seed_of, tensors
from saccade.learn.runs import open_run
from saccade.learn.transforms import Squares
from saccade.learn.views import views
from saccade.papers.projection_head import effective_rank

timm = optional("timm", extra="train")

CARD, WEIGHTS = "model.json", "weights.safetensors"
LOOKED_AT = 256  # pictures whose features are watched for collapse


@dataclass(frozen=True)
class Pretraining(Schedule):
    """All that decides a run besides the backbone and the pictures."""

    method: str = "mae"
    options: dict[str, Any] = field(default_factory=dict)  # of the method
    flip: bool = True  # crops may be mirrored: not for digits or writing


def backbone(name: str, img_size: int) -> nn.Module:
    """A registered model or timm:NAME of random weights, without a head where it has one to leave out."""
    if name.startswith("timm:"):
        try:
            return timm.create_model(name.removeprefix("timm:"), num_classes=0, img_size=img_size)
        except TypeError:  # it knows no native size
            return timm.create_model(name.removeprefix("timm:"), num_classes=0)
        except RuntimeError as error:
            raise SaccadeError(f"{name}: {error}") from error
    return create_model(name, num_classes=0, img_size=img_size)


def pretrain(
    pictures: Pictures,
    name: str,
    recipe: Pretraining,
    folder: Path,
    *,
    devices: Devices = HERE,
    say: Say | None = None,
) -> dict[str, list[float]]:
    """Train a backbone by a method; the same call on the same folder resumes. Returns its curves.

    The curves are "epoch", "loss", and two guards against collapse, of the features of some pictures: "spread", the
    mean standard deviation of a feature over pictures (0: all alike), and "rank", the effective rank.
    Raises SaccadeError where the method cannot train the backbone, the loss is not finite, or the folder holds another
    run.
    """
    with reproducible():
        torch.manual_seed(seed_of(recipe.seed))
        model = backbone(name, recipe.img_size)
        objective = pretraining(model, recipe.method, **recipe.options)
        folder.mkdir(parents=True, exist_ok=True)
        weights, written = folder / WEIGHTS, folder / "curves.json"
        mine = asdict(recipe) | {"pictures": pictures.fingerprint, "name": name, "model": describe(objective)}
        runner = devices.start(recipe.precision)
        if runner.is_global_zero:
            claim(folder / "recipe.json", mine)
        if not (weights.exists() and written.exists()):
            state = _train(runner, objective, pictures.split, recipe, folder / "last.ckpt", say)
            if hasattr(model, "reset_classifier"):
                model.reset_classifier(0)  # type: ignore[operator]
            if runner.is_global_zero:
                card = {"model": name, "options": {"img_size": recipe.img_size, "num_classes": 0},
                        "method": recipe.method, "mean": recipe.mean, "std": recipe.std}
                write_whole(folder / CARD, json.dumps(card, indent=1))
                fill_whole(weights, lambda path: save_file(tensors(model), path))
                write_whole(written, json.dumps(state, indent=1))
        runner.barrier()
    (folder / "last.ckpt").unlink(missing_ok=True)
    curves: dict[str, list[float]] = json.loads(written.read_text())["curves"]
    return curves


@dataclass(frozen=True)
class Encoder:
    """A pre-trained backbone, without a head, with what it takes to show it pictures."""

    model: nn.Module
    img_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def open_encoder(folder: Path) -> Encoder:
    """The backbone of a folder that `pretrain` made, in evaluation mode; raises SaccadeError where there is none."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        name, options = card["model"], card["options"]
        card["method"]
    except (OSError, ValueError, KeyError) as error:
        raise SaccadeError(f"{folder} holds no finished pre-training ({CARD} is missing or of another kind): "
                           "`saccade pretrain` makes one") from error
    model = backbone(name, options["img_size"])
    model.load_state_dict(load_file(folder / WEIGHTS))
    return Encoder(model.eval(), options["img_size"], tuple(card["mean"]), tuple(card["std"]))


def opened(checkpoint: Path, name: str | None = None, img_size: int = 0) -> Encoder:
    """The encoder in a folder that `pretrain` or `saccade train` made, or model `name` with the weights of a file."""
    if checkpoint.is_dir():
        if name is not None:
            raise SaccadeError(f"{checkpoint} says itself which model it is: leave --model out")
        try:
            found = open_encoder(checkpoint)
        except SaccadeError:
            run = open_run(checkpoint)
            found = Encoder(run.model, run.img_size, run.mean, run.std)
    elif name is None:
        raise SaccadeError(f"{checkpoint} is a file of weights: say of which --model")
    else:
        options: dict[str, Any] = {"img_size": img_size} if img_size else {}
        model = create_model(name, checkpoint_path=checkpoint, num_classes=0, **options).eval()
        own = paper_module(model_paper(name)).SIZES[resolve_model(name)].get("img_size", 224)
        found = Encoder(model, own, Pretraining.mean, Pretraining.std)
    return replace(found, img_size=img_size) if img_size else found


def _train(
    runner: Any, objective: Any, split: Split, recipe: Pretraining, checkpoint: Path, say: Say | None
) -> dict[str, Any]:
    def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return network(images)["loss"]

    some = Split(split.sources[:LOOKED_AT], split.labels[:LOOKED_AT], split.paths[:LOOKED_AT])

    def after_epoch(judged: nn.Module) -> tuple[float, float]:
        features = extract(judged.model, some, img_size=recipe.img_size, mean=recipe.mean, std=recipe.std)  # type: ignore[arg-type]
        return float(features.std(0).mean()), float(effective_rank(features))

    crops: Callable[[Tensor], Tensor] = views(recipe.img_size, getattr(objective, "views", 1), recipe.flip)
    return train_epochs(
        runner, objective, Squares(split, recipe.img_size, crops), recipe, checkpoint, loss_of=loss_of,
        curves={"epoch": [], "loss": [], "spread": [], "rank": []}, after_epoch=after_epoch,
        after_step=getattr(objective, "after_step", None), say=say,
    )
