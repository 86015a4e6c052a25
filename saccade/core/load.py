"""Loading a checkpoint with every key accounted for, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from saccade.core.checkpoint import read_checkpoint
from saccade.core.errors import SaccadeError
from saccade.core.features import FeaturesOnly
from saccade.core.index import model_paper, paper_module
from saccade.core.keymap import KeyMap, Renamed, rename
from saccade.core.names import matching

# Layout name -> the attribute of the paper's file that holds its key map.
LAYOUTS = {"authors": "AUTHORS", "timm": "TIMM", "flax": "FLAX"}


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint: `loaded` of the model's `of` entries came from it.

    `left` names entries that were neither loaded nor known (empty unless an error was raised), `dropped` maps names to
    the reason why the model does not need them, `fresh` are the model's entries that kept their initial values, and
    `resized` those that were resampled to the model's grid or input channels.
    """

    format: str
    loaded: int
    of: int
    left: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)


def load(model: nn.Module, checkpoint: str | Path | Mapping[str, Tensor], fresh: Sequence[str] = ()) -> LoadReport:
    """Load the authors', timm's or our own checkpoint into a model made by `create_model`.

    The layout is recognised by its names. `fresh` lists patterns of our names that shall keep their initial values
    (`("head.*",)` for another set of classes). Tables bound to a size are resampled to the model's grid; the first
    convolution is summed or repeated for another number of input channels. Raises SaccadeError, and changes nothing,
    where an entry of the file or of the model is not accounted for.
    """
    name = getattr(model, "name", None)
    if not isinstance(name, str):
        raise SaccadeError(f"{type(model).__name__} was not made by create_model: its checkpoint layouts are unknown")
    inner = model.model if isinstance(model, FeaturesOnly) else model
    state = read_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else dict(checkpoint)
    target = inner.state_dict()
    layout, renamed = _recognise(state, target, key_maps(name))
    return _fill(inner, name, layout, renamed, target, fresh)


def key_maps(name: str) -> dict[str, KeyMap]:
    """The key maps of a model's paper, by layout; our own names are the layout `saccade`."""
    module = paper_module(model_paper(name))
    maps: dict[str, KeyMap] = {"saccade": ()}
    for layout, attribute in LAYOUTS.items():
        if hasattr(module, attribute):
            rules = getattr(module, attribute)
            maps[layout] = rules(name) if callable(rules) else rules  # where it differs from model to model
    return maps


def _recognise(state: dict[str, Tensor], target: dict[str, Tensor], maps: dict[str, KeyMap]) -> tuple[str, Renamed]:
    best: tuple[int, str, Renamed] | None = None
    for layout, rules in maps.items():
        renamed = rename(state, rules)
        fitting = sum(key in target for key in renamed.state)
        if best is None or fitting > best[0]:
            best = (fitting, layout, renamed)
    assert best is not None  # the empty map of our own layout never fails
    return best[1], best[2]


def _fill(
    model: nn.Module, name: str, layout: str, renamed: Renamed, target: dict[str, Tensor], fresh: Sequence[str]
) -> LoadReport:
    for pattern in fresh:
        if not matching(target, pattern):
            raise SaccadeError(f"fresh={pattern!r} matches no entry of {name}")
    kept = {key for pattern in fresh for key in matching(target, pattern)}
    values: dict[str, Tensor] = {}
    left: list[str] = []
    dropped = dict(renamed.dropped)
    resized: list[str] = []
    wrong: list[str] = []
    removed = tuple(f"{head}." for head in getattr(model, "removed", ()))
    for key, value in renamed.state.items():
        if key in kept:
            dropped[key] = "listed in fresh"
        elif key not in target:
            if key.startswith(removed):
                dropped[key] = "the model was made without it"
            else:
                left.extend(renamed.sources[key])
        elif value.shape == target[key].shape:
            values[key] = value
        else:
            fitted = _refit(model, key, value, target[key])
            if fitted is None:
                wrong.append(f"{key} is {tuple(value.shape)} in the file, {tuple(target[key].shape)} in {name}")
            else:
                values[key] = fitted
                resized.append(key)
    missing = [key for key in target if key not in values and key not in kept
               and not key.endswith("num_batches_tracked") and not any(note.startswith(f"{key} is ") for note in wrong)]
    if not values:
        raise SaccadeError(f"this is not a checkpoint of {name}: none of its {len(renamed.state)} entries fits "
                           f"(it has {', '.join(list(renamed.state)[:3])}, ...)")
    if wrong and all(note.startswith("head") for note in wrong) and not missing and not left:
        patterns = tuple(sorted({f"{note.split()[0].rsplit('.', 1)[0]}.*" for note in wrong}))
        raise SaccadeError(f"{wrong[0]}: to keep the rest and start the head anew write fresh={patterns!r}")
    problems = [
        *wrong[:3],
        *([f"{len(missing)} entries of the model are not in the file ({_some(missing)})"] if missing else []),
        *([f"{len(left)} entries of the file are not in the model ({_some(left)})"] if left else []),
    ]
    if problems:
        raise SaccadeError(f"the checkpoint does not fit {name} (read as {layout} layout): {'; '.join(problems)}")
    with torch.no_grad():
        for key, value in values.items():
            target[key].copy_(value)
    return LoadReport(layout, len(values), len(target), [], dropped, sorted(kept), resized)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _refit(model: nn.Module, key: str, value: Tensor, target: Tensor) -> Tensor | None:
    """`value` resampled for the model's own grid or input channels; None where neither explains the difference."""
    owner = model.get_submodule(key.rpartition(".")[0])
    parameter = key.rpartition(".")[2]
    resize = getattr(owner, "resize", None)
    if callable(resize):
        fitted = resize(parameter, value)
        if isinstance(fitted, Tensor) and fitted.shape == target.shape:
            return fitted
    image = _reads_image(model, owner)
    if image and parameter == "weight" and value.ndim == target.ndim and value.shape[2:] == target.shape[2:]:
        return _input_channels(value, target.shape[1]) if value.shape[0] == target.shape[0] else None
    return None


def _reads_image(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a convolution takes the image: the model's first, or one of several beside each other in the stem."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if not isinstance(layer, kinds):
        return False
    stem = getattr(model, "stem", nn.Identity()).modules()
    beside = layer.in_channels == getattr(model, "in_chans", None) and any(part is layer for part in stem)
    return beside or layer is next(module for module in model.modules() if isinstance(module, kinds))


def _input_channels(weight: Tensor, channels: int) -> Tensor:
    """First convolution for another number of input channels: summed for one, else repeated, its sum kept."""
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeats = -(-channels // weight.shape[1])
    return weight.repeat(1, repeats, *[1] * (weight.ndim - 2))[:, :channels] * (weight.shape[1] / channels)
