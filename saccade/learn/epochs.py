"""The one loop that trains: classifiers and what learns without labels, on one process or several.

Every random number of an epoch (order, augmentation, drop path) follows from (seed, epoch, process), what a picture
looks like from (seed, epoch, picture) alone: two processes with half a batch each see what one sees. The state after
each epoch is one file that is replaced in one step, so a run that was killed goes on from its last finished epoch and
ends with the same bits as a run that was left alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DistributedSampler

from saccade.core.errors import SaccadeError
from saccade.core.files import fill_whole
from saccade.core.optional import optional
from saccade.learn.reproducible import seed_of
from saccade.learn.transforms import Squares, normalise

fabric = optional("lightning.fabric", extra="train")
strategies = optional("lightning.fabric.strategies", extra="train")
torchmetrics = optional("torchmetrics", extra="train")
timm_optim = optional("timm.optim", extra="train")
timm_scheduler = optional("timm.scheduler", extra="train")

PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class Schedule:
    """What decides a run besides the model, the images and the loss (defaults: small pictures, from scratch)."""

    epochs: int = 20
    batch_size: int = 64  # of all processes together
    learning_rate: float = 1e-3  # of AdamW, at the end of the warm-up; falls to 0 along a cosine
    img_size: int = 32
    seed: int = 0
    weight_decay: float = 0.05
    warmup: float = 1.0  # epochs of linear rise, at most half of all
    clip: float = 1.0  # largest norm of a gradient
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    accumulate: int = 1  # batches whose gradients make one step
    average: float = 0.0  # of the moving average of the weights, which is then the result; 0: none
    precision: str = "32-true"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "img_size", "accumulate"):
            if not getattr(self, name) > 0:
                raise SaccadeError(f"{name} is {getattr(self, name)}: it must be above 0")
        if not 0 <= self.average < 1:
            raise SaccadeError(f"average is {self.average}: give a share of the old weights, from 0 to below 1")
        if self.precision not in PRECISIONS:
            raise SaccadeError(f"precision is {self.precision!r}: choose {' or '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Devices:
    """Where a run takes place: processes a machine, machines, and how they share the work: "auto" or "ddp"."""

    count: int = 1
    nodes: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        if min(self.count, self.nodes) < 1 or self.strategy not in ("auto", "ddp"):
            raise SaccadeError(f"devices={self.count}, nodes={self.nodes}, strategy={self.strategy!r}: give 1 or more, "
                               "and auto or ddp")

    def start(self, precision: str) -> Any:
        """The processes, each of which goes on from here."""
        many = self.count * self.nodes > 1
        # A loss may leave some parameters out (a head, another modality's embedding).
        strategy = strategies.DDPStrategy(find_unused_parameters=True) if many or self.strategy == "ddp" else "auto"
        runner = fabric.Fabric(devices=self.count, num_nodes=self.nodes, strategy=strategy, precision=precision)
        if many:
            runner.launch()
        return runner


HERE = Devices()  # this process alone
Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of a network, normalised pixels, labels
Say = Callable[[int, int, int, float], None]  # epoch, step, steps an epoch, loss; all count from 1


def train_epochs(
    runner: Any,
    model: nn.Module,
    squares: Squares,
    schedule: Schedule,
    checkpoint: Path,
    *,
    loss_of: Losses,
    curves: dict[str, list[float]],
    after_epoch: Callable[[nn.Module], tuple[float, ...]],
    after_step: Callable[[float], None] | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Train the epochs that the checkpoint lacks, `model` in place; returns {"curves", "seconds"}.

    `curves` names the numbers of an epoch: its number, its mean loss, and what `after_epoch` of the network (in eval
    mode, or its moving average) gives. `after_step` gets the share of the training that is done. Raises SaccadeError
    where the loss is not finite.
    """
    processes = runner.world_size
    if schedule.batch_size % processes:
        raise SaccadeError(f"a batch of {schedule.batch_size} cannot be shared by {processes} processes: round it")
    sampler: DistributedSampler[int] = DistributedSampler(
        squares, processes, runner.global_rank, seed=seed_of(schedule.seed) >> 2, drop_last=True
    )
    loader = squares.loader(min(schedule.batch_size // processes, len(sampler)), sampler)
    batches = len(loader)
    steps = max(batches // schedule.accumulate, 1)

    optimizer = timm_optim.create_optimizer_v2(model, "adamw", schedule.learning_rate, schedule.weight_decay)
    warm = int(steps * min(schedule.warmup, schedule.epochs / 2))
    rates = timm_scheduler.CosineLRScheduler(  # a function of the step number alone: nothing of it to keep
        optimizer,
        t_initial=max(2, steps * schedule.epochs - warm),  # of 1 timm complains
        warmup_t=warm,
        warmup_lr_init=schedule.learning_rate / 100,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    network, optimizer = runner.setup(model, optimizer)
    average = None
    if schedule.average:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(schedule.average), use_buffers=True)
    parts = {"model": model, "optimizer": optimizer} | ({"average": average} if average is not None else {})
    seconds = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=runner.device)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        curves, seconds = state["curves"], state["seconds"]

    for epoch in range(len(curves["epoch"]), schedule.epochs):
        began = time.perf_counter()
        torch.manual_seed(seed_of(schedule.seed, epoch, runner.global_rank))
        squares.reseed(seed_of(schedule.seed, epoch))
        sampler.set_epoch(epoch)
        network.train()
        mean_loss = torchmetrics.MeanMetric().to(runner.device)
        for number, batch in enumerate(loader):
            pixels, labels = runner.to_device(batch)
            step = min(number // schedule.accumulate, steps - 1)
            rates.step_update(epoch * steps + step)
            last = (number + 1) % schedule.accumulate == 0
            with runner.no_backward_sync(network, enabled=not last):
                loss = loss_of(network, normalise(pixels, schedule.mean, schedule.std), labels)
                check_finite(loss.detach(), epoch, number, schedule.learning_rate)
                runner.backward(loss / schedule.accumulate)
            if last:
                runner.clip_gradients(network, optimizer, max_norm=schedule.clip, error_if_nonfinite=False)
                optimizer.step()
                optimizer.zero_grad()
                if average is not None:
                    average.update_parameters(model)
                if after_step is not None:
                    after_step((epoch * steps + step + 1) / (schedule.epochs * steps))
            mean_loss.update(loss.detach())
            if say is not None:
                say(epoch + 1, number + 1, batches, loss.item())

        judged = model if average is None else average.module
        after = (epoch + 1, float(mean_loss.compute()), *after_epoch(judged))
        for curve, value in zip(curves.values(), after, strict=True):
            curve.append(value)
        seconds += time.perf_counter() - began
        if runner.is_global_zero:
            kept = {name: part.state_dict() for name, part in parts.items()} | {"curves": curves, "seconds": seconds}
            fill_whole(checkpoint, partial(torch.save, kept))
        runner.barrier()
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    return {"curves": curves, "seconds": seconds}


def check_finite(loss: Tensor, epoch: int, step: int, learning_rate: float) -> None:
    """Raise where a loss is not finite, with the place and the remedy."""
    if not math.isfinite(loss):
        raise SaccadeError(f"loss became {float(loss)} at epoch {epoch + 1}, step {step + 1}: lower the learning rate "
                           f"(it is {learning_rate:g})")
