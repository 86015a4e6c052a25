"""Checkpoints of every format and age, what stands beside the weights in them, attacks, damage."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import json
import operator
import os
import pickle
import random
import stat
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade.core.checkpoint import read_checkpoint, write_safetensors
from saccade.core.errors import SaccadeError

FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}, "protocol 4": {"pickle_protocol": 4}}


@pytest.fixture(params=FORMATS)
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Saves as torch does, in each of its formats; returns the path."""

    def run(content: Any) -> Path:
        torch.save(content, tmp_path / "model.pth", **FORMATS[request.param])
        return tmp_path / "model.pth"

    return run


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "stem.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "norm.running_mean": torch.randn(4, generator=generator, dtype=torch.float64),
        "norm.num_batches_tracked": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert type(found[name]) is Tensor and found[name].dtype == tensor.dtype and not found[name].requires_grad
        assert torch.equal(found[name].view(torch.uint8) if tensor.dtype.itemsize == 1 else found[name],
                           tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor)  # fmt: skip


def error(path: Path, key: str | None = None) -> str:
    with pytest.raises(SaccadeError) as caught:
        read_checkpoint(path, key)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path.parent))
    return message


class Stage(enum.Enum):
    LAST = 1


class Outer:
    class Inner:
        def method(self) -> None: ...


class ModelEma:
    def __init__(self) -> None:
        self.decay, self.shadow = 0.999, {"w": torch.zeros(3)}

    def __setstate__(self, state: object) -> None:
        raise AssertionError("ran")


def test_plain_state_dict(save: Any) -> None:
    assert_same(read_checkpoint(save(weights())), weights())
    assert_same(read_checkpoint(str(save(collections.OrderedDict(weights())))), weights())
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))  # its state dict carries _metadata
    assert_same(read_checkpoint(save(module.state_dict())), module.state_dict())


def test_what_stands_beside_the_weights(save: Any) -> None:
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": np.float64(1e-3), "params": [0]}]}
    extra = {
        "args": argparse.Namespace(lr=np.float64(1e-3), output=Path("out"), device=torch.device("cpu")),
        "best": np.float32(0.8), "scores": np.arange(3), "names": np.array(["cat", "dog"]), "any": np.array([{}, None]),
        "optimizer": optimizer, "scaler": {"scale": 65536.0}, "epoch": 299, "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16, "ema_object": ModelEma(), "when": datetime.datetime(2024, 1, 1), "loss": float("nan"),
        "history": collections.defaultdict(list, a=[1]), "stage": Stage.LAST, "set": {Stage.LAST, "b"}, "f": len,
        "counter": collections.Counter("aab"), ("tuple", Stage.LAST): b"bytes", Path("key"): bytearray(b"more"),
        "rng": torch.get_rng_state(), "deque": collections.deque([1]), "complex": 1j, "slice": slice(1), "module": None,
        "frozen": frozenset({Path("a")}), "random": random.Random(0).getstate(), "whole": nn.Linear(2, 2),
        "nested": Outer.Inner(), "bound": Outer.Inner().method, "partial": functools.partial(print, Outer.Inner()),
        "getter": operator.attrgetter("a.b"), "range": range(3), "error": ValueError("x"), "none": type(None),
    }  # fmt: skip
    assert_same(read_checkpoint(save({"model": weights(), **extra})), weights())
    flat = read_checkpoint(save({**weights(), **{str(name): value for name, value in extra.items()}}))
    assert_same({name: flat[name] for name in weights()}, weights())
    assert set(flat) - set(weights()) == {"scores", "rng"}  # what is a tensor by itself stays


