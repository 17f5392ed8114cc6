"""What a system is: its components, the weights they read, the options it takes, and the program that runs them.

A system is one `System`: data, and functions only where it differs from the default. Nothing here knows a system.
"""

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.program import Program, TensorSpec
from tilewright.runtime.bundle.weights import Reference

__all__ = [
    "ComponentSpec",
    "Lora",
    "LoraFile",
    "Option",
    "Origin",
    "Preset",
    "Rows",
    "Settings",
    "System",
    "Tensors",
    "UserFiles",
    "finite",
    "part_of",
    "plain",
]


@dataclass(frozen=True)
class ComponentSpec:
    """A network that becomes one graph: how to make it, what it takes and what it gives."""

    network: (
        str | Callable[..., Any]
    )  # makes the torch.nn.Module; a name is MODULE.CLASS, in export/networks or anywhere
    inputs: dict[str, TensorSpec]  # a named size is free, up to its multiple; "h/2" is half of "h"
    outputs: dict[str, TensorSpec]
    px: dict[str, int] = field(default_factory=dict)  # named size -> output pixels behind one unit of it
    multiples: dict[str, int] = field(default_factory=dict)  # named size -> what it is a multiple of
    arguments: dict[str, Any] = field(default_factory=dict)  # of the network

    def made(self) -> Any:
        """The network; PyTorch is loaded here and not before."""
        if callable(self.network):
            return self.network(**self.arguments)
        return getattr(importlib.import_module(self.module), self.network.rpartition(".")[2])(**self.arguments)

    @property
    def module(self) -> str:
        """The module that defines the network."""
        if callable(self.network):
            return str(self.network.__module__)
        name = self.network.rpartition(".")[0]
        return name if "." in name else f"tilewright.export.networks.{name}"

    @property
    def recipe(self) -> str:
        """All that its graph depends on besides code."""
        said = [str(self.network), self.inputs, self.outputs, self.multiples, self.arguments]
        return json.dumps(said, sort_keys=True, default=str)


def part_of(size: str) -> tuple[str, int]:
    """A size's name, and what it is divided by: `h/2` is half of `h`."""
    name, _, part = size.partition("/")
    return name, int(part or 1)


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor that a file keeps fused with others: from `start` to `stop` of `parts` equal parts."""

    key: str
    start: int
    stop: int
    parts: int


@dataclass(frozen=True)
class Tensors:
    """What the weight files of one folder hold."""

    folder: Path  # absolute; the files in it may be links
    tensors: dict[str, Reference]
    sources: dict[str, str]  # file in the folder -> the name the user knows it by
    stand_in: bool = False  # zeros in the place of weights
    pickles: frozenset[str] = frozenset()  # files whose tensors have no bytes to refer to until they are converted


@dataclass(frozen=True)
class Origin:
    """A folder or file of weights that a system reads."""

    argument: str  # of `export build` that leads to it
    places: tuple[str, ...]  # under what the argument names, best first
    what: str  # for people
    needed: bool = True
    read: Callable[[Tensors], Tensors] = lambda tensors: tensors  # under the names that `System.keys` gives


@dataclass(frozen=True)
class Option:
    """An argument of `export build` that some systems take."""

    help: str
    kind: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # of the file or folder it is looked for under --weights, when it is not given
    flag: bool = False
    default: Any = None


def finite(text: str) -> float:
    """A number that JSON knows."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


@dataclass(frozen=True)
class LoraFile:
    """How a system takes a LoRA. The argument of its origin names the file, and its strength behind a colon."""

    origin: str
    prefixes: tuple[str, ...] = ("transformer.",)  # before a module's path in the file
    default_alpha: float | None = None  # where the file does not tell; none: the rank


@dataclass(frozen=True)
class Lora:
    """The LoRA of one build."""

    origin: str  # of its low-rank pairs
    strength: float
    merged: bool  # into copies of the weights; otherwise each pair is a branch beside its weight
    branches: dict[str, list[float]]  # module, as its file names it -> rank and scale


