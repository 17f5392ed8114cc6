"""Whether weights are numbers: a file that holds a NaN or an infinity is no model.

Every byte is looked at but those of holes, which read as zeros: a stand-in of gigabytes is a moment's work.
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

CHUNK = 1 << 22  # bytes looked at together: they and what is made of them stay in the cache
WIDTHS = dict(SAFETENSORS_DTYPES.values())
NUMBERS = {"float32": np.float32, "float16": np.float16, "float64": np.float64}
EXPONENTS = {"bfloat16": (np.uint16, 0x7F80), "float8_e5m2": (np.uint8, 0x7C)}  # all ones: NaN or infinity
NAN = {"float8_e4m3fn": (np.uint8, 0x7F)}  # which has no infinities


def nonfinite(references: Mapping[str, tuple[Path, Reference]]) -> tuple[Path, str] | None:
    """The first tensor, in the order of files and offsets, with a number that is not finite, and its file; or none.

    `references`: tensor -> the folder its file lies in, and where in the file.
    """
    placed = sorted(references.items(), key=lambda item: (item[1][0], item[1][1].file, item[1][1].offset))
    for name, (folder, reference) in placed:
        file = folder / reference.file
        if not all(_finite(chunk, reference.dtype) for chunk in _chunks(file, reference)):
            return file, name
    return None


def _chunks(file: Path, reference: Reference) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a tensor by whole elements, but for holes of the file."""
    width = WIDTHS[reference.dtype]
    start, end = reference.offset, reference.offset + reference.length
    data: npt.NDArray[np.uint8] = np.memmap(file, np.uint8, "r", start, (reference.length,))
    with file.open("rb", buffering=0) as opened:
        at = start
        while at < end and (found := next_data(opened.fileno(), at, end)) < end:
            at = found - (found - start) % width
            after = min(end, at + CHUNK, _next_hole(opened.fileno(), found, end) + width)
            after += (start - after) % width
            yield data[at - start : after - start]
            at = after


def _next_hole(descriptor: int, at: int, end: int) -> int:
    try:
        return os.lseek(descriptor, at, os.SEEK_HOLE)
    except OSError:  # a system that cannot tell
        return end


def _finite(chunk: npt.NDArray[np.uint8], dtype: str) -> bool:
    if dtype in NUMBERS:
        return bool(np.isfinite(chunk.view(NUMBERS[dtype])).all())
    if dtype in EXPONENTS | NAN:
        kind, bits = (EXPONENTS | NAN)[dtype]
        numbers: Any = chunk.view(kind)
        return not bool(((numbers & bits) == bits).any())
    return True  # whole numbers
