"""The header of a safetensors file: names, types, shapes and places of tensors, and texts."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.files import refusals_in_one_line
from tilewright.runtime.bundle.opening import only_files
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.errors import BundleError

__all__ = ["SAFETENSORS_DTYPES", "safetensors_header", "safetensors_metadata", "safetensors_start"]

SAFETENSORS_DTYPES = {  # name in files -> our name, and the bytes of an element
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F64": ("float64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
NAMES = {dtype: (name, width) for name, (dtype, width) in SAFETENSORS_DTYPES.items()}


@refusals_in_one_line()
def safetensors_header(path: Path) -> dict[str, tuple[TensorSpec, int, int]]:
    """Name of a tensor -> its type and shape, its offset in the file, and its length."""
    return _header(path)[0]


@refusals_in_one_line()
def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts that a file holds beside its tensors."""
    return _header(path)[1]


def safetensors_start(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file before its data. The data is that of the tensors (name -> type, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * NAMES[dtype][1]
        header[name] = {"dtype": NAMES[dtype][0], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, sort_keys=True).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text


def _header(path: Path) -> tuple[dict[str, tuple[TensorSpec, int, int]], dict[str, str]]:
    size = path.stat().st_size
    with open(path, "rb", opener=only_files) as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > min(size - 8, 100_000_000):
            raise BundleError(f"{path}: not a safetensors file, or cut short; copy it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            return {name: _tensor(entry, 8 + length, size) for name, entry in header.items()}, metadata
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"{path}: unreadable safetensors header ({error}); copy it again") from None


def _tensor(entry: dict[str, Any], base: int, size: int) -> tuple[TensorSpec, int, int]:
    start, end = entry["data_offsets"]
    dtype, width = SAFETENSORS_DTYPES[entry["dtype"]]
    spec = TensorSpec(dtype, tuple(entry["shape"]))
    if any(type(number) is not int for number in (start, end, *spec.shape)):
        raise ValueError(f"offsets {start}..{end} and shape {list(spec.shape)} are not all integers")
    if not 0 <= start <= end <= size - base:
        raise ValueError(f"offsets {start}..{end} lie outside the file")
    if end - start != width * math.prod(int(d) for d in spec.shape):
        raise ValueError(f"offsets {start}..{end} do not hold {dtype} {list(spec.shape)}")
    return spec, base + start, end - start
