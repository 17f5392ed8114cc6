"""A system as data: its components, the weights they read, the options of its build, and its program.

Each system is one instance of `System`, with functions only where it differs from the default.
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
    """A network that becomes one graph: its class, arguments, inputs and outputs."""

    network: (
        str | Callable[..., Any]
    )  # class of the torch.nn.Module; as a text MODULE.CLASS, of export/networks or of any package
    inputs: dict[str, TensorSpec]  # a named size is free, up to its multiple; "h/2" is half of "h"
    outputs: dict[str, TensorSpec]
    px: dict[str, int] = field(default_factory=dict)  # named size -> output pixels behind one unit of it
    multiples: dict[str, int] = field(default_factory=dict)  # named size -> the number that divides it
    arguments: dict[str, Any] = field(default_factory=dict)  # arguments of the network's class

    def build(self) -> Any:
        """Build the network. PyTorch is loaded here, not before."""
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
        """Everything besides code that the graph depends on, as one text."""
        parts = [str(self.network), self.inputs, self.outputs, self.multiples, self.arguments]
        return json.dumps(parts, sort_keys=True, default=str)


def part_of(size: str) -> tuple[str, int]:
    """The name and the divisor of a size: `h/2` is half of `h`."""
    name, _, part = size.partition("/")
    return name, int(part or 1)


@dataclass(frozen=True)
class Rows:
    """Some rows of a fused tensor: of its `parts` equal parts, those from `start` to `stop`."""

    key: str
    start: int
    stop: int
    parts: int


@dataclass(frozen=True)
class Tensors:
    """The tensors in the weight files of one folder."""

    folder: Path  # absolute; the files in it may be links
    tensors: dict[str, Reference]
    sources: dict[str, str]  # file in the folder -> its path as the user wrote it
    stand_in: bool = False  # the tensors are zeros in the place of weights
    pickles: frozenset[str] = frozenset()  # files that must be converted before their bytes can be referred to


@dataclass(frozen=True)
class Origin:
    """A folder or file of weights that a system reads."""

    argument: str  # argument of `export build` that names the folder
    places: tuple[str, ...]  # places to look at in that folder, best first
    what: str  # its name in messages
    needed: bool = True
    rename: Callable[[Tensors], Tensors] = lambda tensors: tensors  # gives tensors the names of `System.keys`


@dataclass(frozen=True)
class Option:
    """An argument of `export build` that only some systems have."""

    help: str
    kind: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # files or folders under --weights that are its default
    flag: bool = False
    default: Any = None


def finite(text: str) -> float:
    """A number from text; NaN and infinity, which JSON lacks, are refused."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


@dataclass(frozen=True)
class LoraFile:
    """How a system reads a LoRA file. The user may write the LoRA's strength behind the file, after a colon."""

    origin: str
    prefixes: tuple[str, ...] = ("transformer.",)  # in the file, one of these stands before a module's path
    default_alpha: float | None = None  # alpha for files that do not tell it; none: the rank


@dataclass(frozen=True)
class Lora:
    """The LoRA of one build."""

    origin: str  # the origin of its low-rank pairs
    strength: float
    merged: bool  # added to copies of the weights; otherwise each pair is a branch beside its weight
    branches: dict[str, list[float]]  # module by its name in the file -> rank and scale


@dataclass(frozen=True)
class Preset:
    """The sizes of a system's networks for random weights, and for sizes that no file tells."""

    name: str
    sizes: Any
    explicit: bool  # the user named it, so files with other sizes are refused


@dataclass(frozen=True)
class UserFiles:
    """The user's files, by origin."""

    tensors: Mapping[str, Tensors]
    places: Mapping[str, Path]  # the folder or file of each
    lora: Lora | None = None


@dataclass(frozen=True)
class Settings:
    """The decisions of a build, as plain values. The manifest keeps them for `verify`."""

    sizes: dict[str, Any]
    choices: dict[str, Any] = field(default_factory=dict)
    lora: Lora | None = None

    def __post_init__(self) -> None:
        for name in ("sizes", "choices"):  # tuples become lists, as when they are read from a manifest
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    def to_json(self) -> str:
        """The settings as one line of JSON, with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """The settings that `to_json` wrote."""
        values = json.loads(text)
        return cls(values["sizes"], values["choices"], Lora(**values["lora"]) if values["lora"] else None)

    @property
    def merged(self) -> bool:
        """Whether the LoRA is added to copies of the weights."""
        return self.lora is not None and self.lora.merged

    @property
    def branches(self) -> dict[str, list[float]]:
        """The low-rank branches in the graphs."""
        return self.lora.branches if self.lora and not self.lora.merged else {}


Run = Callable[..., dict[str, Any]]  # runs a component now: its name and inputs -> its outputs
Parts = Callable[[Settings], dict[str, ComponentSpec]]


@dataclass(frozen=True)
class System:
    """A published system."""

    name: str
    title: str
    licence: str  # licence of the base weights
    presets: Mapping[str, Any]  # name -> sizes, a dict or a dataclass
    origins: Mapping[str, Origin]
    components: Parts  # the networks that become graphs
    program: Callable[[Settings], Program]
    licences: Mapping[str, str] = field(default_factory=dict)  # preset -> licence, where it differs
    base_models: tuple[str, ...] = ()  # names of the published base models on the Hugging Face Hub
    stand_in: Callable[[], dict[str, Any]] | None = None  # file -> its tensors or its text: all a user must have
    options: Mapping[str, Option] = field(default_factory=dict)
    lora: LoraFile | None = None
    settings: Callable[[Preset, Mapping[str, Any], UserFiles], Settings] | None = None
    build_time: Parts = lambda settings: {}  # the networks that the build runs once
    constants: Callable[[Settings, Run, Mapping[str, Any], Path | None], dict[str, Any]] = lambda *_: {}
    tokenizers: Callable[[Settings, Mapping[str, Any], Path | None], dict[str, str]] = lambda *_: {}
    keys: Callable[[str, str], tuple[str | Rows, ...]] = lambda component, parameter: (parameter,)
    origin: Callable[[str, str], str] | None = None  # component, parameter -> origin; none: the system has only one
    ignored: Callable[[str, str], bool] = lambda origin, key: False  # whether no network reads a key of a file
    keep: Mapping[str, str] = field(default_factory=dict)  # layers COMPONENT/WEIGHT that stay in float -> why; * is any

    @property
    def module(self) -> str:
        """The module that defines the system."""
        return self.components.__module__

    def origin_of(self, component: str, parameter: str) -> str:
        """The origin that holds a parameter's weights."""
        return self.origin(component, parameter) if self.origin else next(iter(self.origins))

    def decide(self, preset: Preset, options: Mapping[str, Any], files: UserFiles) -> Settings:
        """The settings of a build."""
        if self.settings:
            return self.settings(preset, options, files)
        choices = {name: options.get(name, option.default) for name, option in self.options.items()}
        return Settings(plain(preset.sizes), choices, files.lora)


def plain(sizes: Any) -> dict[str, Any]:
    """Sizes of any type as a dict."""
    return dict(sizes) if isinstance(sizes, Mapping) else asdict(sizes)
