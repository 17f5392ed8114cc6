"""Reading the header of a safetensors file: names, types, shapes and places of tensors."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.files import refusals_in_one_line
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.errors import BundleError

__all__ = ["SAFETENSORS_DTYPES", "safetensors_header"]

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


@refusals_in_one_line()
def safetensors_header(path: Path) -> dict[str, tuple[TensorSpec, int, int]]:
    """Name of a tensor -> its type and shape, its offset in the file, and its length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > min(size - 8, 100_000_000):
            raise BundleError(f"{path}: not a safetensors file, or cut short; copy it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {name: _tensor(entry, 8 + length, size) for name, entry in header.items()}
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
