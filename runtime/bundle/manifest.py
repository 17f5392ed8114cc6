"""bundle.json, the manifest of a bundle: its components, and all its files with size and SHA-256."""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from tilewright.runtime.bundle.arguments import Argument
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.bundle.strict import from_json
from tilewright.runtime.errors import BundleError

__all__ = ["SCHEMA_VERSION", "Component", "EngineSpec", "File", "Manifest", "Memory", "named_files", "read_manifest"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class File:
    """The size and digest of a sealed file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Memory:
    """Working memory of a component, in bytes: fixed + per_px * p + per_px2 * p * p for p output pixels."""

    fixed: float
    per_px: float
    per_px2: float

    def __post_init__(self) -> None:
        if not all(0 <= value < 2**63 for value in (self.fixed, self.per_px, self.per_px2)):
            raise ValueError(f"memory {self.fixed}, {self.per_px}, {self.per_px2} must lie between 0 and 2**63")


@dataclass(frozen=True)
class EngineSpec:
    """A description of one engine: backend, precision, file and shape profile."""

    backend: str  # ort | tensorrt | aoti
    precision: str
    file: str
    batch: tuple[int, int] = (1, 32)  # the shape profile: smallest and largest batch
    side_px: tuple[int, int] = (16, 8192)  # and smallest and largest side, in output pixels


@dataclass(frozen=True)
class Component:
    """One network: its portable graph, inputs, outputs and engines."""

    graph: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    engines: tuple[EngineSpec, ...]
    memory: Memory


@dataclass(frozen=True)
class Manifest:
    """The content of bundle.json."""

    schema_version: int
    system: str
    preset: str
    precision: str
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


def read_manifest(text: bytes, where: str) -> Manifest:
    """The manifest from the text of bundle.json. One that this version cannot use is refused."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        version = json.loads(text)["schema_version"]
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BundleError(
                f"{where}: schema {version}, this version reads up to {SCHEMA_VERSION}; upgrade tilewright"
            )
    manifest = from_json(Manifest, text, where)
    if manifest.schema_version != SCHEMA_VERSION:
        raise BundleError(
            f"{where}: schema {manifest.schema_version} is unknown, not {SCHEMA_VERSION}; rebuild the bundle"
        )
    if not manifest.components:
        raise BundleError(f"{where}: holds no component; rebuild the bundle")
    for name, component in manifest.components.items():
        if not component.engines:
            raise BundleError(f"{where}: component {name!r} has no engine; rebuild the bundle")
    return manifest


def named_files(manifest: Manifest) -> Iterable[str]:
    """Every file that a manifest refers to."""
    for component in manifest.components.values():
        yield component.graph
        yield from (engine.file for engine in component.engines)
    yield from (manifest.program, manifest.weights)
    if manifest.constants is not None:
        yield manifest.constants
    yield from manifest.tokenizers