def test_classes_that_exist_no_more(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = types.ModuleType("mmcv_like")
    gone.Config = type("Config", (dict,), {"__module__": "mmcv_like"})  # type: ignore[attr-defined]
    gone.Hook = type("Hook", (), {"__module__": "mmcv_like"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mmcv_like", gone)
    hook = gone.Hook()
    hook.log = [1, 2]
    path = save({"meta": {"config": gone.Config(a=hook), "CLASSES": ("cat",)}, "state_dict": gone.Config(weights())})
    del gone.Config, gone.Hook, sys.modules["mmcv_like"]
    assert_same(read_checkpoint(path), weights())
    assert "mmcv_like" not in sys.modules


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"ema": 1, "state_dict": 2, "model": 3}, 3),
        ({"model_ema": 1, "model_state_dict": 2}, 2),
        ({"model_ema": 1, "epoch": 5, "optimizer": {"state": {}}}, 1),
        ({"teacher": 1, "student": 2}, 2),
        ({"teacher": 1, "ema": 2}, 1),
        ({"model": {"state_dict": {"module": 4}}}, 4),
        ({"model": None, "state_dict": {}, "net": 3}, 3),
        ({"queue": torch.zeros(2), "model": 2}, 2),
        ({"params_ema": 1, "params": 2}, 1),  # as HAT's and DRCT's authors test
    ],
)
def test_wrappers(save: Any, content: Any, wanted: int) -> None:
    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fill(item) if name not in ("epoch", "optimizer") else item for name, item in value.items()}
        return {"w": torch.full((2,), value)} if isinstance(value, int) else value

    assert_same(read_checkpoint(save(fill(content))), {"w": torch.full((2,), wanted)})


def test_key_names_the_entry(save: Any) -> None:
    path = save({"student": {"w": torch.zeros(1)}, "teacher": {"model": {"module.w": torch.ones(1)}}, "epoch": 3})
    assert_same(read_checkpoint(path, key="teacher"), {"w": torch.ones(1)})
    assert "no entry 'generator'; it has student, teacher, epoch" in error(path, "generator")
    assert "no tensors under 'epoch'" in error(path, "epoch")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
def test_prefixes_come_off_where_all_names_have_them(save: Any, prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in weights().items()}
    assert_same(read_checkpoint(save({"state_dict": wrapped})), weights())
    mixed = {**wrapped, "criterion.weight": torch.ones(1)}
    assert_same(read_checkpoint(save(mixed)), mixed)
    kept = {"backbone." + name: tensor for name, tensor in weights().items()}
    assert_same(read_checkpoint(save(kept)), kept)


def test_layouts_precision_and_ties(save: Any) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "half": base.half(), "bfloat16": base.bfloat16(), "float8": base.to(torch.float8_e4m3fn), "base": base,
        "transposed": base.t(), "row": base[2], "last": base.permute(1, 0).contiguous(), "tied": base,
        "scalar": base[0, 0],
        "channels_last": torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last), "empty": torch.zeros(0, 3),
        "complex": torch.randn(3, dtype=torch.complex64), "int8": base.to(torch.int8), "uint16": base.to(torch.uint16),
    }  # fmt: skip
    found = read_checkpoint(save(state))
    assert_same(found, state)
    assert found["base"].data_ptr() == found["tied"].data_ptr() == found["transposed"].data_ptr()
    assert found["channels_last"].is_contiguous(memory_format=torch.channels_last)


def test_parameters_and_tensors_with_attributes(save: Any) -> None:
    parameter, buffer = nn.Parameter(torch.ones(2)), torch.zeros(2)
    parameter._no_weight_decay, buffer.tag = True, Stage.LAST  # type: ignore[attr-defined]
    state = {"w": parameter, "plain": nn.Parameter(torch.ones(3)), "b": buffer, "n": nn.Buffer(torch.ones(1))}
    wanted = {"w": torch.ones(2), "plain": torch.ones(3), "b": torch.zeros(2), "n": torch.ones(1)}
    assert_same(read_checkpoint(save(state)), wanted)


def test_tensors_without_a_plain_form_are_named(save: Any) -> None:
    assert "_rebuild_sparse_tensor" in error(save({"w": torch.eye(3).to_sparse()}))
    assert "conjugate" in error(save({"w": torch.ones(2, dtype=torch.complex64).conj()}))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_pickles_of_arrays_and_tensors(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3), "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(4, dtype=">i4"), "b": np.array([True, False]), "half": np.ones(2, np.float16),
        "e": np.zeros(0),
    }  # fmt: skip
    path = tmp_path / "backbone.pkl"
    path.write_bytes(pickle.dumps({"model": {**arrays, "t": torch.ones(2)}, "author": "me"}, protocol))
    wanted = {name: torch.tensor(array.astype(array.dtype.newbyteorder("="))) for name, array in arrays.items()}
    assert_same(read_checkpoint(path), {**wanted, "t": torch.ones(2)})


