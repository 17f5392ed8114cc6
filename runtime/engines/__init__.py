"""Backends that run a component's graph. Each is one file with a tuple of names and three functions.

PACKAGES                                       the packages that it runs on
missing() -> str | None                        what the backend needs and lacks here, and how to install it
version() -> str                               name and version of the backend, for reports
open_engine(bundle, component, spec, opening)  the component, ready to run: an Engine
"""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tilewright.runtime.errors import EnvironmentMismatch

__all__ = ["BACKENDS", "Array", "Engine", "Opening", "backend"]

Array = npt.NDArray[np.generic]
BACKENDS = {name: f"tilewright.runtime.engines.{name}" for name in ("ort", "openvino", "tensorrt", "cuda", "aoti")}


@dataclass(frozen=True)
class Opening:
    """How an engine is opened."""

    memory: str = "fast"  # a mode: speed, or weights mapped and not copied
    threads: int = 0  # of a call; 0: all cores
    calls: int = 1  # that run at the same time
    weights_dir: Path | None = None  # the folder of the weights, if they moved


class Engine(Protocol):
    """A component that is ready to run. Several threads may call it.

    An engine may also have `stop(thread)`, which any thread may call: the call of `run` on that thread raises soon.
    """

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Compute these outputs from the inputs."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


def backend(name: str) -> ModuleType:
    """The module of a backend. One that cannot run here is refused."""
    if name not in BACKENDS:
        raise EnvironmentMismatch(f"engine backend {name!r} is not one of {', '.join(BACKENDS)}; upgrade tilewright")
    module = importlib.import_module(BACKENDS[name])
    if reason := module.missing():
        raise EnvironmentMismatch(f"engine backend {name!r} {reason}")
    return module
