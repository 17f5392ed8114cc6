"""Writing safetensors files tensor by tensor, and seeded random weights."""

import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.bundle.safetensors import SAFETENSORS_DTYPES, safetensors_start
from tilewright.runtime.errors import UsageError

__all__ = ["WIDTHS", "random_weights", "write_tensors"]

WIDTHS = dict(SAFETENSORS_DTYPES.values())  # type -> bytes of an element


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[bytes], note: str) -> None:
    """Write a safetensors file, one tensor after the other. Without tensors, a hole of the file stands for zeros."""
    shapes = {name: (spec.dtype, tuple(int(d) for d in spec.shape)) for name, spec in specs.items()}
    start = safetensors_start(shapes, {"note": note})
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(start)
        for data in tensors:
            file.write(data)
        file.truncate(len(start) + sum(WIDTHS[dtype] * math.prod(shape) for dtype, shape in shapes.values()))


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
