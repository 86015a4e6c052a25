"""Training a network that restores pictures, so that the result depends on the recipe alone.

A recipe is a list of stages, each so many steps on patches of one size: progressive training lets patches grow and
batches shrink (Zamir et al., Restormer, 2022). Same-task pre-training (HAT) is the same `fit` on more pictures first,
whose weights the second starts from. The weights kept are a moving average of those trained.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from saccade.core.errors import SaccadeError
from saccade.core.files import fill_whole, write_whole
from saccade.learn.average import follow
from saccade.learn.reproducible import claim, describe, reproducible, seed_of, tensors
from saccade.learn.restoration.losses import weighted
from saccade.learn.restoration.patches import Patches

Key = tuple[int, int]  # number and side of a patch


@dataclass(frozen=True)
class Stage:
    """So many steps on batches of square patches; `patch` in pixels of the network's input."""

    steps: int
    patch: int
    batch: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise SaccadeError(f"{name} is {value}: a stage needs 1 or more")


@dataclass(frozen=True)
class Recipe:
    """All that decides a run besides the network and the pictures (defaults: a narrow network, minutes)."""

    stages: tuple[Stage, ...] = (Stage(1000, 48, 8),)
    learning_rate: float = 1e-3  # of Adam, falls to 0 along a cosine; HAT's own is 2e-4
    warmup: int = 50  # steps of linear rise
    losses: dict[str, float] = field(default_factory=lambda: {"l1": 1.0})
    average: float = 0.999  # of the moving average; less in the first steps
    clip: float = 1.0  # largest norm of a gradient
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


@dataclass(frozen=True)
class Step:
    """Where a run stands; steps count from 1."""

    step: int
    steps: int
    loss: float


def fit(
    make_model: Callable[[], nn.Module],
    patches: Patches,
    recipe: Recipe,
    folder: Path,
    *,
    start: Path | None = None,
    keep_every: int = 200,
    workers: int = 0,
    progress: Callable[[Step], None] | None = None,
) -> nn.Module:
    """Train `make_model()`, from the weights in `start` where given; goes on where an earlier call was stopped.

    The folder receives recipe.json, last.ckpt (every `keep_every` steps), then weights.safetensors and losses.json; a
    finished folder is read, not trained again. Returns the moving average, in evaluation mode. `workers` processes cut
    patches. Raises SaccadeError where the loss is not finite, or the folder holds another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, checkpoint = folder / "weights.safetensors", folder / "last.ckpt"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with reproducible():
        torch.manual_seed(seed_of(recipe.seed))
        model = make_model()
        if start is not None:
            model.load_state_dict(load_file(start))
        if patches.scale != model.scale or patches.channels != model.in_chans:
            raise SaccadeError(f"patches of scale {patches.scale} with {patches.channels} channels do not fit a "
                               f"network of scale {model.scale} with {model.in_chans}")
        claim(folder / "recipe.json", asdict(recipe) | {"patches": patches.fingerprint, "model": describe(model)})
        if not weights.exists():
            run = _Run(model.to(device), recipe, checkpoint)
            run.train(patches, keep_every, workers, progress)
            write_whole(folder / "losses.json", json.dumps(run.losses))
            fill_whole(weights, lambda part: save_file(tensors(run.average), part))
    checkpoint.unlink(missing_ok=True)
    model.load_state_dict(load_file(weights))
    return model.to(device).eval()


class _Run:
    """The state of a run between two steps."""

    def __init__(self, model: nn.Module, recipe: Recipe, checkpoint: Path) -> None:
        self.model, self.recipe, self.checkpoint = model, recipe, checkpoint
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate, betas=(0.9, 0.99))
        self.losses: list[float] = []
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses = state["losses"]

    def keep(self) -> None:
        state: dict[str, Any] = {"model": self.model.state_dict(), "average": self.average.state_dict(),
                                 "optimizer": self.optimizer.state_dict(), "losses": self.losses}
        fill_whole(self.checkpoint, lambda part: torch.save(state, part))

    def train(
        self, patches: Patches, keep_every: int, workers: int, progress: Callable[[Step], None] | None
    ) -> None:
        batches: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            patches, batch_sampler=list(_keys(self.recipe, len(self.losses))), num_workers=workers)
        loss_of = weighted(self.recipe.losses)
        device = next(self.model.parameters()).device
        self.model.train()
        for degraded, truth in batches:
            step = len(self.losses)
            torch.manual_seed(seed_of(self.recipe.seed, step))  # of drop path
            for group in self.optimizer.param_groups:
                group["lr"] = _rate(self.recipe, step)
            loss = loss_of(self.model(degraded.to(device)), truth.to(device))
            if not math.isfinite(value := loss.item()):
                raise SaccadeError(f"loss became {value} at step {step + 1}: lower the learning rate "
                                   f"(it is {self.recipe.learning_rate:g})")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            self.optimizer.step()
            follow(self.average, self.model, min(self.recipe.average, (1 + step) / (10 + step)))
            self.losses.append(value)
            if progress is not None:
                progress(Step(step + 1, self.recipe.steps, value))
            if (step + 1) % keep_every == 0:
                self.keep()


def _keys(recipe: Recipe, done: int) -> Iterator[list[Key]]:
    """The patches of each step after the first `done`; a patch is never used twice."""
    step = number = 0
    for stage in recipe.stages:
        for _ in range(stage.steps):
            if step >= done:
                yield [(number + place, stage.patch) for place in range(stage.batch)]
            step, number = step + 1, number + stage.batch


def _rate(recipe: Recipe, step: int) -> float:
    warm = min(1.0, (step + 1) / max(recipe.warmup, 1))
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
