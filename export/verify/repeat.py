"""The commands that repeat a component's call without Tilewright, after an engine failed or missed its gate."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.engines import Engine

__all__ = ["Calls", "Shapes", "Watched", "commands"]

Shapes = dict[str, list[int]]  # input -> its sizes
FOLDER = "onnx"


@dataclass
class Calls:
    """The sizes of the inputs of each component's last call, and of each component's first call that failed."""

    last: dict[str, Shapes] = field(default_factory=dict)
    failed: dict[str, Shapes] = field(default_factory=dict)


@dataclass
class Watched:
    """An engine whose calls are written down."""

    engine: Engine
    component: str
    calls: Calls

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Compute these outputs from the inputs. A call that raises, or returns NaN or infinity, has failed."""
        shapes: Shapes = {name: [*array.shape] for name, array in inputs.items()}
        self.calls.last[self.component] = shapes
        results: dict[str, Any] = {}
        try:
            results = self.engine.run(inputs, outputs)
            return results
        finally:
            if not results or not all(np.isfinite(array).all() for array in results.values()):
                self.calls.failed.setdefault(self.component, shapes)

    def stop(self, thread: int) -> None:
        """End the call of this thread, if the engine can do that."""
        if stop := getattr(self.engine, "stop", None):
            stop(thread)

    def close(self) -> None:
        """Nothing to free: the engine belongs to another."""


def commands(root: Path, component: str, shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Write the graph, and run it in ONNX Runtime alone on random inputs, with a check of all values for NaN."""
    sizes = [f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items()]
    write = ["tilewright", "export", "onnx", str(root), "-o", FOLDER, "--component", component]
    run = ["polygraphy", "run", f"{FOLDER}/{component}.onnx", "--onnxrt", "--input-shapes", *sizes]
    return shlex.join(write), shlex.join([*run, "--onnx-outputs", "mark", "all", "--validate"])
