"""Pickles as data: torch files read with nothing of them imported, called or executed.

A pickle is a program that names classes and functions: whoever wrote the file decides what runs. Here all that it names
becomes a `Record`, which keeps what it is given and does nothing. Tensors are read off the records afterwards, and only
those that are asked for: optimizer states stay on the disk.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saccade.core.errors import SaccadeError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {
    **dict(DoubleStorage=torch.float64, FloatStorage=torch.float32, HalfStorage=torch.float16),
    **dict(BFloat16Storage=torch.bfloat16, BoolStorage=torch.bool, ByteStorage=torch.uint8, CharStorage=torch.int8),
    **dict(ShortStorage=torch.int16, IntStorage=torch.int32, LongStorage=torch.int64, UntypedStorage=torch.uint8),
    **dict(ComplexFloatStorage=torch.complex64, ComplexDoubleStorage=torch.complex128),
}


class Record(dict[Any, Any]):
    """What a class or function of a pickle becomes: its name, arguments, state and items, and no behaviour."""

    module = name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        # a nested class is named by a call of getattr: a record, which pickle then takes for a class
        record = dict.__new__(cls if isinstance(cls, type) else Record)
        record.args = args
        return record

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any) -> Record:
        return Record(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Ignores the items of what pretends to be a list or a set."""

    extend = add = append
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]  # a record may be a key, or an item of a set


class Storage(NamedTuple):
    """Memory that tensors look into: the name of its type, what reads its bytes, (N,) uint8, and the first element."""

    kind: str
    raw: Callable[[], Tensor]
    start: int


class Reader(pickle._Unpickler):  # not its twin in C, which allocates whatever a file claims to need
    """Unpickles to plain containers, records and storages."""

    def __init__(self, file: IO[bytes], raw: Callable[[Any], Tensor]) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote bytes as text
        self.raw = raw
        self.kinds: dict[Any, str] = {}

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type("Record", (Record,), {"module": module, "name": name})

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"extension {code}")  # the inherited method hands out what others registered

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # a class together with its source text
            return pid[1]
        _, kind, key, _device, _numel, *view = pid
        self.kinds[key] = kind.name
        return Storage(kind.name, partial(self.raw, key), view[0][1] if view and view[0] else 0)


class NumberReader(Reader):
    """Unpickles an object that refers to tensors by number."""

    def __init__(self, file: IO[bytes], known: Mapping[Any, Tensor]) -> None:
        super().__init__(file, _flat)
        self.known = known

    def persistent_load(self, pid: Any) -> Any:
        return pid[0] if isinstance(pid, tuple) else self.known[int(pid)]  # a class together with its source text


def read_pickle(file: IO[bytes]) -> Any:
    """The object in a torch file (the zip of 1.6 and later, the stream before it, the tar of 0.1) or a plain pickle.

    Plain containers, numbers and texts are themselves, all else is a Record; `is_tensor` tells which records are
    tensors, and `tensor` reads one while `file` is open. Raises SaccadeError for tensors that have no plain form, and
    whatever comes up where the file is damaged.
    """
    head = file.read(512)
    file.seek(0)
    if head[:4] == b"PK\x03\x04":
        return _read_zip(file)
    return _read_tar(file) if head[257:262] == b"ustar" else _read_stream(file)


def is_tensor(value: Any) -> bool:
    """Whether `value` is a tensor or the record of a tensor or of an array of numbers."""
    if not isinstance(value, Record):
        return isinstance(value, Tensor)
    if value.module.startswith("numpy") and value.name in ("_reconstruct", "_frombuffer"):
        _, dtype, *_ = _array_parts(value)
        return dtype.name == "dtype" and dtype.args[0][0] in "biufc"  # no texts, no objects
    return value.module.startswith("torch") and value.name.startswith("_rebuild_")


def tensor(value: Any) -> Tensor:
    """The tensor that `value` is or records, on the CPU."""
    match value:
        case Tensor():
            return value
        case Record(name="_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3"):
            return _strided(*value.args)
        case Record(name="_rebuild_parameter" | "_rebuild_parameter_with_state"):
            return tensor(value.args[0])
        case Record(name="_rebuild_from_type" | "_rebuild_from_type_v2"):  # args: function, class, arguments, state
            return tensor(value.args[0](*value.args[2]))
        case Record(name="_reconstruct" | "_frombuffer"):
            raw, dtype, shape, order = _array_parts(value)
            stored = np.dtype(dtype.args[0]).newbyteorder(dtype.state[1])
            array = np.frombuffer(_bytes(raw), stored).reshape(shape, order=order)
            return torch.from_numpy(array.astype(stored.newbyteorder("=")))
    raise SaccadeError(f"holds a tensor made by {value.name}; save it as a dense tensor")


