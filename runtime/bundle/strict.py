"""Converting JSON to frozen dataclasses and back. Everything that the dataclasses do not define is refused.

The same dataclasses define the reader, the writer and the published JSON Schema. Fields may be bool, int, float, str,
tuples, dicts with string keys, unions of these, and nested dataclasses. The metadata of a field are limits, in the
words of JSON Schema: `px: int = field(metadata={"minimum": 1})`. A class with limits calls `check_limits` when it is
made.
"""

import dataclasses
import json
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from tilewright.runtime.errors import BundleError

__all__ = ["check_limits", "encode", "from_json", "one_line", "schema", "to_json"]

T = TypeVar("T")
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
LONGEST_COMPLAINT = 400


def from_json(cls: type[T], text: bytes | str, where: str) -> T:
    """Parse a document into `cls`. `where` begins every complaint."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            ((twice, _),) = Counter(k for k, _ in pairs).most_common(1)
            raise BundleError(f"{where}: key {twice!r} appears twice in one object; rebuild the bundle")
        return values

    try:
        document = json.loads(text, object_pairs_hook=unique)
        return typing.cast(T, _decode(cls, document, where))
    except BundleError as error:
        raise BundleError(one_line(str(error))) from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not valid JSON ({str(error).splitlines()[0]}); rebuild the bundle") from None


def one_line(complaint: str) -> str:
    """A complaint with text from a document, as one printable line; the middle of a long line is cut out."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in complaint)
    half = LONGEST_COMPLAINT // 2
    return text if len(text) <= LONGEST_COMPLAINT else f"{text[: half - 5]} ... {text[-half:]}"


def check_limits(value: Any) -> None:
    """Refuse a dataclass with a field outside its limits: enum, minimum, maximum, minItems, pattern."""
    for field in dataclasses.fields(value):
        limits, content = field.metadata, getattr(value, field.name)
        if content is None:
            continue
        shown = f"{field.name} {content!r}"
        if "enum" in limits and content not in limits["enum"]:
            raise ValueError(f"{shown} is not one of {', '.join(map(str, limits['enum']))}")
        if "pattern" in limits and not re.fullmatch(limits["pattern"], content):
            raise ValueError(f"{shown} does not match {limits['pattern']}")
        if "minItems" in limits and len(content) < limits["minItems"]:
            raise ValueError(f"{field.name} must have at least {limits['minItems']}")
        least, most = limits.get("minimum"), limits.get("maximum")
        if least is not None and most is not None and not least <= content <= most:
            raise ValueError(f"{shown} must lie in {least}..{most}")
        if least is not None and not content >= least:
            raise ValueError(f"{shown} must be at least {least}")


def to_json(value: Any) -> str:
    """The canonical JSON text: sorted keys, two spaces, a final newline."""
    return json.dumps(encode(value), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def encode(value: Any) -> Any:
    """Plain JSON values. All fields are written, so that a new default does not change existing documents."""
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: encode(v) for k, v in value.items()}
    return [encode(v) for v in value] if isinstance(value, (tuple, list)) else value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_fields(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        return {k: _decode(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max  # refuses NaN and huge integers
        _expect(fits, "a finite number", value, where)
        return float(value)
    _expect(type(value) is kind, _name(kind), value, where)
    return value


def _decode_fields(cls: type, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(value.keys() - fields.keys()):
        raise BundleError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    for name, field in fields.items():
        if name not in value and _default(field) is dataclasses.MISSING:
            raise BundleError(f"{where}: key {name!r} is missing; rebuild the bundle")
    types_of = typing.get_type_hints(cls)
    decoded = {name: _decode(types_of[name], v, f"{where}.{name}") for name, v in value.items()}
    try:
        return cls(**decoded)
    except ValueError as error:
        raise BundleError(f"{where}: {error}") from None


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), "a list", value, where)
    if arguments[-1] is Ellipsis:
        return tuple(_decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    _expect(len(value) == len(arguments), f"a list of {len(arguments)}", value, where)
    return tuple(_decode(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))


def _decode_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    real = [c for c in choices if c is not type(None)]
    if value is None and len(real) < len(choices):
        return None
    if len(real) == 1:
        return _decode(real[0], value, where)
    for choice in real:
        try:
            return _decode(choice, value, where)
        except BundleError:
            continue
    return _expect(False, " or ".join(_name(c) for c in choices), value, where)


def _expect(fits: bool, expected: str, value: Any, where: str) -> None:
    if not fits:
        shown = json.dumps(value, default=str)
        raise BundleError(f"{where}: expected {expected}, found {shown if len(shown) <= 60 else shown[:57] + '...'}")


def _name(kind: Any) -> str:
    return JSON_TYPES.get(kind) or ("an object" if dataclasses.is_dataclass(kind) else "a list")


def schema(cls: type, title: str) -> dict[str, Any]:
    """The JSON Schema of a dataclass, with all dataclasses under $defs."""
    definitions: dict[str, Any] = {}
    root = _schema(cls, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **root, "$defs": definitions}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}
            definitions[kind.__name__] = _schema_of_fields(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(a, definitions) for a in arguments]}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is tuple:
        items = [_schema(a, definitions) for a in arguments]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    return {"type": JSON_TYPES[kind]}


def _schema_of_fields(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    types_of = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    return {
        "type": "object",
        "description": (cls.__doc__ or "").splitlines()[0],
        "properties": {
            f.name: _schema(types_of[f.name], definitions) | encode(f.metadata) | _schema_default(f) for f in fields
        },
        "required": [f.name for f in fields if _default(f) is dataclasses.MISSING],
        "additionalProperties": False,
    }


def _schema_default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    default = _default(field)
    return {} if default is dataclasses.MISSING else {"default": encode(default)}
