"""Checkpoint files: the state dict inside, read as data, and safetensors files written whole or not at all."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.core.unpickle import Record, is_tensor, read_pickle, tensor

# Where authors put their weights, in the order of preference: live weights, student before teacher, averages last; but
# of BasicSR's files (HAT, DRCT) the average, by which their authors measure.
WRAPPERS = (
    *("model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "params_ema", "params"),
    *("student", "teacher", "model_ema", "ema", "state_dict_ema"),
    "opt/target",
)
FLAX = ("opt/target", "params")  # below which a flax tree's names may stand: the optimizer's weights, the variables
PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning
FOLDER = ("model.safetensors.index.json", "model.safetensors")


def read_checkpoint(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, on the CPU, in the precision stored; nothing of the file is executed.

    Reads safetensors (a file, or the index or folder of a sharded model), torch files of all versions, NumPy's archives
    (.npz: trees of flax) and plain pickles of tensors or arrays. `key` names the entry to take. Without it the state
    dict is looked for under `WRAPPERS`, in that order, also nested: model before state_dict before student before
    teacher, a moving average only where nothing else is (BasicSR's first). A prefix of `PREFIXES` comes off where all
    names have it. What is no tensor is left out.

    Raises SaccadeError for a file that is missing, empty, cut off or of another kind, an unknown key, or no tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in FOLDER if (path / name).is_file()), path / FOLDER[0])
    state = _read(path, partial(_select, key=key))
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def write_safetensors(path: str | Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file: `path` holds all of the old content or all of the new, whatever happens meanwhile.

    Tensors that share memory are written once for each name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, value in state.items():
        own = value.detach().cpu().contiguous()
        pointer = own.untyped_storage().data_ptr()
        tensors[name] = own.clone() if pointer in memory else own
        memory.add(pointer)
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(tensors, unfinished, metadata)
        unfinished.chmod(mode)  # safetensors leaves a file that only its owner can read
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path, take: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `take` takes from the content of the file, while it is open; whatever fails is told in one line."""
    if not path.is_file():
        raise SaccadeError(f"{path}: no such file; check the path, or download it")
    head = b""
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(0)
            return take(_content(path, head, file))
    except SaccadeError as problem:
        raise SaccadeError(f"{path}: {problem}") from None
    except Exception as problem:  # a damaged file fails in every way there is
        what = " ".join(f"{type(problem).__name__}: {problem}; it begins with {head!r}".split()) if head else "empty"
        raise SaccadeError(f"{path}: not a checkpoint, or cut off ({what}); get it again") from problem


def _content(path: Path, head: bytes, file: IO[bytes]) -> Any:
    """The names and tensors of safetensors or of an archive, or the pickled object with records for tensors."""
    if path.name.endswith(".index.json"):
        places = json.load(file)["weight_map"]
        shards = {shard: _read(path.with_name(shard), _select) for shard in sorted(set(places.values()))}
        if missing := [name for name, shard in places.items() if name not in shards[shard]]:
            raise SaccadeError(f"{places[missing[0]]} lacks {missing[0]}; download the shards again")
        return {name: shards[shard][name] for name, shard in places.items()}
    if head[8:9] == b"{":
        return load_file(path)
    if head[:4] == b"PK\x03\x04":
        arrays = all(name.endswith(".npy") for name in zipfile.ZipFile(file).namelist())
        file.seek(0)
        if arrays:
            return _archive(file)
    return read_pickle(file)


def _archive(file: IO[bytes]) -> dict[str, Any]:
    """The arrays in a NumPy archive, by path, as tensors; those below a place of `FLAX` are an entry of its name."""
    content: dict[str, Any] = {}
    roots = tuple(f"{root}/" for root in FLAX)
    with np.load(file, allow_pickle=False) as archive:
        wrapped = any(path.startswith(roots) for path in archive.files)
        for path in archive.files:
            if wrapped and not path.startswith(roots):
                content[path] = None  # an optimizer's state stays on the disk
                continue
            array, place, name = archive[path], content, path
            for root, slashed in zip(FLAX, roots, strict=True):
                if name.startswith(slashed):
                    place, name = place.setdefault(root, {}), name.removeprefix(slashed)
            numbers = array.dtype.kind in "biufc"
            place[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) if numbers else array
    return content


def _select(content: Any, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of the entry `key`, or of the entry that holds the weights."""
    names = ", ".join(map(str, list(content)[:12])) if isinstance(content, dict) and content else "nothing"
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            raise SaccadeError(f"no entry {key!r}; it has {names}")
        content = content[key]
    found = _state(content)
    if not found and isinstance(content, Record) and not content:
        raise SaccadeError(f"holds a pickled {content.module}.{content.name}: save its state_dict() instead")
    if not found:
        raise SaccadeError(f"no tensors under {key or 'any usual key'!r}; it has {names}: choose an entry with `key`")
    return {name: tensor(value) for name, value in found.items()}


def _state(value: Any, depth: int = 4) -> dict[str, Any]:
    """The named tensors in `value`: those of the first wrapper that has any, else its own."""
    if not isinstance(value, dict) or not depth:
        return {}
    inner = (_state(value.get(wrapper), depth - 1) for wrapper in WRAPPERS)
    own = {name: item for name, item in value.items() if isinstance(name, str) and is_tensor(item)}
    return next(filter(None, inner), own)
