"""What a system is made of: the components it has, the weights they need, the options it takes."""

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tilewright.runtime.program import TensorSpec

__all__ = ["ComponentSpec", "Option", "Origin", "Rows", "finite", "part_of"]


@dataclass(frozen=True)
class ComponentSpec:
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
