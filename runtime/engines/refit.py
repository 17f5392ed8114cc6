"""The weights of a TensorRT plan that was stripped of them: set from the mapped files, each of them checked.

A LoRA is other values for some weights. The weights that an earlier one changed get their own values back first.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.weights import Reference, location
from tilewright.runtime.engines.driver import Gpu
from tilewright.runtime.errors import BundleError, UsageError

__all__ = ["TYPES", "Refit"]

Array = npt.NDArray[Any]
TYPES = {  # in weights.json -> in TensorRT
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "float8_e4m3fn": "FP8",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "bool": "BOOL",
}
AGAIN = "make it again with 'tilewright export compile BUNDLE --target tensorrt'"


class Refit:
    """All weights of an engine, by the names in its graph."""

    def __init__(self, plan: Path, refitter: Any, gpu: Gpu) -> None:
        import tensorrt as trt

        self.trt, self.plan, self.refitter, self.gpu = trt, plan, refitter, gpu
        self.prototypes = {name: refitter.get_weights_prototype(name) for name in refitter.get_all_weights()}
        self.base: dict[str, Array] = {}
        self.changed: set[str] = set()

    def load(self, references: Mapping[str, Reference], files: Mapping[str, Path]) -> None:
        """Set every weight from its file. `files`: location of weights in a packed bundle -> real path."""
        maps = {file: np.memmap(file, np.uint8, mode="r") for file in set(files.values())}
        for name, prototype in self.prototypes.items():
            r = references.get(name)
            if r is None:
                raise BundleError(f"{self.plan}: reads a weight {name!r} that weights.json does not list; {AGAIN}")
            if TYPES[r.dtype] != prototype.dtype.name or np.prod(r.shape, dtype=np.int64) != prototype.size:
                asked = f"{prototype.size} numbers of {prototype.dtype.name}"
                raise BundleError(f"{self.plan}: {name!r} is {r.dtype} {list(r.shape)}, and not {asked}; {AGAIN}")
            self.base[name] = maps[files[location(r)]][r.offset : r.offset + r.length]
        self._set(self.base)

    def change(self, weights: Mapping[str, Array]) -> None:
        """Give some weights other values, and all others those of the files."""
        for name, array in weights.items():
            if name not in self.base:
                raise UsageError(f"{self.plan}: weight {name!r} is none of this engine; see weights.json for its names")
            if array.nbytes != self.base[name].nbytes or not array.flags.c_contiguous:
                wants = f"{self.base[name].nbytes} bytes in order"
                raise UsageError(f"{self.plan}: weight {name!r} has {array.nbytes} bytes, and needs {wants}")
        back = {name: self.base[name] for name in self.changed - weights.keys()}
        self._set({**back, **weights})
        self.changed = set(weights)

    def _set(self, weights: Mapping[str, Array]) -> None:
        for name, array in weights.items():
            prototype = self.prototypes[name]
            if not self.refitter.set_named_weights(
                name, self.trt.Weights(prototype.dtype, array.ctypes.data, prototype.size)
            ):
                raise BundleError(f"{self.plan}: TensorRT does not take weight {name!r}; {AGAIN}")
        if missing := self.refitter.get_missing_weights():
            raise BundleError(
                f"{self.plan}: {len(missing)} weights got no values, the first is {missing[0]!r}; {AGAIN}"
            )
        if self.prototypes and not self.refitter.refit_cuda_engine_async(self.gpu.stream):
            raise BundleError(f"{self.plan}: TensorRT refuses the weights; {AGAIN}")
        self.gpu.wait()  # until then TensorRT reads the arrays
