"""Backends that run a component's graph: one file each, the same three functions.

missing() -> str | None                        why the backend cannot run here, and what to install
version() -> str                               what runs, for reports
open_engine(bundle, component, ...) -> Engine  the component, ready to run
"""

import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tilewright.runtime.errors import EnvironmentMismatch

__all__ = ["BACKENDS", "Array", "Engine", "backend"]

Array = npt.NDArray[np.generic]
BACKENDS = {"ort": "tilewright.runtime.engines.ort"}


class Engine(Protocol):
    """A component that runs; safe to call from several threads."""

    def run(self, inputs: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
        """The wanted outputs for these inputs."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def backend(name: str) -> ModuleType:
    """The module of a backend that can run here."""
    if name not in BACKENDS:
        raise EnvironmentMismatch(f"engine backend {name!r} is not one of {', '.join(BACKENDS)}; upgrade tilewright")
    module = importlib.import_module(BACKENDS[name])
    if reason := module.missing():
        raise EnvironmentMismatch(reason)
    return module
