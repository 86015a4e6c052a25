"""Training a network that restores pictures, along the library's one training path.

Patches may grow while batches shrink, so that a step sees about as many pixels throughout: progressive training
(Zamir et al., Restormer, 2022). Same-task pre-training (HAT) is the same `fit` on more pictures first, whose weights
the second starts from. The weights kept are a moving average of those trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from saccade.core.errors import SaccadeError
from saccade.learn.average import follow
from saccade.learn.loop import BaseRecipe, Machines, Outcome, Progress, Task, run
from saccade.learn.reproducible import seed_of
from saccade.learn.restoration.losses import weighted
from saccade.learn.restoration.measures import quality
from saccade.learn.restoration.patches import Patches
from saccade.learn.restoration.tiling import Restore
from saccade.learn.transforms import WORKERS

Held = Sequence[tuple[Tensor, Tensor]]  # degraded (1, C, h, w) and clean (1, C, scale h, scale w) pictures


@dataclass(frozen=True)
class Recipe(BaseRecipe):
    """All that decides a run besides the network and the pictures (defaults: a narrow network, minutes).

    An epoch is `steps` steps on patches that were never seen before.
    """

    epochs: int = 10
    batch_size: int = 8  # patches a step, while they have the first of their sizes
    weight_decay: float = 0.0
    steps: int = 200
    patches: tuple[int, ...] = (48,)  # sides in pixels of the network's input, an equal share of the epochs for each
    losses: dict[str, float] = field(default_factory=lambda: {"l1": 1.0})
    average: float = 0.999  # of the moving average; less in the first steps

    def __post_init__(self) -> None:
        super().__post_init__()
        self.above_zero("steps")
        weighted(self.losses)
        if not self.patches or min(self.patches) < 1 or len(self.patches) > self.epochs:
            raise SaccadeError(f"patches are {list(self.patches)}: sides above 0, and at most one for each of the "
                               f"{self.epochs} epochs")
        if not 0 <= self.average < 1:
            raise SaccadeError(f"average is {self.average}: it must be at least 0 and below 1")

    def patch_at(self, epoch: int) -> int:
        """The side of an epoch's patches."""
        return self.patches[epoch * len(self.patches) // self.epochs]

    def batch_at(self, epoch: int) -> int:
        """As many patches as have the pixels of a first batch, rounded, at least one."""
        return max(1, round(self.batch_size * (self.patches[0] / self.patch_at(epoch)) ** 2))


def fit(
    make_model: Callable[[], Any],
    patches: Patches,
    recipe: Recipe,
    folder: Path,
    *,
    held: Held = (),
    machines: Machines | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Train `make_model()`, fresh or with loaded weights; goes on where an earlier call was stopped.

    The folder receives what `train.fit` leaves, weights.safetensors being those of the moving average. After each epoch
    the curves tell PSNR and SSIM on `held` pictures, as `val_psnr_y`, `val_ssim_rgb`, ... Raises SaccadeError where the
    loss is not finite, the folder holds another run, or patches do not fit the network.
    """
    loss_of = weighted(recipe.losses)

    def loss(network: nn.Module, degraded: Tensor, truth: Tensor) -> dict[str, Tensor]:
        made = network(degraded)
        stages = made if isinstance(made, list) else [[made]]
        parts = [loss_of(picture, truth if picture.shape == truth.shape else
                         F.interpolate(truth, size=picture.shape[2:], mode="bilinear"))
                 for stage in stages for picture in stage]
        return {"loss": torch.stack(parts).sum()}

    def make() -> Task:
        model = make_model()
        if patches.scale != model.scale or patches.channels != model.in_chans:
            raise SaccadeError(f"patches of scale {patches.scale} with {patches.channels} channels do not fit a "
                               f"network of scale {model.scale} with {model.in_chans}")
        network = _Network(model)

        def measure(network: nn.Module) -> dict[str, float]:
            device = next(network.parameters()).device
            found = measured(lambda image: network(image.to(device)).float().cpu(), held, model.scale)
            return {f"val_{name}": value for name, value in found.items()}

        def after_step(share: float) -> None:
            done = round(share * recipe.steps * recipe.epochs)
            follow(network.average, network.model, min(recipe.average, done / (9 + done)))

        return Task(network, _Epochs(patches, recipe), patches.fingerprint, loss, measure, after_step, "average")

    return run(make, recipe, folder, machines or Machines(), progress)


def measured(restore: Restore, held: Held, scale: int) -> dict[str, float]:
    """PSNR and SSIM of what `restore` makes of degraded pictures, less `scale` pixels of border: means over them."""
    with torch.no_grad():
        rows = [quality(restore(degraded), truth, scale if scale > 1 else 0) for degraded, truth in held]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


class _Network(nn.Module):
    """A network while it trains; at evaluation the moving average of its weights, which is the result.

    One with `stages` (MAXIM) is supervised in each of them, at each scale.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.average = model, copy.deepcopy(model).requires_grad_(False)

    def forward(self, image: Tensor) -> Any:
        if not self.training:
            return self.average(image)
        model: Any = self.model
        return model.stages(image) if hasattr(model, "stages") else model(image)


class _Epochs(Dataset[tuple[Tensor, Tensor]]):
    """The patches of one epoch; of each epoch others."""

    def __init__(self, patches: Patches, recipe: Recipe) -> None:
        self.patches, self.recipe = patches, recipe
        self.begin(0, 0)

    def begin(self, epoch: int, seed: int) -> None:
        self.side, self.seed = self.recipe.patch_at(epoch), seed
        self.count = self.recipe.steps * self.recipe.batch_at(epoch)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.patches[seed_of(self.seed, i), self.side]

    def loader(self, batch_size: int, sampler: Sampler[int]) -> DataLoader[Any]:
        workers = WORKERS if self.patches.kept is None else 0
        return DataLoader(self, batch_size, sampler=sampler, drop_last=True, num_workers=workers)
