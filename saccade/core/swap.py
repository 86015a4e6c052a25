"""Another token mixer where one stands, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from saccade.core.errors import SaccadeError
from saccade.core.names import matching
from saccade.core.site import MixerFactory, Site


class Handle:
    """What `swap` gives: puts the modules `new` {name: module} into a model and keeps those that stood there.

    Each takes the device, dtype and training flag of the one it replaces, there and back.
    """

    def __init__(self, model: nn.Module, new: Mapping[str, nn.Module], hooks: Iterable[Any] = ()) -> None:
        self.names = list(new)
        self._hooks = list(hooks)
        self._changes = []
        for name, module in new.items():
            path, _, child = name.rpartition(".")
            owner = model.get_submodule(path)
            self._changes.append((name, owner, child, getattr(owner, child), module))
            _replace(owner, child, module)

    def __repr__(self) -> str:
        return f"Handle({', '.join(self.names)})"

    def undo(self) -> None:
        """Put the very same modules back; once is enough. Raises where one of them was swapped again since."""
        for name, owner, child, _, new in self._changes:
            if getattr(owner, child) is not new:
                raise SaccadeError(f"{name} was swapped again since: undo that swap first")
        for _, owner, child, old, _ in self._changes:
            _replace(owner, child, old)
        for hook in self._hooks:
            hook.remove()
        self._changes, self._hooks = [], []


def own_blocks(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Our blocks whose mixer the pattern names (`stages.2.*.mixer`, or the block itself), by name."""
    return {name: block for name, block in model.named_modules()
            if isinstance(getattr(block, "site", None), Site) and hasattr(block, "mixer")
            and matching([name, f"{name}.mixer".lstrip(".")], pattern)}


def swap_own(
    model: nn.Module, blocks: Mapping[str, nn.Module], factory: MixerFactory, keep_weights: bool,
    fit: Callable[[nn.Module, nn.Module], nn.Module],
) -> Handle:
    """Build a mixer at the site of each block; `fit(block, mixer)` is the mixer as that block calls it."""
    new = {}
    for block_name, block in blocks.items():
        name, mixer = f"{block_name}.mixer".lstrip("."), factory(block.site)  # type: ignore[arg-type]
        new[name] = fit(block, mixer)
        if keep_weights:
            keep_template(name, block.mixer, mixer)  # type: ignore[arg-type]
    return Handle(model, new)


def keep_template(name: str, old: nn.Module, new: nn.Module) -> None:
    """Copy the trained projections that both mixers call their template; raises where one has no equal."""
    for source, target in zip(_template(name, old), _template(name, new), strict=True):
        given, wanted = source.state_dict(), target.state_dict()
        for key in sorted(given.keys() | wanted.keys()):
            shapes = [tuple(state[key].shape) if key in state else "missing" for state in (given, wanted)]
            if shapes[0] != shapes[1]:
                raise SaccadeError(f"keep_weights: the {key} of a projection of {name} is {shapes[0]} in the old and "
                                   f"{shapes[1]} in the new mixer; swap without keep_weights")
        target.load_state_dict(given)


def _template(name: str, mixer: nn.Module) -> list[nn.Module]:
    """The template projections of a mixer: those it declares, else qkv and proj, where it has nothing else."""
    while not hasattr(mixer, "template") and isinstance(inner := getattr(mixer, "mixer", None), nn.Module):
        mixer = inner  # a Slot or a PrefixBlind
    template = getattr(mixer, "template", None)
    if template is None:
        held = sorted({key.partition(".")[0] for key, _ in mixer.named_parameters()})
        if held != ["proj", "qkv"]:
            raise SaccadeError(f"keep_weights: {type(mixer).__name__} at {name} declares no template and holds "
                               f"{', '.join(held) or 'nothing'}, not just qkv and proj; swap without keep_weights")
        template = ("qkv", "proj")
    return [mixer.get_submodule(part) for part in template]


def _replace(owner: nn.Module, child: str, module: nn.Module) -> None:
    replaced = getattr(owner, child)
    for place in (replaced, owner):
        reference = next((tensor for tensor in place.parameters() if tensor.is_floating_point()), None)
        if reference is not None:
            module.to(reference.device, reference.dtype)
            break
    if module.training != replaced.training:
        module.train(replaced.training)
    setattr(owner, child, module)
