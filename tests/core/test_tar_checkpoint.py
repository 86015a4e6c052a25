"""Checkpoints of torch 0.1: a tar of storages, tensors that look into them, and a pickle that names these by number."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.core.checkpoint import read_checkpoint
from saccade.core.errors import SaccadeError
from tests.core.test_checkpoint import assert_same, error


class Sparse01:
    """A class that such a file names and that exists no more when it is read."""


def write_tar(path: Path, content: Any, tensors: dict[str, Tensor], pickled: bytes | None = None) -> None:
    """`content` with the names in `tensors` standing for them; "view" looks into the middle of its storage."""
    numbers = {name: str(100 + place) for place, name in enumerate(tensors)}
    storages, table = io.BytesIO(), io.BytesIO()
    pickle.dump(len(tensors), storages, 2)
    pickle.dump(len(tensors), table, 2)
    views = []
    for name, value in tensors.items():
        number, flat = int(numbers[name]), value.untyped_storage()
        kind = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.int64: torch.LongStorage}
        pickle.dump((number + 1000, "cpu", kind[value.dtype]), storages, 2)
        storages.write(struct.pack("<q", flat.nbytes() // value.element_size()) + bytes(flat))
        root, offset = number + 1000, value.storage_offset()
        if name == "view":
            views.append((number + 2000, root, offset, value.numel()))
            root, offset = number + 2000, 0
        pickle.dump((number, root, torch.FloatTensor), table, 2)
        table.write(struct.pack("<ii", value.ndim, 0) + struct.pack(f"<{value.ndim}q", *value.shape))
        table.write(struct.pack(f"<{value.ndim}q", *value.stride()) + struct.pack("<q", offset))
    pickle.dump(views, storages, 2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return numbers.get(item) if isinstance(item, str) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump(content)
    parts = {"sys_info": pickle.dumps({"protocol_version": 1000, "little_endian": True}, 2),
             "storages": storages.getvalue(), "tensors": table.getvalue(), "pickle": pickled or stream.getvalue()}
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def tar_tensors() -> dict[str, Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {"weight": base, "view": base[2, 1:4], "turned": base.t(), "half": base.half(), "steps": torch.tensor(7)}


def test_the_tar_of_torch_0_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "old.pth.tar"
    state = collections.OrderedDict((f"module.{name}", name) for name in tar_tensors())
    write_tar(path, {"epoch": 90, "arch": Sparse01(), "state_dict": state, "optimizer": {"m": "weight"}}, tar_tensors())
    reference = torch.load(path, weights_only=False)["state_dict"]
    assert_same({f"module.{name}": value for name, value in tar_tensors().items()}, dict(reference))
    monkeypatch.delattr(sys.modules[__name__], "Sparse01")
    assert_same(read_checkpoint(path), tar_tensors())


def test_damaged_and_malicious_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "old.tar"
    attack = b"(S'w'\nP100\nS'evil'\ncposix\nsystem\n(S'touch trace'\ntRd."
    write_tar(path, {}, tar_tensors(), attack)
    assert_same(read_checkpoint(path), {"w": tar_tensors()["weight"]})
    assert os.listdir(tmp_path) == ["old.tar"]
    write_tar(path, {"w": "weight"}, tar_tensors())
    whole, chance = path.read_bytes(), random.Random(0)
    for size in (600, 1500, 2100, len(whole.rstrip(bytes(1)))):
        path.write_bytes(whole[: size - 1])
        assert "get it again" in error(path), size
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except SaccadeError as problem:
            assert "\n" not in str(problem)
    (tmp_path / "secret").write_bytes(b"secret")
    with tarfile.open(path, "w:") as archive:
        for name in ("storages", "tensors", "pickle"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "secret"
            archive.addfile(link)
    assert "storages is no plain file" in error(path)
