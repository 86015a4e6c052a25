"""Training a classifier so that the result depends on the recipe alone: not on interruptions, processes or timing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade.core.files import fill_whole, write_whole
from saccade.core.optional import optional
from saccade.learn.epochs import HERE, Devices, Schedule, check_finite, train_epochs
from saccade.learn.reproducible import claim, describe, reproducible, seed_of, tensors
from saccade.learn.transforms import Squares, normalise, training_transform

if TYPE_CHECKING:
    from saccade.learn.data import ImageSet, Split

torchmetrics = optional("torchmetrics", extra="train")


@dataclass(frozen=True)
class Recipe(Schedule):
    """All that decides a run's result besides the model and the images (defaults: small pictures, from scratch)."""

    drop_path_rate: float = 0.0  # what make_model builds with: a change of it is another run
    label_smoothing: float = 0.1
    augment: bool = True
    flip: bool = True  # augmentation may mirror: not for digits or writing


@dataclass(frozen=True)
class Progress:
    """Where a run stands, after a step; epochs and steps (of this epoch) count from 1."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    val_accuracy: float | None  # after the epoch before


@dataclass(frozen=True)
class Fitted:
    """A finished run: the model after its last epoch, in eval mode, a list a curve, seconds of training in all."""

    model: nn.Module
    curves: dict[str, list[float]]
    seconds: float


def fit(
    make_model: Callable[[], nn.Module],
    images: ImageSet,
    recipe: Recipe,
    folder: Path,
    *,
    devices: Devices = HERE,
    progress: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Train `make_model()` (fresh or with loaded weights) on images.train; go on where an earlier call was stopped.

    The folder receives recipe.json, last.ckpt (while training), then weights.safetensors and curves.json; a finished
    folder is read, not trained again. The result is the last epoch's: images.val gives curves, images.test is not seen.
    Raises SaccadeError where the loss is not finite, or where the folder holds another run. Random numbers are torch's;
    the caller's state of them is as before afterwards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, curves = folder / "weights.safetensors", folder / "curves.json"
    with reproducible():
        torch.manual_seed(seed_of(recipe.seed))
        model = make_model()
        mine = asdict(recipe) | {"images": images.fingerprint, "model": describe(model)}
        runner = devices.start(recipe.precision)
        if runner.is_global_zero:
            claim(folder / "recipe.json", mine)
        if not (weights.exists() and curves.exists()):
            state = _train(runner, model, images, recipe, folder / "last.ckpt", progress)
            if runner.is_global_zero:
                fill_whole(weights, lambda path: save_file(tensors(model), path))
                write_whole(curves, json.dumps(state, indent=1))
        runner.barrier()
    (folder / "last.ckpt").unlink(missing_ok=True)
    model.load_state_dict(load_file(weights))
    return Fitted(model.to(runner.device).eval(), **json.loads(curves.read_text()))


def predict_logits(
    model: nn.Module,
    split: Split,
    *,
    img_size: int,
    batch_size: int = 64,
    mean: tuple[float, float, float] = Recipe.mean,
    std: tuple[float, float, float] = Recipe.std,
) -> Tensor:
    """(N, classes) float32 on the CPU: what the model, put in eval mode, says of each picture without augmentation."""
    return outputs(model, Squares(split, img_size), batch_size, mean, std)


def outputs(
    model: nn.Module,
    squares: Squares,
    batch_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """(N, ...) float32 on the CPU: model(x) of all pictures in order, in eval mode."""
    device = next(model.parameters(), torch.empty(0)).device
    model.eval()
    with torch.no_grad():  # not inference_mode: tables that a model keeps from here must serve training too
        batches = squares.loader(batch_size)
        return torch.cat([model(normalise(pixels.to(device), mean, std)).float().cpu() for pixels, _ in batches])


def _train(
    runner: Any,
    model: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    checkpoint: Path,
    progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    """Train the epochs that the checkpoint lacks, in place; returns the curves and the seconds."""
    held_out = Squares(images.val, recipe.img_size)
    truth = torch.tensor(images.val.labels)
    curves: dict[str, list[float]] = {"epoch": [], "train_loss": [], "val_loss": [], "val_accuracy": []}
    latest: list[float] = []

    def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(network(images), labels, label_smoothing=recipe.label_smoothing)

    def after_epoch(network: nn.Module) -> tuple[float, float]:
        logits = outputs(network, held_out, recipe.batch_size, recipe.mean, recipe.std)
        loss = F.cross_entropy(logits, truth)
        check_finite(loss, len(latest), 0, recipe.learning_rate)
        latest.append(float(torchmetrics.functional.accuracy(logits, truth, "multiclass", num_classes=logits.shape[1])))
        return float(loss), latest[-1]

    def say(epoch: int, step: int, steps: int, loss: float) -> None:
        if progress is not None:
            progress(Progress(epoch, recipe.epochs, step, steps, loss, latest[-1] if latest else None))

    return train_epochs(
        runner, model, Squares(images.train, recipe.img_size, training_transform(recipe.img_size, recipe)), recipe,
        checkpoint, loss_of=loss_of, curves=curves, after_epoch=after_epoch, say=say,
    )