# --- damage ---------------------------------------------------------------------------------------


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    assert "no such file" in error(path)
    assert "model.safetensors.index.json: no such file" in error(tmp_path)
    path.touch()
    assert "empty" in error(path)
    for content in ("<!DOCTYPE html>\n<html>", "version https://git-lfs.github.com/spec/v1", "Not Found", "."):
        path.write_text(content)
        assert f"it begins with {content[:16].encode()!r}" in error(path)
    path.write_bytes(bytes(100))
    assert "not a checkpoint" in error(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", b"")
    assert "no item named 'data.pkl'" in error(path)


def test_whole_modules_and_torchscript_are_named(tmp_path: Path, save: Any) -> None:
    assert "torch.nn.modules.linear.Linear: save its state_dict()" in error(save(nn.Linear(2, 2)))
    assert "torch.nn.modules.linear.Linear: save its state_dict()" in error(save({"model": nn.Linear(2, 2)}), "model")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"\x80\x02).")
        archive.writestr("script/data.pkl", b"\x80\x02c__torch__.net\nNet\n)\x81}(X\x01\x00\x00\x00aK\x01ub.")
    assert "holds a pickled __torch__.net.Net: save its state_dict()" in error(tmp_path / "script.pt")


def test_no_tensors(save: Any) -> None:
    assert "no tensors" in error(save({"epoch": 3, "args": argparse.Namespace()}))
    assert "no tensors" in error(save([torch.ones(2)]))
    assert "it has mine, epoch: choose an entry with `key`" in error(save({"mine": weights(), "epoch": 1}))
    assert_same(read_checkpoint(save({"mine": weights(), "epoch": 1}), "mine"), weights())


@pytest.mark.parametrize("kind", ["safetensors", *FORMATS])
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "whole"
    state = {**weights(), "last": torch.ones(100)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "optimizer": {"m": torch.ones(50)}}, path, **FORMATS[kind])
    whole = path.read_bytes()
    found = read_checkpoint(path)
    assert_same({name: found[name] for name in state}, state)
    end = len(whole)
    for size in (1, 3, 8, 9, 40, end // 4, end // 2, end * 3 // 4, end - 150, end - 1):
        path.write_bytes(whole[:size])
        assert "get it again" in error(path), size


@pytest.mark.parametrize("kind", ["safetensors", *FORMATS])
def test_flipped_bytes_raise_nothing_else(tmp_path: Path, kind: str) -> None:
    path, chance = tmp_path / "whole", random.Random(0)
    state = {"a": torch.ones(2), "b": torch.zeros(3, 3).half()}
    save_file(state, path) if kind == "safetensors" else torch.save({"model": state}, path, **FORMATS[kind])
    whole = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 5))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except SaccadeError as problem:
            assert "\n" not in str(problem)


# --- safetensors ----------------------------------------------------------------------------------


def test_safetensors(tmp_path: Path) -> None:
    state = {**weights(), "half": torch.ones(2).half(), "bfloat16": torch.ones(2).bfloat16()}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    assert_same(read_checkpoint(path), {name: state[name] for name in read_checkpoint(path)})
    assert set(read_checkpoint(path)) == set(state)
    assert set(read_checkpoint(tmp_path)) == set(state)
    path.rename(tmp_path / "model.bin")  # told by its content
    assert set(read_checkpoint(tmp_path / "model.bin")) == set(state)
    assert "no entry 'model'" in error(tmp_path / "model.bin", "model")


def test_sharded_safetensors(tmp_path: Path) -> None:
    places = {"model.b": "two.safetensors", "model.a": "one.safetensors", "model.c": "two.safetensors"}
    save_file({"model.a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"model.b": torch.ones(2), "model.c": torch.ones(3)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    wanted = {"b": torch.ones(2), "a": torch.ones(1), "c": torch.ones(3)}
    assert_same(read_checkpoint(tmp_path), wanted)
    assert_same(read_checkpoint(index), wanted)
    save_file({"model.b": torch.ones(2)}, tmp_path / "two.safetensors")
    assert "two.safetensors lacks model.c" in error(index)
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-1])
    assert "two.safetensors: not a checkpoint, or cut off" in error(index)
    (tmp_path / "two.safetensors").unlink()
    assert "two.safetensors: no such file" in error(index)
    index.write_text("{}")
    assert "weight_map" in error(index)


