"""Training a classifier so that the result depends on the recipe alone: not on interruptions, processes or timing.

Every random number of an epoch (order, augmentation, drop path) follows from (seed, epoch). The state after each epoch
is kept in one file that is replaced in one step, so a run that was killed goes on from its last finished epoch and ends
with the same bits as a run that was left alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from saccade.core.errors import SaccadeError
from saccade.core.files import fill_whole, write_whole
from saccade.core.optional import optional
from saccade.learn.reproducible import claim, describe, reproducible, seed_of, tensors
from saccade.learn.transforms import Squares, normalise, training_transform

if TYPE_CHECKING:
    from saccade.learn.data import ImageSet, Split

fabric = optional("lightning.fabric", extra="train")
torchmetrics = optional("torchmetrics", extra="train")
timm_optim = optional("timm.optim", extra="train")
timm_scheduler = optional("timm.scheduler", extra="train")


@dataclass(frozen=True)
class Recipe:
    """All that decides a run's result besides the model and the images (defaults: small pictures, from scratch)."""

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3  # of AdamW, at the end of the warm-up; falls to 0 along a cosine
    img_size: int = 32
    seed: int = 0
    weight_decay: float = 0.05
    warmup: float = 1.0  # epochs of linear rise, at most half of all
    clip: float = 1.0  # largest norm of a gradient
    drop_path_rate: float = 0.0  # what make_model builds with: a change of it is another run
    label_smoothing: float = 0.1
    augment: bool = True
    flip: bool = True  # augmentation may mirror: not for digits or writing
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "img_size"):
            if not getattr(self, name) > 0:
                raise SaccadeError(f"{name} is {getattr(self, name)}: it must be above 0")


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
        claim(folder / "recipe.json", mine)
        runner = fabric.Fabric(devices=1)
        if not (weights.exists() and curves.exists()):
            state = _train(runner, model, images, recipe, folder / "last.ckpt", progress)
            fill_whole(weights, lambda path: save_file(tensors(model), path))
            written = json.dumps({"seconds": state["seconds"], "curves": state["curves"]}, indent=1)
            write_whole(curves, written)
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
    """Train the epochs that the checkpoint lacks, in place; returns the state with curves and seconds."""
    squares = Squares(images.train, recipe.img_size, training_transform(recipe.img_size, recipe))
    held_out = Squares(images.val, recipe.img_size)
    truth = torch.tensor(images.val.labels)
    sampler: DistributedSampler[int] = DistributedSampler(
        squares, runner.world_size, runner.global_rank, seed=seed_of(recipe.seed) >> 2, drop_last=True
    )
    loader = squares.loader(min(recipe.batch_size, len(sampler)), sampler)
    steps = len(loader)

    optimizer = timm_optim.create_optimizer_v2(model, "adamw", recipe.learning_rate, recipe.weight_decay)
    warm = int(steps * min(recipe.warmup, recipe.epochs / 2))
    schedule = timm_scheduler.CosineLRScheduler(  # a function of the step number alone: nothing of it to keep
        optimizer,
        t_initial=max(2, steps * recipe.epochs - warm),  # of 1 timm complains
        warmup_t=warm,
        warmup_lr_init=recipe.learning_rate / 100,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    network, optimizer = runner.setup(model, optimizer)
    curves: dict[str, list[float]] = {"epoch": [], "train_loss": [], "val_loss": [], "val_accuracy": []}
    state: dict[str, Any] = {"model": network, "optimizer": optimizer, "curves": curves, "seconds": 0.0}
    if checkpoint.exists():
        runner.load(checkpoint, state, weights_only=True)
        curves = state["curves"]

    for epoch in range(len(curves["epoch"]), recipe.epochs):
        began = time.perf_counter()
        torch.manual_seed(seed_of(recipe.seed, epoch, runner.global_rank))
        squares.reseed(seed_of(recipe.seed, epoch))
        sampler.set_epoch(epoch)
        network.train()
        mean_loss = torchmetrics.MeanMetric().to(runner.device)
        for step, batch in enumerate(loader):
            pixels, labels = runner.to_device(batch)
            schedule.step_update(epoch * steps + step)
            logits = network(normalise(pixels, recipe.mean, recipe.std))
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            _check_finite(loss.detach(), epoch, step, recipe)
            runner.backward(loss)
            runner.clip_gradients(network, optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            mean_loss.update(loss.detach())
            if progress is not None:
                accuracy = curves["val_accuracy"][-1] if epoch else None
                progress(Progress(epoch + 1, recipe.epochs, step + 1, steps, loss.item(), accuracy))

        logits = outputs(network, held_out, recipe.batch_size, recipe.mean, recipe.std)
        val_loss = F.cross_entropy(logits, truth)
        _check_finite(val_loss, epoch, steps - 1, recipe)
        accuracy = torchmetrics.functional.accuracy(logits, truth, "multiclass", num_classes=logits.shape[1])
        after = (epoch + 1, float(mean_loss.compute()), float(val_loss), float(accuracy))
        for curve, value in zip(curves.values(), after, strict=True):
            curve.append(value)
        state["seconds"] += time.perf_counter() - began
        fill_whole(checkpoint, lambda path: runner.save(path, state))
    return state


def _check_finite(loss: Tensor, epoch: int, step: int, recipe: Recipe) -> None:
    if not math.isfinite(loss):
        raise SaccadeError(
            f"loss became {float(loss)} at epoch {epoch + 1}, step {step + 1}: "
            f"lower the learning rate (it is {recipe.learning_rate:g})"
        )
