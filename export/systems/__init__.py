"""The published systems, one file each; none of them loads PyTorch until a network is built.

A system's file has these names; `settings` are what `settings()` returns, plain values that fit JSON:

    TITLE, LICENCE                          for people: what it is, and the licence of its base weights
    PRESETS                                 preset -> the arguments of its networks' configuration
    OPTIONS                                 argument of `export build` -> Option, beyond those every system has
    ORIGINS                                 name -> Origin: the weights it reads, and where they are found
    settings(preset, given, origins)        what was asked for and what the files say, checked
    components(preset, **settings)          component -> Source, those that become graphs
    build_time(preset, **settings)          component -> Source, those that run once, at build
    program(preset, **settings)             the Program that drives them
    constants(preset, run, given, **settings)  tensors that the program reads; `run(component, **inputs)` runs one now
    tokenizers(preset, given, folder, **settings)  file in the bundle -> its text
    PARTS                                   other files of the system, as patterns; may be left out
    origins(component)                      where a component's weights may be found, all of them
    origin(component, parameter)            where a parameter's weights are found
    keys(component, parameter)              names under which weight files may hold it, best first
    ignored(origin, key)                    whether a weight file may hold this key without it being read
    stand_in(preset)                        file -> its tensors (name -> TensorSpec) or its text: all a user must have
"""

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tilewright.runtime.errors import UsageError
from tilewright.runtime.program import TensorSpec

__all__ = ["SYSTEMS", "Option", "Origin", "Rows", "Source", "finite", "licence", "part_of", "system"]

SYSTEMS = {
    "in-token": "tilewright.export.systems.in_token",
    "hitoksr": "tilewright.export.systems.hitoksr",
    "vicr": "tilewright.export.systems.vicr",
    "instantir": "tilewright.export.systems.instantir",
    "toksr": "tilewright.export.systems.toksr",
}


@dataclass(frozen=True)
class Source:
    """A component before it is traced."""

    network: str | Callable[..., Any]  # makes the torch.nn.Module; named as FILE.NAME in export/networks
    inputs: dict[str, TensorSpec]  # a named size is free, up to its multiple; "h/2" is half of "h"
    outputs: dict[str, TensorSpec]
    px: dict[str, int] = field(default_factory=dict)  # named size -> output pixels behind one unit of it
    multiples: dict[str, int] = field(default_factory=dict)  # named size -> what it is a multiple of
    arguments: dict[str, Any] = field(default_factory=dict)  # of the network

    def made(self) -> Any:
        """The network; PyTorch is loaded here and not before."""
        if callable(self.network):
            return self.network(**self.arguments)
        file, _, name = self.network.partition(".")
        return getattr(importlib.import_module(f"tilewright.export.networks.{file}"), name)(**self.arguments)

    @property
    def recipe(self) -> str:
        """All that its graph depends on besides code."""
        said = [str(self.network), self.inputs, self.outputs, self.multiples, self.arguments]
        return json.dumps(said, sort_keys=True, default=str)


def finite(text: str) -> float:
    """A number that JSON knows."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def part_of(size: str) -> tuple[str, int]:
    """A size's name, and what it is divided by: `h/2` is half of `h`."""
    name, _, part = size.partition("/")
    return name, int(part or 1)


@dataclass(frozen=True)
class Origin:
    """A folder or file of weights that a system reads."""

    argument: str  # of `export build` that leads to it
    places: tuple[str, ...]  # under what the argument names, best first
    what: str  # for people
    needed: bool = True
    read: Callable[[Any], Any] = lambda found: found  # the file's tensors under the names that `keys` gives


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor that a file keeps fused with others: from `start` to `stop` of `parts` equal parts."""

    key: str
    start: int
    stop: int
    parts: int


@dataclass(frozen=True)
class Option:
    """An argument of `export build` that some systems take."""

    help: str
    kind: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # of the file or folder it is looked for under --weights, when it is not given
    flag: bool = False


def licence(name: str, preset: str) -> str:
    """Of the weights that a preset is built from."""
    return "Apache-2.0: trained by tools/train" if preset == "demo" else str(system(name).LICENCE)


def system(name: str) -> ModuleType:
    """The file of a system."""
    if name not in SYSTEMS:
        raise UsageError(f"system {name!r} is not one of {', '.join(SYSTEMS)}")
    return importlib.import_module(SYSTEMS[name])
