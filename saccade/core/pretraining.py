"""Methods that train a backbone on pictures without labels, by name: what an objective is.

`objective = pretraining(model, "mae", ratio=0.75)` is a module that trains `model` in place, `objective.model`:

- `objective(images) -> {"loss": scalar, ...}`, images (B, C, H, W), normalised; where the attribute `views` is above 1,
  (B, views, C, H, W), so many crops of each picture, each augmented by itself;
- `objective.after_step(share)`, where there is one, after each step of the optimizer, with the share of the training
  that is done: what follows without gradients (a teacher);
- `objective.reconstruct(images)`, where there is one: pictures whose hidden parts are guessed.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from saccade.core.errors import SaccadeError
from saccade.core.index import index, method
from saccade.core.names import closest

KIND = "pretraining"


def list_pretraining() -> list[str]:
    """Names of the methods that `pretraining` knows, sorted."""
    known = index()
    return sorted(name for name, paper in known["methods"].items() if KIND in known["papers"][paper]["kinds"])


def pretraining(model: nn.Module, name: str, **options: Any) -> Any:
    """The objective of a method for a backbone, ours or timm's.

    Raises SaccadeError for an unknown method or option, and for a host that the method cannot train.
    """
    make = method(name, KIND)
    known = [key for key in inspect.signature(make).parameters if key != "model"]
    for key in options:
        if key not in known:
            raise SaccadeError(f"method {name!r} has no option {key!r}{closest(key, known) or f'; it has {known}'}")
    return make(model, **options)
