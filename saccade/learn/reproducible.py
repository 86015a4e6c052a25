"""What a run needs so that its result depends on its recipe alone, and its folder on one run."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.files import write_whole


def seed_of(*numbers: int) -> int:
    """A 64-bit seed that is unrelated to that of any other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def claim(path: Path, run: Mapping[str, Any]) -> None:
    """Write which run this folder belongs to, or make sure that it is the same; raises SaccadeError where it is not."""
    mine = json.loads(json.dumps(run))
    if not path.exists():
        write_whole(path, json.dumps(mine, indent=1))
        return
    there = json.loads(path.read_text())
    different = [name for name in mine | there if mine.get(name) != there.get(name)]
    if different:
        changes = ", ".join(f"{name} is {there.get(name)} there and {mine.get(name)} here" for name in different)
        raise SaccadeError(f"{path.parent} holds another run: {changes}; choose another folder or delete this one")


def describe(model: nn.Module) -> str:
    """A model's structure and, rounded so that the last bits of another machine do not matter, its start."""
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    parameters = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    digest = hashlib.sha256(repr((modules, parameters)).encode()).hexdigest()[:8]
    total = sum(float(parameter.detach().abs().sum(dtype=torch.float64)) for parameter in model.parameters())
    return f"{sum(parameter.numel() for parameter in model.parameters())} parameters, {digest}, start {total:.5g}"


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state for safetensors; what is parted among processes is put together, so all of them must ask."""
    state = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
             for name, tensor in model.state_dict().items()}
    # copies, since safetensors refuses two names (tied weights) for one piece of memory
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


@contextmanager
def reproducible() -> Iterator[None]:
    """Same numbers at each run, and torch's random state and settings as before at the end.

    Also needed on a CPU: two threads add the gradients of an indexed table (a relative position bias) in any order.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)  # where no such form of an operation exists, go on
        memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            memory.fill_uninitialized_memory = fill
