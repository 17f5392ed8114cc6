"""Reading and changing the references of an ONNX file to bytes in other files, with the standard library only.

The file is a tree of protocol buffers. Only messages that may contain tensors are searched. A tensor with external data
contains the word "location", so messages without this word are skipped.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tilewright.runtime.errors import BundleError

__all__ = ["External", "external_data", "relocated", "with_inputs"]

T = TypeVar("T")
Value = int | tuple[int, int]  # a number, or begin and end of bytes
WORD = b"location"
KEYS = ("location", "offset", "length")
KINDS = {  # data type of onnx.TensorProto -> our name
    1: "float32",
    2: "uint8",
    3: "int8",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    17: "float8_e4m3fn",
    19: "float8_e5m2",
}
INSIDE = {  # message of onnx.proto -> field -> message in it, for messages that may contain tensors
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
INITIALIZER = ("ModelProto", "GraphProto", "TensorProto")  # the only place of external data in our graphs
DEEPEST = 100  # most levels of messages; onnx reads no more


@dataclass(frozen=True)
class External:
    """The place of an initializer's bytes, as written in a graph."""

    location: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


def external_data(graph: bytes, where: str) -> dict[str, External]:
    """Initializer -> the place of its bytes in another file. `where` begins every complaint."""
    externals: dict[str, External] = {}
    try:
        for path, at, end in _tensors(graph, ("ModelProto",), 0, len(graph)):
            name, external = _tensor(graph, at, end)
            if external is None:
                continue
            if path != INITIALIZER:
                raise BundleError(f"{where}: {name!r} reads {external.location!r} but is no initializer of the graph")
            if name in externals:
                raise BundleError(f"{where}: two initializers are named {name!r}; rebuild the bundle")
            externals[name] = external
    except ValueError as error:
        raise BundleError(f"{where}: not an ONNX graph ({error}); rebuild the bundle") from None
    return externals


def relocated(graph: bytes, places: Mapping[str, tuple[str, int, int]]) -> bytes:
    """The graph with new places for the bytes of initializers: name -> location, offset, length."""

    def moved(data: bytes) -> bytes:
        name, external = _tensor(data, 0, len(data))
        if external is None or name not in places:
            return data
        pairs = zip(KEYS, map(str, places[name]), strict=True)
        entries = (_message(13, _message(1, key.encode()) + _message(2, text.encode())) for key, text in pairs)
        return _changed(data, 13, lambda entry: None) + b"".join(entries)

    return _changed(graph, 7, lambda whole: _changed(whole, 5, moved))


def with_inputs(graph: bytes) -> bytes:
    """The graph with an input in the place of every initializer whose bytes are in another file."""

    def changed(whole: bytes) -> bytes:
        inputs: list[bytes] = []

        def taken(data: bytes) -> bytes | None:
            name, external = _tensor(data, 0, len(data))
            if external is None:
                return data
            inputs.append(_message(11, _input(name, external)))
            return None

        return _changed(whole, 5, taken) + b"".join(inputs)

    return _changed(graph, 7, changed)


def _input(name: str, external: External) -> bytes:
    """The onnx.ValueInfoProto of a tensor with this type and shape."""
    kind = next(number for number, dtype in KINDS.items() if dtype == external.dtype)
    shape = b"".join(_message(1, _number_field(1, size)) for size in external.shape)
    return _message(1, name.encode()) + _message(2, _message(1, _number_field(1, kind) + _message(2, shape)))


def _number_field(number: int, value: int) -> bytes:
    return _written(number << 3) + _written(value)


def _changed(data: bytes, number: int, change: Callable[[bytes], bytes | None]) -> bytes:
    """A message with every field of this number changed, or removed if `change` gives none."""
    parts, copied = [], 0
    for field, value, begin, end in _fields(data, 0, len(data)):
        if field == number:
            start, stop = _is(tuple, value)
            changed = change(data[start:stop])
            parts += [data[copied:begin], b"" if changed is None else _message(number, changed)]
            copied = end
    return b"".join([*parts, data[copied:]])


def _message(number: int, data: bytes) -> bytes:
    return _written(number << 3 | 2) + _written(len(data)) + data


def _written(value: int) -> bytes:
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + _written(high) if high else bytes([low])


def _tensors(data: bytes, path: tuple[str, ...], at: int, end: int) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """The tensors in a message that may have external data, each with the path of messages to it."""
    inside = INSIDE[path[-1]]
    if len(path) > DEEPEST:
        raise ValueError("nested too deeply")
    for field, value, _, _ in _fields(data, at, end):
        if field not in inside:
            continue
        start, stop = _is(tuple, value)
        if data.find(WORD, start, stop) < 0:
            continue
        below = (*path, inside[field])
        if inside[field] == "TensorProto":
            yield below, start, stop
        else:
            yield from _tensors(data, below, start, stop)


def _tensor(data: bytes, at: int, end: int) -> tuple[str, External | None]:
    """The name of a tensor, and the place of its bytes if they are in another file."""
    name, kind, outside, shape, entries = "", 0, False, [], {}
    for field, value, _, _ in _fields(data, at, end):
        if field == 1:
            shape += [value] if isinstance(value, int) else _packed(data, *value)
        elif field == 2:
            kind = _is(int, value)
        elif field == 8:
            name = _text(data, value)
        elif field == 13:
            outside = True
            pair = {part: text for part, text, _, _ in _fields(data, *_is(tuple, value))}
            key = _text(data, pair.get(1, (0, 0)))
            if key in entries:
                raise ValueError(f"{name!r} says its {key!r} twice")
            entries[key] = _text(data, pair.get(2, (0, 0)))
        elif field == 14:
            outside = outside or value == 1
    if not outside:
        return name, None
    if unknown := sorted(entries.keys() - set(KEYS)):
        raise ValueError(f"{name!r} says its {unknown[0]!r}, which no bundle does")
    if kind not in KINDS:
        raise ValueError(f"{name!r} is of type {kind}, which no bundle holds")
    offset, length = _number(entries.get("offset", "0")), _number(entries.get("length", ""))
    return name, External(entries.get("location", ""), offset, length, KINDS[kind], tuple(shape))


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"{text!r} is no offset and no length")
    return int(text)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, Value, int, int]]:
    """The fields of a message: number, value, begin and end."""
    while at < end:
        begin = at
        tag, at = _varint(data, at, end)
        kind = tag & 7
        value: Value
        if kind == 0:
            value, at = _varint(data, at, end)
        elif kind == 2:
            length, start = _varint(data, at, end)
            at = start + length
            value = (start, at)
        elif kind in (1, 5):
            start, at = at, at + (8 if kind == 1 else 4)
            value = (start, at)
        else:
            raise ValueError(f"a field of kind {kind} at byte {at}")
        if at > end:
            raise ValueError(f"cut short at byte {end}")
        yield tag >> 3, value, begin, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """An integer stored with 7 bits in a byte, and its end."""
    if at < end and data[at] < 128:  # the usual case
        return data[at], at + 1
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError(f"no number at byte {at}")


def _packed(data: bytes, at: int, end: int) -> list[int]:
    numbers = []
    while at < end:
        number, at = _varint(data, at, end)
        numbers.append(number)
    return numbers


def _text(data: bytes, value: Value) -> str:
    start, stop = _is(tuple, value)
    return data[start:stop].decode()  # a UnicodeDecodeError is a ValueError


def _is(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise ValueError("a field is of another kind than onnx gives it")
    return value
