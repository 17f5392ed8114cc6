"""A check that weights are finite: a file with a NaN or an infinity is not a usable model.

All bytes are read except holes of the file, which are zeros: a stand-in of many gigabytes takes a moment.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.digests import next_data
from tilewright.runtime.bundle.safetensors import SAFETENSORS_DTYPES
from tilewright.runtime.bundle.weights import Reference

__all__ = ["nonfinite"]

CHUNK = 1 << 22  # bytes checked at a time: they and the intermediate results stay in the CPU's cache
WIDTHS = dict(SAFETENSORS_DTYPES.values())
NUMBERS = {"float32": np.float32, "float16": np.float16, "float64": np.float64}
EXPONENTS = {"bfloat16": (np.uint16, 0x7F80), "float8_e5m2": (np.uint8, 0x7C)}  # all ones: NaN or infinity
NAN = {"float8_e4m3fn": (np.uint8, 0x7F)}  # this type has no infinities


def nonfinite(references: Mapping[str, tuple[Path, Reference]]) -> tuple[Path, str] | None:
    """The file and name of the first tensor with a number that is not finite, in the order of the files; or none.

    `references`: tensor -> the folder of its file, and its place in the file.
    """
    placed = sorted(references.items(), key=lambda item: (item[1][0], item[1][1].file, item[1][1].offset))
    for name, (folder, reference) in placed:
        file = folder / reference.file
        if not all(_finite(chunk, reference.dtype) for chunk in _chunks(file, reference)):
            return file, name
    return None


def _chunks(file: Path, reference: Reference) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a tensor, in chunks of whole elements, without holes of the file."""
    width = WIDTHS[reference.dtype]
    start, end = reference.offset, reference.offset + reference.length
    data: npt.NDArray[np.uint8] = np.memmap(file, np.uint8, "r", start, (reference.length,))
    with file.open("rb", buffering=0) as stream:
        at = start
        while at < end and (data_start := next_data(stream.fileno(), at, end)) < end:
            at = data_start - (data_start - start) % width
            after = min(end, at + CHUNK, _next_hole(stream.fileno(), data_start, end) + width)
            after += (start - after) % width
            yield data[at - start : after - start]
            at = after


def _next_hole(descriptor: int, at: int, end: int) -> int:
    try:
        return os.lseek(descriptor, at, os.SEEK_HOLE)
    except OSError:  # the file system does not know its holes
        return end


def _finite(chunk: npt.NDArray[np.uint8], dtype: str) -> bool:
    if dtype in NUMBERS:
        return bool(np.isfinite(chunk.view(NUMBERS[dtype])).all())
    if dtype in EXPONENTS | NAN:
        kind, bits = (EXPONENTS | NAN)[dtype]
        numbers: Any = chunk.view(kind)
        return not bool(((numbers & bits) == bits).any())
    return True  # whole numbers
