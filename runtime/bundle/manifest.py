"""bundle.json, the manifest of a bundle: its components, and all its files with size and SHA-256."""

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.arguments import Argument
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.bundle.strict import check_limits, from_json, one_line
from tilewright.runtime.errors import BundleError

__all__ = [
    "DEVICES",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "Component",
    "EngineSpec",
    "File",
    "Form",
    "Manifest",
    "Memory",
    "Needs",
    "OlderSchema",
    "Profile",
    "Range",
    "named_files",
    "read_manifest",
]

SCHEMA_VERSION = 2
LONGEST_COMMAND = 4000
DEVICES = ("cpu", "cuda")
PRECISIONS = ("float32", "bfloat16", "float16", "fp8", "int8")  # the most accurate first
NAME = "[a-z0-9]+([-_.][a-z0-9]+)*"
MOST_BYTES = 2**63 - 1
BYTES = {"minimum": 0, "maximum": MOST_BYTES}
VERSION = re.compile(r"\d+(\.\d+)*")


class OlderSchema(BundleError):
    """A bundle of an older schema. The line ends with a command, and stays whole."""


@dataclass(frozen=True)
class File:
    """The size and digest of a sealed file."""

    size: int = field(metadata={"minimum": 0})
    sha256: str

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class Memory:
    """The memory that an engine needs besides its weights, in bytes.

    A call with b tiles of p output pixels takes fixed + b * (per_tile + per_px * p + per_px2 * p * p).
    """

    fixed: float = field(default=0, metadata=BYTES)
    per_tile: float = field(default=0, metadata=BYTES)
    per_px: float = field(default=0, metadata=BYTES)
    per_px2: float = field(default=0, metadata=BYTES)
    copied: int = field(default=0, metadata=BYTES)  # weights that an open engine copies even if they are mapped

    def of_call(self, batch: int, px: int) -> float:
        """The bytes of one call with so many tiles of so many output pixels."""
        return self.fixed + batch * (self.per_tile + self.per_px * px + self.per_px2 * px * px)

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class Needs:
    """The parts that a machine must have to run an engine."""

    instructions: tuple[str, ...] = ()  # of the CPU, by the names in /proc/cpuinfo: "avx512_vnni"
    compute_capability: tuple[int, int] | None = None  # of the GPU, at least
    packages: dict[str, str] = field(default_factory=dict)  # package -> least version
    cores: int = field(default=1, metadata={"minimum": 1})  # of the CPU, at least
    exactly: bool = False  # this compute capability and these versions, and no later ones

    def __post_init__(self) -> None:
        check_limits(self)
        for package, version in self.packages.items():
            if not VERSION.fullmatch(version):
                raise ValueError(f"least version {version!r} of {package!r} is not like 1.22")


@dataclass(frozen=True)
class Range:
    """The least and the most of a size."""

    least: int = field(metadata={"minimum": 1})
    most: int = field(metadata={"minimum": 1})

    def __post_init__(self) -> None:
        check_limits(self)
        if self.least > self.most:
            raise ValueError(f"least {self.least} must not exceed most {self.most}")


@dataclass(frozen=True)
class Profile:
    """The sizes that an engine takes."""

    batch: Range = Range(1, 32)  # tiles in one call
    side_px: Range = Range(1, 2**20)  # side of a tile, in output pixels

    def __post_init__(self) -> None:
        if self.batch.least != 1:  # the last call of a pass has the tiles that are left
            raise ValueError(f"batch.least {self.batch.least} must be 1")


@dataclass(frozen=True)
class Form:
    """How an engine computes in 8 bits. Each backend has the form that was measured to be its fastest."""

    inputs: str = field(metadata={"enum": ("int8", "uint8", "float8_e4m3fn")})  # the format of what enters a layer
    convolutions: bool = True  # are in 8 bits too; some backends only compute matrix products in 8 bits
    rest: str = field(default="float32", metadata={"enum": ("float32", "bfloat16")})  # of all that is not in 8 bits

    def __post_init__(self) -> None:
        check_limits(self)

    @property
    def text(self) -> str:
        """The form in a few words."""
        kept = "" if self.convolutions else ", convolutions in float"
        return f"inputs in {self.inputs}{kept}, the rest in {self.rest}"


