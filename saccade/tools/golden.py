"""Goldens: what the authors' code computes on weights that anyone can regenerate from the names of the parameters."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saccade.core.errors import SaccadeError

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
