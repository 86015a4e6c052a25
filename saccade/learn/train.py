"""Training a classifier, along the library's one training path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.optional import optional
from saccade.learn.loop import Machines, Outcome, Progress, SquaresRecipe, Task, run
from saccade.learn.transforms import Squares, normalise, training_transform

if TYPE_CHECKING:
    from saccade.learn.data import ImageSet, Split

torchmetrics = optional("torchmetrics", extra="train")


@dataclass(frozen=True)
class Recipe(SquaresRecipe):
    """All that decides a run's result besides the model and the images (defaults: small pictures, from scratch)."""

    drop_path_rate: float = 0.0  # what make_model builds with: a change of it is another run
    label_smoothing: float = 0.1
    augment: bool = True
    flip: bool = True  # augmentation may mirror: not for digits or writing


def fit(
    make_model: Callable[[], nn.Module],
    images: ImageSet,
    recipe: Recipe,
    folder: Path,
    *,
    machines: Machines | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Train `make_model()` (fresh or with loaded weights) on images.train; go on where an earlier call was stopped.

    The folder receives recipe.json, last.ckpt (while training), then weights.safetensors and curves.json; a finished
    folder is read, not trained again. The result is the last epoch's: images.val gives curves, images.test is not seen.
    Raises SaccadeError where the loss is not finite, or where the folder holds another run. Random numbers are torch's;
    the caller's state of them is as before afterwards.
    """
    truth = torch.tensor(images.val.labels)

    def loss(network: nn.Module, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = network(normalise(pixels, recipe.mean, recipe.std))
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)}

    def measure(network: nn.Module) -> dict[str, float]:
        logits = outputs(network, Squares(images.val, recipe.img_size), recipe.batch_size, recipe.mean, recipe.std)
        accuracy = torchmetrics.functional.accuracy(logits, truth, "multiclass", num_classes=logits.shape[1])
        return {"val_loss": float(F.cross_entropy(logits, truth)), "val_accuracy": float(accuracy)}

    def make() -> Task:
        squares = Squares(images.train, recipe.img_size, training_transform(recipe.img_size, recipe))
        return Task(make_model(), squares, images.fingerprint, loss, measure)

    return run(make, recipe, folder, machines or Machines(), progress)


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