def _read_zip(file: IO[bytes]) -> Any:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    root = next((name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")), "")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") == b"big":
        raise SaccadeError("written on a big-endian machine; save it again on a little-endian one")
    raw = cache(lambda key: _flat(archive.read(f"{root}data/{key}")))
    return Reader(io.BytesIO(archive.read(f"{root}data.pkl")), raw).load()


def _read_stream(file: IO[bytes]) -> Any:
    places: dict[Any, tuple[int, int]] = {}

    @cache
    def raw(key: Any) -> Tensor:
        start, size = places[key]
        file.seek(start)
        return _flat(file.read(size))

    file.seek(0)
    content = Reader(file, raw).load()
    if content != LEGACY_MAGIC:
        return content
    _version, _machine = Reader(file, raw).load(), Reader(file, raw).load()
    reader = Reader(file, raw)
    content, keys = reader.load(), Reader(file, raw).load()
    place = file.tell()
    end = file.seek(0, os.SEEK_END)
    for key in keys:
        file.seek(place)
        (count,) = struct.unpack("<Q", file.read(8))
        places[key] = place + 8, count * DTYPES[reader.kinds[key]].itemsize
        place = sum(places[key])
    if place > end:
        raise EOFError(f"{end} of {place} bytes")
    return content


def _read_tar(file: IO[bytes]) -> Any:
    """Members of their own hold storages, tensors that look into them, and the object that refers to both by number."""
    known: dict[Any, Tensor] = {}  # a storage is a flat tensor; views, then tensors, come with later numbers
    with tarfile.open(fileobj=file, mode="r:") as archive:
        members = {name: io.BytesIO(_member(archive, name)) for name in ("storages", "tensors", "pickle")}
    storages, tensors = members["storages"], members["tensors"]

    def entries(member: IO[bytes]) -> Iterator[Any]:
        for _ in range(Reader(member, _flat).load()):
            yield Reader(member, _flat).load()

    for key, _device, kind in entries(storages):
        dtype = DTYPES[kind.name]
        (count,) = struct.unpack("<q", _exactly(storages, 8))
        known[key] = _flat(_exactly(storages, count * dtype.itemsize)).view(dtype)
    for key, root, start, count in Reader(storages, _flat).load():
        known[key] = known[root][start : start + count]
    for key, storage, _kind in entries(tensors):
        (rank, _) = struct.unpack("<ii", _exactly(tensors, 8))
        numbers = struct.unpack(f"<{2 * rank + 1}q", _exactly(tensors, 8 * (2 * rank + 1)))
        flat = known[storage]
        known[key] = flat.as_strided(numbers[:rank], numbers[rank:-1], flat.storage_offset() + numbers[-1])
    return NumberReader(members["pickle"], known).load()


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """The bytes of a plain file; a link points out of the archive, a sparse file claims whatever size it likes."""
    info = archive.getmember(name)
    member = archive.extractfile(info) if info.isreg() and not info.issparse() else None
    if member is None:
        raise pickle.UnpicklingError(f"{name} is no plain file")
    return member.read()


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if size < 0 or len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes")
    return data


def _flat(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _strided(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    if isinstance(storage, Record):  # in a plain pickle a storage is a torch file of its own
        storage = _read_stream(io.BytesIO(_bytes(storage.args[0])))
    if any(type(bits) is dict and bits for bits in rest):
        raise SaccadeError("holds a conjugate or negative view; save it resolved")
    dtypes = [getattr(torch, item.name) for item in rest if isinstance(item, type) and issubclass(item, Record)]
    flat: Tensor = storage.raw().view(dtypes[0] if dtypes else DTYPES[storage.kind])
    return flat.as_strided(size, stride, storage.start + offset)  # refuses what lies outside of the memory


def _array_parts(record: Record) -> tuple[Any, Any, Any, Any]:
    if record.name == "_frombuffer":
        raw, dtype, shape, order = record.args
        return raw, dtype, shape, order
    _, shape, dtype, fortran, raw = record.state
    return raw, dtype, shape, "F" if fortran else "C"


def _bytes(value: Any) -> bytes:
    """Bytes as pickles hold them: as they are, as latin-1 text, or as a call that encodes such text."""
    if isinstance(value, Record):
        value = value.args[0] if value.args else ""
    return value.encode("latin1") if isinstance(value, str) else bytes(value)
