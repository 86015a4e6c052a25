"""What a port is, and how one is compared with its golden."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.keymap import KeyMap, rename
from saccade.parts.reparameterize import reparameterize
from saccade.tools.golden import Golden, cotangent, make_inputs, make_state, mismatch
from saccade.tools.verify import DEPLOYED, like, run_tapped

State = dict[str, Tensor]


def only_input(inputs: State) -> tuple[Tensor, ...]:
    """The golden's inputs as they are, in their order."""
    return tuple(inputs.values())


def only_output(result: Any) -> State:
    """One tensor is `out`."""
    return {"out": result}


@dataclass
class Port:
    """A module of ours that answers a golden.

    `rename` turns the authors' state into the module's (differentiably), `inputs` the golden's inputs into the module's
    arguments, `outputs` what the module returns into the golden's outputs by name. `taps` names inner modules whose
    outputs the golden holds too; `unused` counts the parameters that the authors' code makes and never calls.
    """

    module: nn.Module
    rename: Callable[[State], State]
    inputs: Callable[[State], tuple[Any, ...]] = only_input
    outputs: Callable[[Any], State] = only_output
    taps: dict[str, str] | None = None
    unused: int = 0


class Function(nn.Module):
    """A function without parameters as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def unused(golden: Golden, rules: KeyMap) -> int:
    """How many of a golden's parameters (not buffers) a key map drops."""
    parameters = {name for name, _, kind in golden["state"] if kind == "param"}
    state = make_state(golden)
    return sum(state[name].numel() for name in rename(state, rules).dropped if name in parameters)


def key_map(rules: KeyMap) -> Callable[[State], State]:
    """A port's `rename` from a paper's key map."""
    return lambda state: rename(state, rules).state


def as_grid(grid: tuple[int, ...] | list[int]) -> Callable[[State], tuple[Tensor, ...]]:
    """The authors' tokens (B, N, C) as our grid (B, *grid, C)."""
    return lambda inputs: tuple(value.unflatten(1, tuple(grid)) for value in inputs.values())


def as_tokens(result: Tensor) -> State:
    """Our grid (B, *grid, C) as the authors' tokens (B, N, C)."""
    return {"out": result.flatten(1, -2)}


def channels_last(inputs: State) -> tuple[Tensor, ...]:
    """The authors' (B, C, *grid) as our (B, *grid, C)."""
    return tuple(value.movedim(1, -1).contiguous() for value in inputs.values())


def channels_first(result: Tensor) -> State:
    """Our (B, *grid, C) as the authors' (B, C, *grid)."""
    return {"out": result.movedim(-1, 1)}


def errors(port: Port, golden: Golden) -> dict[str, float]:
    """The error of every output and gradient of a golden, in standard deviations of the authors' value."""
    state, inputs = make_state(golden), make_inputs(golden)
    dtype = next((value.dtype for value in inputs.values() if value.is_floating_point()), torch.float32)
    module = port.module.to(dtype).eval()
    shared = {id(value): value.to(dtype) for value in state.values()}  # entries that are one tensor stay one
    leaves = {name: shared[id(value)] for name, value in state.items()}
    for name in golden["grads"].keys() & leaves.keys():
        leaves[name].requires_grad_()
    points = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in inputs.items()}
    ours = port.rename(leaves)
    expected = set(module.state_dict()) - {name for name in module.state_dict() if name.endswith("num_batches_tracked")}
    assert set(ours) >= expected, f"not set: {sorted(expected - set(ours))}"
    assert set(ours) <= set(module.state_dict()), f"unknown: {sorted(set(ours) - set(module.state_dict()))}"
    arguments = port.inputs(points)
    result = torch.func.functional_call(module, ours, arguments)
    got = port.outputs(result)
    if port.taps:
        module.load_state_dict({name: value.detach() for name, value in ours.items()}, strict=False)
        tapped = run_tapped(module, arguments[0].detach(), port.taps)
        got |= {name: like(value, golden["outputs"][name]) for name, value in tapped.items() if name != "out"}
    for what in DEPLOYED & golden["outputs"].keys():
        module.load_state_dict({name: value.detach() for name, value in ours.items()}, strict=False)
        got |= {what: port.outputs(reparameterize(module)(*arguments))["out"]}
    found = {name: mismatch(wanted, got[name]) if name in got else math.inf
             for name, wanted in golden["outputs"].items()}
    if golden["grads"]:
        first = got[next(iter(golden["outputs"]))]
        (first * cotangent(first.shape).to(first.dtype)).sum().backward()
        for name, wanted in golden["grads"].items():
            gradient = (points | leaves)[name].grad
            found[f"d/d {name}"] = math.inf if gradient is None else mismatch(wanted, gradient)
    return found
