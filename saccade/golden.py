"""Goldens: what a published code computes, on weights that anyone can draw again from the names of the parameters.

`read_golden` reads one; `make_state` and `make_inputs` draw its weights and inputs; `mismatch` compares. `record` makes
one of any model, in the same format, which docs/goldens.md explains field by field.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from saccade.core.errors import SaccadeError
from saccade.core.files import write_whole

__all__ = ["cotangent", "fill", "make_inputs", "make_state", "mismatch", "read_golden", "record", "summarize",
           "write_golden"]

Golden = dict[str, Any]


def read_golden(path: str | Path) -> Golden:
    """A golden from its file; raises SaccadeError where the file is none."""
    try:
        golden = json.loads(Path(path).read_text(encoding="utf-8"))
        if not {"model", "state", "inputs", "outputs", "tolerance"} <= set(golden):
            raise ValueError("entries are missing")
    except OSError as error:
        raise SaccadeError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise SaccadeError(f"{path}: not a golden ({error})") from error
    return golden


def write_golden(golden: Golden, path: str | Path) -> None:
    """Write a golden as its file, which is there whole or not at all."""
    write_whole(Path(path), json.dumps(golden, allow_nan=False) + "\n")


def _generator(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))  # its streams are frozen by NumPy's policy


def fill(name: str, shape: tuple[int, ...] | list[int], kind: str) -> Tensor:
    """The float32 values that stand for the state entry `name` in every golden; kind is "param", "mean" or "var"."""
    generator, shape = _generator(name), tuple(shape)
    if kind == "var":
        values = 0.75 + 0.5 * generator.random_sample(shape)
    elif kind == "mean" or len(shape) <= 1:
        one = kind == "param" and name.rsplit(".", 1)[-1] == "weight"
        values = (1.0 if one else 0.0) + 0.1 * np.asarray(generator.standard_normal(shape))
    else:
        fan_in = math.prod(shape[1:]) if shape[0] > 1 else 4
        values = np.asarray(generator.standard_normal(shape)) / math.sqrt(max(fan_in, 1))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def make_state(golden: Golden) -> dict[str, Tensor]:
    """The authors' state: parameters and running statistics (buffers that a loader must not need are left out)."""
    state: dict[str, Tensor] = {}
    for name, shape, kind in golden["state"]:
        if kind.startswith("tied:"):
            state[name] = state[kind.removeprefix("tied:")]
        elif kind != "kept":
            state[name] = fill(name, shape, kind)
    return state


def make_inputs(golden: Golden) -> dict[str, Tensor]:
    """The inputs, by argument name."""
    inputs = {}
    for name, spec in golden["inputs"].items():
        generator, shape = _generator("input:" + spec["seed"]), tuple(spec["shape"])
        values: NDArray[Any]
        if spec["dtype"].startswith("int"):
            values = generator.randint(spec["low"], spec["high"], size=shape)
        elif spec["dtype"] == "bool":
            values = generator.random_sample(shape) < 0.5
        else:
            values = np.asarray(generator.standard_normal(shape))
        inputs[name] = torch.from_numpy(values.astype(spec["dtype"]))
    return inputs


def cotangent(shape: tuple[int, ...] | torch.Size) -> Tensor:
    """What the first output is multiplied with before the sum whose gradients a golden holds."""
    return fill("cotangent", tuple(shape), "param")


def mismatch(expected: dict[str, Any], got: Tensor) -> float:
    """The largest error of the probed values (and of the norm), in standard deviations of the golden's output.

    A single number has none (nor has a constant): its error is relative.
    """
    flat = got.detach().double().cpu().numpy().reshape(-1)
    if list(got.shape) != expected["shape"]:
        return math.inf
    error = max(abs(flat[int(index)] - value) for index, value in expected["probe"].items())
    error = max(error, abs(float(np.linalg.norm(flat)) - expected["l2"]) / math.sqrt(max(flat.size, 1)))
    spread = expected["std"] or expected["l2"] / math.sqrt(max(flat.size, 1))
    return float(error / max(spread, 1e-12)) if np.isfinite(error) else math.inf


PROBES = 64  # values of each output that a golden keeps


def summarize(value: Tensor) -> dict[str, Any]:
    """An output as a golden keeps it: shape, moments and PROBES values, evenly spaced from the first to the last."""
    flat = value.detach().double().cpu().numpy().reshape(-1)
    places = np.unique(np.linspace(0, flat.size - 1, min(PROBES, flat.size)).round().astype(int))
    return {"shape": list(value.shape), "mean": float(flat.mean()), "std": float(flat.std()),
            "l2": float(np.linalg.norm(flat)), "probe": {str(place): float(flat[place]) for place in places}}


