"""Another token mixer where one stands, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
            if isinstance(getattr(block, "site", None), Site) and isinstance(getattr(block, "mixer", None), nn.Module)
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
            keep_projections(name, block.mixer, mixer)  # type: ignore[arg-type]
    return Handle(model, new)


# How softmax attention elsewhere names its projections of queries, keys and values, and the one of its output.
QUERY_KEY_VALUE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q", "kv"))
OUTPUT = ("o_proj", "out_proj", "dense")
POSITION = "relative_position_bias"  # parameters so named stay behind, as the biases of our own mixers do


def keep_projections(name: str, old: nn.Module, new: nn.Module) -> None:
    """Copy the trained projections that both mixers declare; raises where one has no equal."""
    target = _innermost(new)
    kept = {f"{part}.{key}": value for part, state in zip(_declared(name, new), _projections(name, old), strict=True)
            for key, value in state.items()}
    wanted = {f"{part}.{key}": value for part in _declared(name, new)
              for key, value in target.get_submodule(part).state_dict().items()}
    for key in sorted(kept.keys() | wanted.keys()):
        shapes = [tuple(state[key].shape) if key in state else "missing" for state in (kept, wanted)]
        if shapes[0] != shapes[1]:
            raise SaccadeError(f"keep_weights: {key} of {name} is {shapes[0]} in the old and {shapes[1]} in the new "
                               "mixer; swap without keep_weights")
    target.load_state_dict(kept, strict=False)


def _innermost(mixer: nn.Module) -> nn.Module:
    """The mixer itself, out of a Slot or a PrefixBlind."""
    while not hasattr(mixer, "projections") and isinstance(inner := getattr(mixer, "mixer", None), nn.Module):
        mixer = inner
    return mixer


def _declared(name: str, mixer: nn.Module) -> tuple[str, ...]:
    """Names of the projections that a mixer of ours declares: of queries, keys and values, and of its output."""
    projections = getattr(_innermost(mixer), "projections", None)
    if projections is None:
        raise SaccadeError(f"keep_weights: {type(_innermost(mixer)).__name__} at {name} declares no projections: "
                           "it has none of those of softmax attention; swap without keep_weights")
    return tuple(projections)


def _projections(name: str, mixer: nn.Module) -> list[dict[str, Tensor]]:
    """The states of the projections: those declared, else qkv and proj of a softmax attention without more."""
    mixer = _innermost(mixer)
    if hasattr(mixer, "projections"):
        return [mixer.get_submodule(part).state_dict() for part in mixer.projections]  # type: ignore[union-attr]
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in mixer.named_parameters():
        if POSITION in key:
            continue
        owner, _, entry = key.replace("in_proj_", "qkv.").rpartition(".")  # nn.MultiheadAttention's
        parts.setdefault(owner.rpartition(".")[2], {})[entry] = value.detach()
    held = sorted(parts)
    for names in QUERY_KEY_VALUE:
        if parts.keys() >= set(names):
            parts["qkv"] = _joined([parts.pop(part) for part in names])
    for output in OUTPUT:
        if output in parts:
            parts["proj"] = parts.pop(output)
    if parts.keys() != {"qkv", "proj"}:
        raise SaccadeError(f"keep_weights: {type(mixer).__name__} at {name} holds {', '.join(held) or 'nothing'}, not "
                           "just projections of queries, keys, values and output; swap without keep_weights")
    return [parts["qkv"], parts["proj"]]


def _joined(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Separate linear layers as one; where only some have a bias, the others' is zero."""
    joined = {"weight": torch.cat([state["weight"] for state in states])}
    if any("bias" in state for state in states):
        joined["bias"] = torch.cat([state.get("bias", state["weight"].new_zeros(len(state["weight"])))
                                    for state in states])
    return joined


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