@dataclass(frozen=True)
class Preset:
    """The sizes of a system's networks for random weights, and what no file tells."""

    name: str
    sizes: Any
    asked: bool  # by name: then files that say otherwise are refused


@dataclass(frozen=True)
class UserFiles:
    """The user's files, by origin."""

    tensors: Mapping[str, Tensors]
    places: Mapping[str, Path]  # the folder or file in which each was found
    lora: Lora | None = None


@dataclass(frozen=True)
class Settings:
    """The decisions of a build, as plain values. The manifest keeps them, so that `verify` makes the same networks."""

    sizes: dict[str, Any]
    choices: dict[str, Any] = field(default_factory=dict)
    lora: Lora | None = None

    def __post_init__(self) -> None:
        for name in ("sizes", "choices"):  # lists for tuples, as they come back from a manifest
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    def to_json(self) -> str:
        """One line, keys sorted."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """The settings that `to_json` wrote."""
        said = json.loads(text)
        return cls(said["sizes"], said["choices"], Lora(**said["lora"]) if said["lora"] else None)

    @property
    def merged(self) -> bool:
        """Whether a LoRA is added to copies of the weights."""
        return self.lora is not None and self.lora.merged

    @property
    def branches(self) -> dict[str, list[float]]:
        """The low-rank branches that graphs hold."""
        return self.lora.branches if self.lora and not self.lora.merged else {}


Run = Callable[..., dict[str, Any]]  # a component's name and its inputs -> its outputs, computed now
Parts = Callable[[Settings], dict[str, ComponentSpec]]


@dataclass(frozen=True)
class System:
    """One published system."""

    name: str
    title: str
    licence: str  # of the base weights
    presets: Mapping[str, Any]  # name -> sizes, a dict or a dataclass
    origins: Mapping[str, Origin]
    components: Parts  # those that become graphs
    program: Callable[[Settings], Program]
    licences: Mapping[str, str] = field(default_factory=dict)  # preset -> licence, where it differs
    base_models: tuple[str, ...] = ()  # of the published system, as the Hugging Face Hub names them
    stand_in: Callable[[], dict[str, Any]] | None = None  # file -> its tensors or its text: all a user must have
    options: Mapping[str, Option] = field(default_factory=dict)
    lora: LoraFile | None = None
    settings: Callable[[Preset, Mapping[str, Any], UserFiles], Settings] | None = None
    build_time: Parts = lambda settings: {}  # those that run once, at build
    constants: Callable[[Settings, Run, Mapping[str, Any], Path | None], dict[str, Any]] = lambda *_: {}
    tokenizers: Callable[[Settings, Mapping[str, Any], Path | None], dict[str, str]] = lambda *_: {}
    keys: Callable[[str, str], tuple[str | Rows, ...]] = lambda component, parameter: (parameter,)
    origin: Callable[[str, str], str] | None = None  # of a component's parameter; none: the only one
    ignored: Callable[[str, str], bool] = lambda origin, key: False  # keys of files that nothing reads

    @property
    def module(self) -> str:
        """The module that defines the system."""
        return self.components.__module__

    def origin_of(self, component: str, parameter: str) -> str:
        """Where a parameter's weights are found."""
        return self.origin(component, parameter) if self.origin else next(iter(self.origins))

    def decide(self, preset: Preset, options: Mapping[str, Any], files: UserFiles) -> Settings:
        """The settings of a build."""
        if self.settings:
            return self.settings(preset, options, files)
        choices = {name: options.get(name, option.default) for name, option in self.options.items()}
        return Settings(plain(preset.sizes), choices, files.lora)


def plain(sizes: Any) -> dict[str, Any]:
    """Sizes as a dict."""
    return dict(sizes) if isinstance(sizes, Mapping) else asdict(sizes)