def record(
    model: nn.Module, inputs: Mapping[str, dict[str, Any]], *, name: str, system: str = "",
    source: Mapping[str, Any] | None = None, taps: Mapping[str, str] | None = None, gradients: Sequence[str] = (),
    tolerance: float = 1e-4, paper: Mapping[str, float] | None = None, note: str = "",
) -> Golden:
    """The golden of a model, evaluated in place on weights drawn from its names.

    `inputs` are specifications by argument, in the order of the call: `{"x": {"shape": [2, 3, 224, 224], "dtype":
    "float32", "seed": "x"}}`; integers also have `low` and `high` (excluded). A tensor that comes back is the output
    `out`, those of a list are `out0`, `out1`, ..., those of a dict keep their names. `taps` names inner modules whose
    outputs are kept too, `gradients` the inputs and state entries to differentiate for, `source` where the code is from
    (repo, commit, file, object, args). Raises SaccadeError where a name is not there or an output is no number.
    """
    state = _describe(model)
    golden: Golden = {
        "model": name, "system": system, "source": dict(source or {}),
        "params": sum(value.numel() for value in model.parameters() if value.requires_grad), "macs": None,
        "paper": None if paper is None else dict(paper), "state": state, "inputs": dict(inputs), "outputs": {},
        "grads": {}, "tolerance": tolerance, "note": note,
    }  # fmt: skip
    arguments = make_inputs(golden)
    dtype = next((value.dtype for value in arguments.values() if value.is_floating_point()), torch.float32)
    entries = model.to(dtype).eval().state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in make_state(golden).items():
            entries[key].copy_(value)
    known = {**arguments, **{key: entries[key] for key, _, kind in state if kind == "param"}}
    unknown = [key for key in gradients if key not in known]
    if unknown:
        raise SaccadeError(f"gradients {', '.join(unknown)}: give inputs ({', '.join(arguments)}) or parameters")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = _run(model, arguments, taps or {})
    golden["macs"] = counter.get_total_flops() // 2
    broken = [key for key, value in outputs.items() if not value.isfinite().all()]
    if broken:
        raise SaccadeError(f"{name}: {', '.join(broken)} not finite on the drawn weights; record in float64, or tap "
                           "earlier modules")
    golden["outputs"] = {key: summarize(value) for key, value in outputs.items()}
    if gradients:
        for key in gradients:
            known[key].requires_grad_()
        first = next(iter(_run(model, arguments, {}).values()))
        total = (first * cotangent(first.shape).to(first.dtype)).sum()
        found = torch.autograd.grad(total, [known[key] for key in gradients])
        golden["grads"] = {key: summarize(value) for key, value in zip(gradients, found, strict=True)}
    return golden


def _describe(model: nn.Module) -> list[list[Any]]:
    """Name, shape and kind of each entry of a model's state."""
    described: list[list[Any]] = []
    first: dict[int, str] = {}
    kinds = {"running_mean": "mean", "running_var": "var"}
    for key, value in model.state_dict(keep_vars=True).items():
        kind = "param" if isinstance(value, nn.Parameter) else kinds.get(key.rpartition(".")[2], "kept")
        if kind == "param" and id(value) in first:
            kind = f"tied:{first[id(value)]}"
        first.setdefault(id(value), key)
        described.append([key, list(value.shape), kind])
    return described


def _run(model: nn.Module, arguments: Mapping[str, Tensor], taps: Mapping[str, str]) -> dict[str, Tensor]:
    """What the model returns, by name, then what the tapped modules do."""
    inner: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    absent = [path for path in taps.values() if path not in modules]
    if absent:
        raise SaccadeError(f"taps {', '.join(absent)}: no such module of {type(model).__name__}")
    hooks = [modules[path].register_forward_hook(lambda _module, _inputs, output, key=key: inner.update({key: output}))
             for key, path in taps.items()]
    try:
        result = model(*arguments.values())
    finally:
        for hook in hooks:
            hook.remove()
    return by_name(result, []) | {key: inner[key] for key in taps if key in inner}


def by_name(result: Any, names: Sequence[str]) -> dict[str, Any]:
    """What a model returned, by output: a dict has names, a list takes `names` in order, else it is out, out0, ..."""
    if isinstance(result, Mapping):
        return dict(result)
    if isinstance(result, (list, tuple)):
        return dict(zip(names or [f"out{place}" for place in range(len(result))], result))
    return {names[0] if names else "out": result}
