"""Attacks and damage inside of pickles; test_checkpoint.py asks what a user sees."""

from __future__ import annotations

import collections
import copyreg
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from saccade.core.checkpoint import read_checkpoint
from tests.core.test_checkpoint import FORMATS, assert_same, error, weights


def rewrite(old: Path, new: Path, change: Any) -> None:
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as target:
        for name in source.namelist():
            if (data := change(name, source.read(name))) is not None:
                target.writestr(name, data)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


COMMAND = "touch ./trace"
ATTACKS = {
    "REDUCE": b"cposix\nsystem\n" + text(COMMAND) + b"\x85R",
    "REDUCE eval": b"cbuiltins\neval\n" + text("open('./trace', 'w')") + b"\x85R",
    "Python 2 names": b"c__builtin__\nexecfile\n" + text("./trace") + b"\x85R",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93" + text(COMMAND) + b"\x85R",
    "dotted name": text("builtins") + text("eval.__call__") + b"\x93" + text("open('./trace', 'w')") + b"\x85R",
    "through an allowed class": text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93)R",
    "INST": b"(S'touch ./trace'\nios\nsystem\n",
    "INST no arguments": b"(ipoison\nThing\n",
    "OBJ": b"(cos\nsystem\n" + text(COMMAND) + b"o",
    "NEWOBJ": b"cpoison\nThing\n" + text(COMMAND) + b"\x85\x81",
    "NEWOBJ_EX": b"cpoison\nThing\n" + text(COMMAND) + b"\x85}" + text("shell") + b"\x88s\x92",
    "BUILD": b"cpoison\nThing\n)\x81}" + text("a") + b"K\x01sb",
    "BUILD with slots": b"cpoison\nThing\n)\x81N}" + text("__class__") + b"cos\nsystem\ns\x86b",
    "items": b"cpoison\nThing\n)R(K\x01K\x02eK\x03a(K\x01K\x02uK\x01K\x02s(K\x01\x90",
    "nested getattr": b"cbuiltins\ngetattr\n(cimportlib\nimport_module\n" + text("os") + b"\x85R" + text("system")
    + b"tR" + text(COMMAND) + b"\x85R",
    "map and apply": b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n]" + text(COMMAND) + b"atRtR",
    "codec": b"c_codecs\nencode\n" + text("x") + text("poison") + b"\x86R",
    "reconstructor": b"ccopy_reg\n_reconstructor\n(cpoison\nThing\ncbuiltins\nobject\nNtR}b",
    "torch.load": b"ctorch.storage\n_load_from_bytes\n" + text("cos\nsystem\n" + COMMAND) + b"\x85R",
    "torch.hub": b"ctorch.hub\nload\n(" + text("/") + text("poison") + b"tR",
    "rebuilt from a type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncpoison\nThing\n"
    + text(COMMAND) + b"\x85NtR",
    "NumPy": b"cnumpy.core.multiarray\n_reconstruct\n(cpoison\nThing\nK\x00\x85C\x01btR(K\x01)cnumpy\ndtype\n"
    + text("O8") + b"\x85R\x89]tb",
    "import": b"cpoison\nThing\n",
    "poison.dotted": b"cpoison.deeper\nThing\n)R",
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_nothing_in_a_file_runs(attack: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    (tmp_path / "poison.py").write_text(f"open({str(trace)!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"first": {}, "evil": "@here@", "model": weights()}, path, **FORMATS[kind])
    monkeypatch.chdir(tmp_path)
    assert_same(read_checkpoint(path), weights())  # still harmless: what reading itself imports is imported now
    before, loaded = dict(vars(collections.OrderedDict)), set(sys.modules)
    opcodes = ATTACKS[attack]
    if kind == "zip":
        rewrite(path, tmp_path / "new.pth", lambda name, data: data.replace(text("@here@"), opcodes))
        path = tmp_path / "new.pth"
    else:
        path.write_bytes(path.read_bytes().replace(text("@here@"), opcodes))
    assert opcodes in path.read_bytes()
    assert_same(read_checkpoint(path), weights())
    error(path, "evil")
    assert not trace.exists() and vars(collections.OrderedDict) == before
    assert set(sys.modules) - loaded <= {"encodings.cp437"}  # how zip files write their names


def test_registered_extensions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"evil": "@here@", "model": weights()}, path, **FORMATS["legacy"])
    path.write_bytes(path.read_bytes().replace(text("@here@"), b"\x82\xf5" + text("HOME") + b"\x85R"))
    copyreg.add_extension("os", "getenv", 0xF5)
    try:
        assert "extension 245" in error(path)
    finally:
        copyreg.remove_extension("os", "getenv", 0xF5)


def test_source_patches_of_whole_modules_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "dump_patches", True)
    path = tmp_path / "module.pth"
    torch.save({"net": nn.Linear(2, 2), "state_dict": weights()}, path, **FORMATS["legacy"])
    path.write_bytes(path.read_bytes().replace(b"in_features", b"in_feature$"))  # its source differs now
    assert_same(read_checkpoint(path), weights())
    assert os.listdir(tmp_path) == ["module.pth"]


def test_only_the_chosen_entry_is_read(tmp_path: Path) -> None:
    path, thin = tmp_path / "full.pth", tmp_path / "thin.pth"
    torch.save({"model": {"w": torch.ones(3)}, "optimizer": {"w": torch.zeros(999)}}, path)
    rewrite(path, thin, lambda name, data: None if name.endswith("data/1") else data)
    assert_same(read_checkpoint(thin), {"w": torch.ones(3)})
    error(thin, "optimizer")


def test_python_2_wrote_texts_as_bytes_and_ordered_dicts_as_pairs(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"aa": torch.ones(2)}, path, **FORMATS["legacy"])
    start, middle = path.read_bytes().split(b"}q\x00X\x02\x00\x00\x00aaq\x01")
    tensor, end = middle.split(b"s.", 1)
    path.write_bytes(start + b"ccollections\nOrderedDict\n]](U\x02aa" + tensor + b"ea\x85R." + end)
    assert_same(read_checkpoint(path), {"aa": torch.ones(2)})


def test_tensors_outside_of_their_memory_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"w": torch.ones(7, 3)}, path, **FORMATS["legacy"])
    path.write_bytes(path.read_bytes().replace(b"K\x07K\x03\x86", b"K\xffK\x03\x86"))
    assert "out of bounds" in error(path)


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "little.pth")
    rewrite(tmp_path / "little.pth", tmp_path / "big.pth", lambda name, data: b"big" if "byteorder" in name else data)
    assert "big-endian" in error(tmp_path / "big.pth")


def test_a_flipped_weight_in_a_zip_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"w": torch.full((64,), 3.0)}, path)
    path.write_bytes(path.read_bytes().replace(torch.full((64,), 3.0).numpy().tobytes(), bytes(256)))
    assert "CRC" in error(path)


def test_storage_views_of_torch_0_3(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"w": torch.arange(5.0)[:2]}, path, **FORMATS["legacy"])
    path.write_bytes(path.read_bytes().replace(b"K\x05Nt", b"K\x05" + text("view") + b"K\x03K\x02\x87t"))
    assert_same(read_checkpoint(path), {"w": torch.tensor([3.0, 4.0])})