def test_write_safetensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "base": base, "tied": base, "row": base[1], "transposed": base.t(), "half": base.half(),
        "empty": torch.zeros(0),
        "channels_last": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last), "scalar": torch.tensor(3),
        "parameter": nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    path = tmp_path / "runs" / "model.safetensors"
    write_safetensors(path, state, {"saccade": "1"})
    found = load_file(path)
    assert_same({name: found[name] for name in state}, {name: tensor.detach() for name, tensor in state.items()})
    assert json.loads(path.read_bytes()[8:].split(b"}")[0] + b"}}")["__metadata__"] == {"saccade": "1"}
    assert os.listdir(path.parent) == [path.name]
    (tmp_path / "ordinary").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": torch.ones(1)}, {})
    held = read_checkpoint(path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupt)
        write_safetensors(path, {"w": torch.zeros(1)}, {})
    assert os.listdir(tmp_path) == [path.name]
    assert_same(read_checkpoint(path), {"w": torch.ones(1)})
    write_safetensors(path, {"w": torch.zeros(1)}, {})
    assert_same(read_checkpoint(path), {"w": torch.zeros(1)})
    assert_same(held, {"w": torch.ones(1)})  # what was read before does not change under its reader


@pytest.mark.parametrize("root", ["", "params/", "opt/target/", "opt/target/params/"])
def test_archives_of_numpy(root: str, tmp_path: Path) -> None:
    """Trees of flax: paths stay as they are below the root, and an optimizer's state is left behind."""
    own = {
        "Dense_0/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "Dense_0/bias": np.ones(3, np.float16),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "big": np.arange(3, dtype=">i4"),
        "scalar": np.float32(3), "empty": np.zeros((0, 2), np.float32),
    }  # fmt: skip
    beside = {"opt/state/step": np.array([{}])} if root.startswith("opt/") else {}  # which is not even looked at
    path = tmp_path / "checkpoint.npz"
    np.savez_compressed(path, **{root + name: value for name, value in own.items()}, **beside, text=np.array(["cat"]))
    wanted = {name: torch.tensor(value.astype(value.dtype.newbyteorder("="))) for name, value in own.items()}
    assert_same(read_checkpoint(path), wanted)
    path.rename(tmp_path / "weights")  # it is known by what it holds
    assert_same(read_checkpoint(tmp_path / "weights"), wanted)
    if beside:
        assert_same(read_checkpoint(tmp_path / "weights", "opt/target"), wanted)
        assert "no entry 'optimizer'; it has opt/target, opt/state/step" in error(tmp_path / "weights", "optimizer")


def test_archives_of_numpy_are_data(tmp_path: Path) -> None:
    """Pickled arrays are refused unread; what is cut off, damaged or no archive gets the line of other files."""

    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    np.savez(tmp_path / "attack.npz", a=np.ones(2), b=np.array([Attack()], dtype=object))
    assert "not a checkpoint, or cut off (ValueError: Object arrays cannot be loaded" in error(tmp_path / "attack.npz")
    assert not (tmp_path / "executed").exists()
    np.savez(tmp_path / "whole.npz", a=np.arange(1000.0), b=np.ones(3))
    whole = (tmp_path / "whole.npz").read_bytes()
    damaged = tmp_path / "damaged.npz"
    for content in (whole[:-1], whole[:4000], whole[:20], b"", b"text", pickle.dumps(Attack()),
                    whole.replace(np.arange(1000.0)[500:502].tobytes(), bytes(16))):
        damaged.write_bytes(content)
        message = error(damaged)
        assert "not a checkpoint, or cut off (" in message or "holds a pickled pathlib" in message, content[:20]
    assert not (tmp_path / "executed").exists()
    np.savez(damaged, name=np.array(["cat"]))
    assert "no tensors under 'any usual key'; it has name" in error(damaged)
