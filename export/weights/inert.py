"""Reading names, types and shapes from PyTorch pickles, without running code, reading tensors or loading PyTorch.

Only the opcodes of torch.load(weights_only=True) are accepted. Every function or class that a file names becomes an
object here that does nothing.
"""

import collections
import io
import math
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tilewright.runtime.bundle.opening import only_files

__all__ = ["Forbidden", "Other", "Tensor", "content", "element"]

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two values in a file of the older format
LARGEST_PICKLE = 1 << 28  # bytes; room for names, types and shapes of millions of tensors
LARGEST = 1 << 63
OPCODES = (
    *("PROTO", "STOP", "MARK", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
    *("NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    *("LONG1", "BINPERSID", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
)
STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "UntypedStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexDoubleStorage": ("complex128", 16),
    "ComplexFloatStorage": ("complex64", 8),
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
}
WIDTHS = dict(STORAGES.values()) | {
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"), 1),
    **{"uint16": 2, "uint32": 4, "uint64": 8, "bits16": 2, "complex32": 4},
}
NOT_PLAIN = (
    *("_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage", "_rebuild_nested_tensor"),
    "_rebuild_wrapper_subclass",
)
OTHERS = {  # other names that weights_only accepts -> the name of their type
    "collections.Counter": "Counter",
    "torch.device": "device",
    "torch.serialization._get_layout": "layout",
    "_codecs.encode": "bytes",
    "builtins.bytearray": "bytearray",
    "builtins.set": "set",
    "builtins.complex": "complex",
}
OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Forbidden(Exception):
    """A pickle names something that is no tensor: `MODULE.NAME`."""


@dataclass(frozen=True)
class Other:
    """A value that is no plain tensor."""

    kind: str  # the name of its type
    tensor: bool = False  # it is a sparse, nested or meta tensor


@dataclass(frozen=True)
class _Storage:
    dtype: str
    nbytes: int
    key: str
    start: int = 0  # bytes before it in the storage of this key


@dataclass(frozen=True)
class Tensor:
    """A tensor over a part of its storage."""

    dtype: str
    shape: tuple[int, ...]
    stored: int  # bytes of the whole storage
    place: tuple[str, int]  # the storage's key, and bytes before the first element
    kind: str = "Tensor"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, not of its storage."""
        return WIDTHS[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class _Name:
    """A function or class that a pickle may name. Calling it returns a description, and runs no code of PyTorch."""

    path: str

    def __call__(self, *arguments: Any) -> Any:
        name = self.path.rpartition(".")[2]
        if self.path == "collections.OrderedDict":
            return collections.OrderedDict(*arguments)
        if self.path == "torch.Size":
            return tuple(*arguments)
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _tensor(arguments[0].dtype, *arguments[:4])
        if name == "_rebuild_tensor_v3":
            return _tensor(arguments[6].path.removeprefix("torch."), *arguments[:4])
        if name == "_rebuild_qtensor":
            return _tensor(arguments[0].dtype, *arguments[:4])
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter"):
            return _tensor_of(arguments[0])
        if name == "_rebuild_from_type_v2":
            if arguments[1].path not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
                raise Forbidden(arguments[1].path)
            return _tensor_of(arguments[0](*arguments[2]))
        if name in NOT_PLAIN:
            return Other("Tensor", tensor=True)
        if self.path in OTHERS:
            return Other(OTHERS[self.path])
        raise pickle.UnpicklingError(f"{self.path} is called")


def _tensor_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tensor(value.dtype, value.shape, value.stored, value.place, "Parameter")
    return Other("Parameter", tensor=isinstance(value, Other) and value.tensor)


def _tensor(dtype: str, storage: _Storage, offset: int, shape: Any, strides: Any) -> Tensor:
    """A description of a tensor. One that reaches beyond its storage is refused, as by PyTorch."""
    shape, strides, width = tuple(shape), tuple(strides), WIDTHS[dtype]
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < LARGEST for n in numbers):
        raise pickle.UnpicklingError("a tensor's numbers")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * width > storage.nbytes:
        raise pickle.UnpicklingError("a tensor beyond its storage")
    return Tensor(dtype, shape, storage.nbytes, (storage.key, storage.start + offset * width))


_InPython: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the one in C has a memo that a file can inflate


class _Reader(_InPython):  # type: ignore[misc]
    dispatch = {  # noqa: RUF012
        opcode: load
        for opcode, load in _InPython.dispatch.items()
        if opcode in {getattr(pickle, name)[0] for name in OPCODES}
    }

    def __init__(self, file: IO[bytes], untyped: bool = False) -> None:
        super().__init__(file, encoding="utf-8")
        self.untyped = untyped  # PyTorch accepts storages without a type only in archives
        self.storages: dict[str, _Storage] = {}  # by key

    def find_class(self, module: str, name: str) -> Any:
        path = f"{OLD_NAMES.get(module, module)}.{name}"
        inner = path.removeprefix("torch.")
        if name in STORAGES and module in ("torch", "torch.storage", "torch.cuda"):
            return _Name(f"torch.{name}")
        if path in ("collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.nn.parameter.Parameter", *OTHERS):
            return _Name(path)
        if module == "torch._utils" and (name in NOT_PLAIN or re.fullmatch(REBUILD, name)):
            return _Name(path)
        if path == "torch._tensor._rebuild_from_type_v2" or inner in WIDTHS or re.fullmatch(LEGACY_TENSOR, path):
            return _Name(path)
        raise Forbidden(path.removeprefix("builtins."))

    def persistent_load(self, pid: Any) -> _Storage:
        kind, named, key, _, count, *view = pid
        dtype, width = STORAGES[named.path.removeprefix("torch.")]
        key = key if isinstance(key, str) else str(int(key))
        if kind not in ("storage", b"storage") or not (type(count) is int and 0 <= count < LARGEST):
            raise pickle.UnpicklingError("no storage")
        if named.path == "torch.UntypedStorage" and not self.untyped:
            raise pickle.UnpicklingError("a storage without a type")
        whole = self.storages.setdefault(key, _Storage(dtype, width * count, key))
        if not view or view[0] is None:
            return whole
        _, first, length = view[0]
        if not (type(first) is int and type(length) is int and 0 <= first <= first + length <= count):
            raise pickle.UnpicklingError("a view beyond its storage")
        return _Storage(dtype, width * length, key, width * first)

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self.append(kind(*arguments))

    def load_build(self) -> None:
        """Drop the attributes of a dict or a parameter: they hold no tensors of the file."""
        self.stack.pop()
        if not isinstance(self.stack[-1], (dict, Tensor, Other)):
            raise pickle.UnpicklingError("a state of no dict")

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build


REBUILD = r"_rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|qtensor)"
LEGACY_TENSOR = r"torch\.(per_(tensor|channel)_\w+)"


@dataclass
class _Places:
    """The place of each storage's bytes in a file."""

    offsets: dict[str, int] = field(default_factory=dict)  # older format: storage -> offset in the file
    entries: dict[str, str] = field(default_factory=dict)  # newer format: storage -> entry of the archive
    swapped: bool = False  # written by a big-endian machine


def content(path: Path) -> Any:
    """The value in a file: plain tensors as `Tensor`, other objects as `Other`, plain values as they are."""
    return _read(path)[0]


def element(path: Path, tensor: Tensor) -> bytes:
    """The bytes of a tensor's first element, little-endian."""
    places, (key, offset), width = _read(path)[1], tensor.place, WIDTHS[tensor.dtype]
    with open(path, "rb", opener=only_files) as file:
        if key in places.offsets:
            file.seek(places.offsets[key] + offset)
            return file.read(width)
        with zipfile.ZipFile(file) as archive, archive.open(places.entries[key]) as entry:
            entry.seek(offset)
            data = entry.read(width)
            return data[::-1] if places.swapped else data


def _read(path: Path) -> tuple[Any, _Places]:
    with open(path, "rb", opener=only_files) as file:
        if file.read(4) == b"PK\3\4":
            with zipfile.ZipFile(file) as archive:
                return _read_archive(archive)
        file.seek(0)
        return _read_older(file)


def _read_archive(archive: zipfile.ZipFile) -> tuple[Any, _Places]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    top = next(iter(entries)).partition("/")[0]
    pickled = entries[f"{top}/data.pkl"]
    if pickled.file_size > LARGEST_PICKLE or f"{top}/constants.pkl" in entries:
        raise pickle.UnpicklingError("a program")
    reader = _Reader(io.BytesIO(archive.read(pickled)), untyped=True)
    content = reader.load()
    places = _Places()
    for key, storage in reader.storages.items():
        places.entries[key] = f"{top}/data/{key}"
        if entries[places.entries[key]].file_size < storage.nbytes:
            raise pickle.UnpicklingError("a storage of another size")
    order = f"{top}/byteorder"
    places.swapped = order in entries and archive.read(order)[:4] == b"big"
    return content, places


def _read_older(file: IO[bytes]) -> tuple[Any, _Places]:
    magic, protocol, _ = (_Reader(file).load() for _ in range(3))
    if (magic, protocol) != (MAGIC, PROTOCOL):
        raise pickle.UnpicklingError("another format")
    reader = _Reader(file)
    content, keys = reader.load(), _Reader(file).load()
    places = _Places()
    end = file.seek(0, 1)
    for key in keys:
        storage = reader.storages[str(key)]
        (count,) = struct.unpack("<q", file.read(8))
        if count * WIDTHS[storage.dtype] != storage.nbytes:
            raise pickle.UnpicklingError("a storage of another size")
        places.offsets[storage.key] = end + 8
        end = file.seek(storage.nbytes, 1)
    if end > file.seek(0, 2) or reader.storages.keys() - places.offsets.keys():
        raise pickle.UnpicklingError("a storage that is not there")
    return content, places
