"""Named tensors as one stream of bytes with a table; reading is lazy, writing is one tensor at a time.

The table is a list of {name, dtype, shape}; the bytes of the tensors follow each other in that order, little-endian
and without gaps. No code is ever loaded from such a stream.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from wardround.errors import WireError

Array = npt.NDArray[Any]
DTYPES = ("float32", "float64", "int64", "int32", "uint8", "bool", "complex64")
MAX_RANK = 8


@dataclass(frozen=True)
class TensorInfo:
    """Name, element type and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes as an array; numpy has no bfloat16, which is widened (`wardround.wire.host.on_host`)."""
        return self.size * np.dtype("float32" if self.dtype == "bfloat16" else self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """A row of a message's tensor table."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def table_of(tensors: Mapping[str, Array]) -> tuple[TensorInfo, ...]:
    """The table of arrays held in memory, in their order."""
    return tuple(TensorInfo(name, str(a.dtype), tuple(a.shape)) for name, a in tensors.items())


def parse_table(rows: Any) -> tuple[TensorInfo, ...]:
    """A tensor table from JSON; raises `WireError` for anything that is not one."""
    if not isinstance(rows, list):
        raise WireError("a tensor table is not a list")
    table = []
    for row in rows:
        match row:
            case {"name": str(name), "dtype": str(dtype), "shape": list(shape), **rest} if not rest:
                if dtype not in DTYPES:
                    raise WireError(f"tensor {name[:80]!r} has dtype {dtype[:20]!r}, which is not sent")
                if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
                    raise WireError(f"tensor {name[:80]!r} has an impossible shape")
                table.append(TensorInfo(name, dtype, tuple(shape)))
            case _:
                raise WireError("a row of a tensor table needs name, dtype and shape, and nothing else")
    if len({row.name for row in table}) != len(table):
        raise WireError("a tensor table names a tensor twice")
    return tuple(table)


class TensorFile(Mapping[str, Array]):
    """Tensors in a file, read one at a time so that memory holds one tensor, not the model.

    With `data`, the bytes of the file, nothing more is read from it.
    """

    def __init__(self, path: Path, table: Iterable[TensorInfo], data: memoryview | None = None) -> None:
        self.path = path
        self.table = tuple(table)
        self._data = data
        self._where: dict[str, tuple[TensorInfo, int]] = {}
        offset = 0
        for info in self.table:
            self._where[info.name] = (info, offset)
            offset += info.nbytes
        self.nbytes = offset

    def __getitem__(self, name: str) -> Array:
        info, offset = self._where[name]
        out = np.empty(info.shape, dtype=info.dtype)
        if not out.size:
            return out
        if self._data is not None:
            out.reshape(-1)[:] = np.frombuffer(self._data, info.dtype, info.size, offset)
            return out
        with self.path.open("rb") as file:
            file.seek(offset)
            if file.readinto(out.reshape(-1).view(np.uint8).data) != info.nbytes:
                raise WireError(f"the bytes of tensor {name[:80]!r} are missing from its file")
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class Chosen(Mapping[str, Array]):
    """Tensors of other mappings by names of their own, each read when it is asked for.

    `places` says of each name which mapping it is in, and under which name.
    """

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Array], str]]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> Array:
        source, own = self._places[name]
        return source[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def joined(*parts: Mapping[str, Array]) -> Mapping[str, Array]:
    """The tensors of several mappings, each read when it is asked for; of one name, the last mapping's."""
    return Chosen({name: (part, name) for part in parts for name in part})


def tensors_in(data: bytearray, table: Iterable[TensorInfo]) -> dict[str, Array]:
    """The tensors of a stream that is in memory, as views of it; raises `WireError` when it is too short."""
    tensors, offset = {}, 0
    for info in table:
        if offset + info.nbytes > len(data):
            raise WireError(f"the bytes of tensor {info.name[:80]!r} are missing from its file")
        flat = np.frombuffer(data, np.dtype(info.dtype), info.size, offset) if info.size else np.empty(0, info.dtype)
        tensors[info.name] = flat.reshape(info.shape)
        offset += info.nbytes
    return tensors


class TensorWriter:
    """Write tensors one after the other to a binary file, keeping the table and the hash of the bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._table: list[TensorInfo] = []
        self.nbytes = 0

    def add(self, name: str, tensor: Array) -> None:
        """Append a tensor; its dtype must be one that is sent."""
        if str(tensor.dtype) not in DTYPES:
            raise WireError(f"tensor {name[:80]!r} has dtype {tensor.dtype}, which is not sent")
        self._table.append(TensorInfo(name, str(tensor.dtype), tuple(tensor.shape)))
        data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
        self._hash.update(data)
        self._file.write(data)
        self.nbytes += len(data)

    @property
    def table(self) -> tuple[TensorInfo, ...]:
        """The table so far."""
        return tuple(self._table)

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes so far, in hex."""
        return self._hash.hexdigest()


def tensors_sha256(tensors: Mapping[str, Array], names: Iterable[str] | None = None) -> str:
    """SHA-256 over names, types, shapes and bytes, sorted by name: the identity of a model, whatever its file.

    With `names` of these alone. One tensor is looked at after the other.
    """
    total = hashlib.sha256()
    for name in sorted(tensors if names is None else names):
        array = np.ascontiguousarray(tensors[name])
        total.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
