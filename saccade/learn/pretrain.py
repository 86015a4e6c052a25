"""Training a backbone without labels, along the library's one training path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from saccade.core.errors import SaccadeError
from saccade.core.optional import optional
from saccade.core.pretraining import Objective
from saccade.learn.average import follow
from saccade.learn.data import Split
from saccade.learn.features import features, spread
from saccade.learn.loop import Machines, Outcome, Progress, SquaresRecipe, Task, run
from saccade.learn.transforms import Items, Squares

utilities = optional("lightning.fabric.utilities", extra="train")
v2 = optional("torchvision.transforms.v2", extra="train")

WATCHED = 256  # pictures whose features are measured after each epoch


@dataclass(frozen=True)
class Recipe(SquaresRecipe):
    """All that decides a pre-training besides the objective and the pictures."""

    average: float = 0.0  # of the moving average of the weights, which is then the result; 0: the weights themselves
    smallest_crop: float = 0.2  # share of the picture that a crop shows at least
    flip: bool = True  # views may be mirrored: not for digits or writing

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.average < 1:
            raise SaccadeError(f"average is {self.average}: it must be at least 0 and below 1")
        if not 0 < self.smallest_crop <= 1:
            raise SaccadeError(f"smallest_crop is {self.smallest_crop}: it must be above 0 and at most 1")


class Source(Protocol):
    """What can be learned from without labels."""

    def first(self, count: int) -> Source:
        """Up to `count` of them."""
        ...

    def items(self, recipe: Recipe, views: int) -> Items:
        """So many augmented views of each; 0: each as it is."""
        ...


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """The pictures of a split, its labels left aside."""

    split: Split

    def first(self, count: int) -> Unlabelled:
        split = self.split
        return Unlabelled(Split(split.sources[:count], split.labels[:count], split.paths[:count]))

    def items(self, recipe: Recipe, views: int) -> Items:
        if not views:
            return Squares(self.split, recipe.img_size)
        augment = views_transform(recipe.img_size, views, recipe)
        return Squares(self.split, recipe.img_size, augment, side=recipe.img_size * 3 // 2)


def fit(
    make_objective: Callable[[], nn.Module],
    pictures: Split | Source,
    fingerprint: str,
    recipe: Recipe,
    folder: Path,
    *,
    machines: Machines | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Train the model of `make_objective()` on what it takes; go on where an earlier call was stopped.

    The folder receives what `train.fit` leaves, weights.safetensors being those of `objective.model` alone. The curves
    tell each scalar of the objective and, of the first pictures, `feature_std` and `effective_rank`: where they fall
    towards 0 and 1 the features collapse. Raises SaccadeError where the loss is not finite, or where the folder holds
    another run.
    """
    source = Unlabelled(pictures) if isinstance(pictures, Split) else pictures
    measured = source.first(WATCHED).items(recipe, 0)

    def loss(network: nn.Module, batch: Any, labels: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = network(measured.normalised(batch, recipe.mean, recipe.std))
        return found

    def measure(network: nn.Module) -> dict[str, float]:
        device, found = next(network.parameters()).device, []
        with torch.no_grad():
            for batch, _ in measured.loader(recipe.batch_size):
                inputs = utilities.move_data_to_device(batch, device)
                inputs = measured.normalised(inputs, recipe.mean, recipe.std)
                found.append(network(inputs, features_only=True).float().cpu())
        return spread(torch.cat(found))

    def make() -> Task:
        objective = make_objective()
        if not isinstance(objective, Objective):
            raise SaccadeError(f"{type(objective).__name__} has no `model`: an objective keeps what it trains there")
        items = source.items(recipe, getattr(objective, "views", 1))
        network = _Network(objective, recipe.average)
        kept = "average" if recipe.average else "objective.model"
        return Task(network, items, fingerprint, loss, measure, network.after_step, kept)

    return run(make, recipe, folder, machines or Machines(), progress)


def views_transform(img_size: int, views: int, recipe: Recipe) -> Callable[[Tensor], Tensor]:
    """(3, T, T) uint8 -> (3, S, S), or (V, 3, S, S): crops of random place, size and shape, mirrored.

    Where there are several views their colours differ too, lest they be told by those.
    """
    def steps(hue: float) -> Any:
        found: list[Any] = [v2.RandomResizedCrop(img_size, (recipe.smallest_crop, 1.0), antialias=True)]
        if recipe.flip:
            found.append(v2.RandomHorizontalFlip())
        if views > 1:
            found += [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, hue)], 0.8), v2.RandomGrayscale(0.2)]
        return v2.Compose(found)

    coloured, gray = steps(0.1), steps(0.0)  # to turn a hue takes longer than all else, and gray has none

    def several(pixels: Tensor) -> Tensor:
        one = gray if (pixels == pixels[:1]).all() else coloured
        return torch.stack([one(pixels) for _ in range(views)])

    return coloured if views == 1 else several


def try_once(objective: Any, source: Source, recipe: Recipe) -> None:
    """One loss of two items, nothing kept: raises what the objective says of their kind or size."""
    items = source.first(1).items(recipe, getattr(objective, "views", 1))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        items.begin(0, recipe.seed)
        pair = default_collate([items[0][0]] * 2)
        objective(items.normalised(pair, recipe.mean, recipe.std))


class _Network(nn.Module):
    """An objective, the moving average of its model where one is asked for, and the way to the features of both.

    One module, so that several processes share, part and keep all of it alike.
    """

    def __init__(self, objective: nn.Module, average: float) -> None:
        super().__init__()
        self.objective, self.share = objective, average
        self.average: nn.Module | None = copy.deepcopy(self.model).requires_grad_(False) if average else None

    @property
    def model(self) -> nn.Module:
        """What the objective trains."""
        model: nn.Module = self.objective.model  # type: ignore[assignment]
        return model

    def no_weight_decay(self) -> set[str]:
        """What the objective and its model do not let decay."""
        owners = {"objective": self.objective, "objective.model": self.model}
        return {f"{place}.{name}" for place, owner in owners.items() if hasattr(owner, "no_weight_decay")
                for name in owner.no_weight_decay()}  # type: ignore[operator]

    def forward(self, inputs: Any, features_only: bool = False) -> Any:
        if not features_only:
            return self.objective(inputs)
        return features(self.model if self.average is None else self.average, inputs)

    @torch.no_grad()
    def after_step(self, share: float) -> None:
        """The objective's own step, then average = a average + (1 - a) model."""
        if hasattr(self.objective, "after_step"):
            self.objective.after_step(share)  # type: ignore[operator]
        if self.average is not None:
            follow(self.average, self.model, self.share)