@dataclass(frozen=True)
class EngineSpec:
    """A description of one engine of a component."""

    name: str = field(metadata={"pattern": f"^{NAME}$"})  # "ort-float32"; unique in its component
    backend: str = field(metadata={"pattern": f"^{NAME}$"})  # ort | openvino | cuda | tensorrt | aoti, and later ones
    device: str = field(metadata={"enum": DEVICES})
    precision: str = field(metadata={"enum": PRECISIONS})
    files: tuple[str, ...] = field(metadata={"minItems": 1})  # the first is the graph
    needs: Needs = field(default_factory=Needs)
    profile: Profile = field(default_factory=Profile)
    memory: Memory = field(default_factory=Memory)
    weights: str | None = None  # the table of weights.json, for an engine that has its own; none: the component's
    form: Form | None = None  # of an engine in 8 bits

    def __post_init__(self) -> None:
        check_limits(self)

    @property
    def graph(self) -> str:
        """The file of the graph."""
        return self.files[0]


@dataclass(frozen=True)
class Component:
    """One network: its portable graph, inputs, outputs and engines."""

    graph: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    engines: tuple[EngineSpec, ...] = field(metadata={"minItems": 1})
    px: dict[str, int] = field(default_factory=dict)  # named size -> output pixels behind one unit of it

    def __post_init__(self) -> None:
        check_limits(self)
        names = [engine.name for engine in self.engines]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"engine {twice[0]!r} is listed twice")


@dataclass(frozen=True)
class Manifest:
    """The content of bundle.json."""

    schema_version: int = field(metadata={"enum": (SCHEMA_VERSION,)})
    system: str
    preset: str
    licence: str  # licence of the base weights
    components: dict[str, Component]
    files: dict[str, File]
    made_with: dict[str, str]  # package -> version
    options: dict[str, str] = field(default_factory=dict)  # options of the build
    arguments: dict[str, Argument] = field(default_factory=dict)  # arguments of a caller; they follow from the program
    program: str = "program.json"
    weights: str = "weights.json"
    constants: str | None = None
    tokenizers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_limits(self)


def read_manifest(text: bytes, where: str) -> Manifest:
    """The manifest from the text of bundle.json. One that this version cannot use is refused."""
    document: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(text)
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise BundleError(f"{where}: schema {version}, this version reads up to {SCHEMA_VERSION}; upgrade tilewright")
    if type(version) is int and version < SCHEMA_VERSION:
        command = one_line(_command(document, Path(where).parent), LONGEST_COMMAND)
        raise OlderSchema(f"{where}: schema {version} is too old, this version reads {SCHEMA_VERSION}; run {command}")
    manifest = from_json(Manifest, text, where)
    if not manifest.components:
        raise BundleError(f"{where}: holds no component; rebuild the bundle")
    return manifest


def _command(document: Mapping[str, Any], root: Path) -> str:
    """The command that builds a bundle of an older schema again, as far as its documents tell."""
    system, preset = str(document.get("system", "SYSTEM")), str(document.get("preset", "files"))
    options = document.get("options")
    options = {k: str(v) for k, v in options.items()} if isinstance(options, dict) else {}
    words = ["tilewright", "export", "build", system, *([] if preset == "files" else ["--preset", preset])]
    random = re.match(r"random, seed (\d+)(, but for)?", options.get("weights", ""))
    if not random or random[2]:
        words += ["--weights", _weights_folder(root / str(document.get("weights", "weights.json")))]
    if random:
        words += ["--random-weights", random[1]]
    elif options.get("packed") == "yes":
        words.append("--pack")
    if options.get("ops") == "standard":
        words += ["--ops", "standard"]
    return shlex.join([*words, "-o", str(root)])


def _weights_folder(file: Path) -> str:
    """The folder that a weights.json read from, or DIR if it does not tell."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        folders = json.loads(file.read_bytes())["folders"].values()
        parent = os.path.commonpath([folder["path"] for folder in folders if folder["path"] is not None])
        return parent if parent != "/" else "DIR"
    return "DIR"


def named_files(manifest: Manifest) -> Iterable[str]:
    """Every file that a manifest refers to."""
    for component in manifest.components.values():
        yield component.graph
        for engine in component.engines:
            yield from engine.files
    yield from (manifest.program, manifest.weights)
    if manifest.constants is not None:
        yield manifest.constants
    yield from manifest.tokenizers
