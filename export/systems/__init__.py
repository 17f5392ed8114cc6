"""The published systems, one file each; none of them loads PyTorch until a network is built.

A system's file has these names:

    TITLE, LICENCE                          for people: what it is, and the licence of its base weights
    PRESETS                                 preset -> the arguments of its networks' configuration
    components(preset)                      component -> Source
    program(preset)                         the Program that drives them
    keys(component, parameter)              names under which weight files may hold a parameter, best first
    ignored(key)                            whether a weight file may hold this key without it being read
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tilewright.runtime.errors import UsageError
from tilewright.runtime.program import TensorSpec

__all__ = ["SYSTEMS", "Source", "system"]

SYSTEMS = {"hitoksr": "tilewright.export.systems.hitoksr"}


@dataclass(frozen=True)
class Source:
    """A component before it is traced."""

    module: Callable[[], Any]  # makes the torch.nn.Module
    inputs: dict[str, TensorSpec]  # a named size is free, up to its multiple
    outputs: dict[str, TensorSpec]
    folder: str  # the folder of weights it reads
    px: dict[str, int]  # named size -> output pixels behind one unit of it
    multiples: dict[str, int] = field(default_factory=dict)  # named size -> what it is a multiple of


def system(name: str) -> ModuleType:
    """The file of a system."""
    if name not in SYSTEMS:
        raise UsageError(f"system {name!r} is not one of {', '.join(SYSTEMS)}")
    return importlib.import_module(SYSTEMS[name])
