"""Writing safetensors files tensor by tensor, and seeded random weights."""

import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.bundle.safetensors import SAFETENSORS_DTYPES
from tilewright.runtime.errors import UsageError

__all__ = ["WIDTHS", "random_weights", "write_tensors"]

WIDTHS = dict(SAFETENSORS_DTYPES.values())  # type -> bytes of an element


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[bytes], note: str) -> None:
    """Write a safetensors file, one tensor after the other. Without tensors, a hole of the file stands for zeros."""
    stored = {dtype: (name, width) for name, (dtype, width) in SAFETENSORS_DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"note": note}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + stored[spec.dtype][1] * math.prod(int(d) for d in spec.shape)
        header[name] = {"dtype": stored[spec.dtype][0], "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in tensors:
            file.write(data)
        file.truncate(8 + len(text) + end)


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int, path: Path) -> None:
    """Write seeded float32 weights, the same on every machine. Their size keeps activations near one."""
    specs = {name: TensorSpec("float32", shape) for name, shape in sorted(shapes.items())}
    write_tensors(path, specs, (_random(name, shapes[name], seed) for name in specs), f"random weights, seed {seed}")


def _random(name: str, shape: tuple[int, ...], seed: int) -> bytes:
    if not 0 <= seed < 2**32:
        raise UsageError(f"--random-weights {seed} does not fit in 32 bits; use a number from 0 to {2**32 - 1}")
    import numpy as np

    generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
    values = generator.standard_normal(shape, np.float32)
    if len(shape) > 1:
        values *= np.float32((np.prod(shape[1:]) if len(shape) == 4 else shape[-1]) ** -0.5)
    else:
        values = values * np.float32(0.02) + np.float32(not name.endswith("bias"))
    return values.astype("<f4").tobytes()
