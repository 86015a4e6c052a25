"""Is a model equal to its authors'? Put to it the way a user would: their checkpoint in, their numbers out."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saccade.core.build import accepted, create_model
from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone
from saccade.core.index import model_paper, paper_module, resolve_model
from saccade.core.keymap import rename
from saccade.core.load import key_maps
from saccade.golden import Golden, cotangent, make_inputs, make_state, mismatch, read_golden
from saccade.parts.reparameterize import reparameterize

DEPLOYED = {"fused", "deploy"}  # outputs of the same weights in the authors' deployed form


@dataclass(frozen=True)
class Verdict:
    """One quantity of a golden: its error in standard deviations of the authors' value, and the tolerance."""

    golden: str
    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def verify(source: str | Path | Golden) -> list[Verdict]:
    """Compare a whole model with its golden (or the file of one): parameter count, outputs, stage features, gradients.

    The authors' state is regenerated, saved as a checkpoint, loaded by `create_model(name, checkpoint_path=...)` and
    run. Raises SaccadeError where the golden is of no registered model.
    """
    golden = source if isinstance(source, dict) else read_golden(source)
    name = resolve_model(golden["model"])
    state, inputs = make_state(golden), make_inputs(golden)
    image = next(iter(inputs.values()))
    given = image if len(inputs) == 1 else inputs  # a model of several modalities takes them by name
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "authors.safetensors"
        save_file({key: value.clone() for key, value in state.items()}, checkpoint)
        model = create_model(name, checkpoint_path=checkpoint, **settings(golden, name, image)).eval()
    got = run_tapped(model.to(image.dtype), given, taps(name, golden))
    for what in DEPLOYED & golden["outputs"].keys():
        with torch.no_grad():
            got[what] = reparameterize(model)(given)
    count = sum(parameter.numel() for parameter in model.parameters())
    verdicts = [Verdict(golden["model"], "parameters", abs(count - golden["params"]), 0)]
    for what, expected in golden["outputs"].items():
        value = like(got[what], expected) if what in got else torch.empty(0)
        verdicts.append(Verdict(golden["model"], what, mismatch(expected, value), golden["tolerance"]))
    if golden["grads"]:
        gradients = authors_gradients(model, name, state, image, golden)
        verdicts += [Verdict(golden["model"], f"d/d {what}", mismatch(expected, gradients[what]), golden["tolerance"])
                     for what, expected in golden["grads"].items()]
    return verdicts


def settings(golden: Golden, name: str, image: Tensor) -> dict[str, Any]:
    """What the caller of the authors' code said that our `create_model` must be told too."""
    args = golden.get("source", {}).get("args", {})
    told: dict[str, Any] = {"img_size": tuple(image.shape[2:])}
    if "num_classes" in args:
        told["num_classes"] = args["num_classes"]
    if image.shape[1] != 3:
        told["in_chans"] = image.shape[1]
    known = accepted(name)
    told = {key: value for key, value in told.items() if key in known}  # not all models classify
    said = getattr(paper_module(model_paper(name)), "RECORDED", None)  # what only the note tells
    return told | (said(golden) if said is not None else {})


def taps(name: str, golden: Golden) -> dict[str, str]:
    """Where each of a golden's inner outputs is in our model, by the paper's TAPS."""
    table = getattr(paper_module(model_paper(name)), "TAPS", {})
    return find_taps(table(name) if callable(table) else table, golden)  # callable where models differ


def find_taps(table: Mapping[str, str], golden: Golden) -> dict[str, str]:
    """The modules that a table of patterns names for a golden's outputs."""
    found = {}
    for what in golden["outputs"]:
        for pattern, module in table.items():
            match = re.fullmatch(pattern, what)
            if match:
                found[what] = match.expand(module)
    return found


def run_tapped(model: nn.Module, image: Tensor | dict[str, Tensor], where: dict[str, str]) -> dict[str, Tensor]:
    """Outputs of the modules `where` names, and the model's as `out`."""
    got: dict[str, Tensor] = {}

    def keep(what: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            got[what] = output[0] if isinstance(output, tuple) else output  # the map, beside prefix tokens
        return hook

    handles = [model.get_submodule(module).register_forward_hook(keep(what)) for what, module in where.items()]
    try:
        with torch.no_grad():
            got["out"] = model(image)
    finally:
        for handle in handles:
            handle.remove()
    return got


def like(value: Tensor, wanted: dict[str, Any]) -> Tensor:
    """Our (B, *grid, C) laid out as the authors have it: (B, N, C), a video's (B, T, N, C), or (B, C, *grid), the
    nearer where both fit.

    Steps of time, which stand in our batch axis, may have an axis of their own before it.
    """
    shape = wanted["shape"]
    if len(shape) > 3 and value.ndim > 2 and value.shape[0] == shape[0] * shape[1] != shape[0]:
        laid = like(value, wanted | {"shape": [value.shape[0], *shape[2:]]})
        return laid.reshape(shape) if laid.numel() == prod(shape) else laid
    if value.ndim == 3 and [value.shape[0], value.shape[2]] == [shape[0], shape[-1]] and value.shape[1] > shape[1]:
        return value[:, -shape[1]:]  # theirs are the tokens of the grid alone
    if value.ndim >= 3 and [value.shape[0], value.shape[1:-1].numel(), value.shape[-1]] == shape:
        return value.flatten(1, -2)
    if value.ndim == 5 and [*value.shape[:2], value.shape[2:-1].numel(), value.shape[-1]] == shape:
        return value.flatten(2, -2)
    swapped = value.movedim(-1, 1)
    if list(value.shape) == shape == list(swapped.shape) and value.ndim > 2:
        return min(value, swapped, key=lambda reading: mismatch(wanted, reading))
    return value if list(value.shape) == shape else swapped


def authors_gradients(
    model: Backbone, name: str, state: dict[str, Tensor], image: Tensor, golden: Golden
) -> dict[str, Tensor]:
    """d(sum(out * cotangent)) / d(authors' tensors and the input), through the differentiable key map."""
    layout = model.load_report.format
    shared = {id(value): value.to(image.dtype) for value in state.values()}  # entries that are one tensor stay one
    leaves = {key: shared[id(value)] for key, value in state.items()}
    for key in golden["grads"].keys() & leaves.keys():
        leaves[key].requires_grad_()
    image = image.clone().requires_grad_()
    ours = rename(leaves, key_maps(name)[str(layout)]).state
    out = torch.func.functional_call(model, ours, (image,))
    (out * cotangent(out.shape).to(out.dtype)).sum().backward()
    argument = next(iter(golden["inputs"]))
    leaves[argument] = image
    gradients: dict[str, Tensor] = {}
    for what in golden["grads"]:
        gradient = leaves[what].grad
        if gradient is None:
            raise SaccadeError(f"{golden['model']}: no gradient reached {what}")
        gradients[what] = gradient
    return gradients
