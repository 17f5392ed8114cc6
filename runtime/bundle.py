"""The bundle: a directory with a manifest, a program, graphs and references to weights. Standard library only.

Everything the runtime reads is listed in `bundle.json` with size and SHA-256; weights are listed in `weights.json`
and may lie outside. `reports/` and `README.md` are for people and are not part of the seal.
"""

import contextlib
import ctypes
import errno
import json
import logging
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tilewright.runtime.check import check
from tilewright.runtime.digests import sha256_of_bytes, sha256_of_file
from tilewright.runtime.errors import BundleError, UsageError
from tilewright.runtime.external_data import External, external_data
from tilewright.runtime.program import Program, Signature, TensorSpec
from tilewright.runtime.strict import from_json, one_line, schema, to_json

__all__ = [
    "SAFETENSORS_DTYPES",
    "SCHEMA_VERSION",
    "Bundle",
    "Component",
    "Engine",
    "File",
    "Folder",
    "Manifest",
    "Memory",
    "Reference",
    "Weights",
    "check_replaceable",
    "folder_given",
    "json_schema",
    "read",
    "safetensors_header",
    "seal",
    "write_manifest",
]

LOG = logging.getLogger("tilewright")
SCHEMA_VERSION = 1
PIN = re.compile("[0-9a-f]{12,64}")  # of a digest, as much of it as tells bundles apart
SAFETENSORS_DTYPES = {  # with the bytes of an element
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F64": ("float64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class File:
    """A file as it was sealed."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Memory:
    """Working memory of a component: fixed + per_px * p + per_px2 * p * p bytes for an input of p output pixels."""

    fixed: float
    per_px: float
    per_px2: float

    def __post_init__(self) -> None:
        if not all(0 <= value < 2**63 for value in (self.fixed, self.per_px, self.per_px2)):
            raise ValueError(f"memory {self.fixed}, {self.per_px}, {self.per_px2} must lie between 0 and 2**63")


@dataclass(frozen=True)
class Engine:
    """A component made runnable by one backend at one precision."""

    backend: str  # ort | tensorrt | aoti
    precision: str
    file: str
    batch: tuple[int, int] = (1, 32)  # the shape profile: smallest and largest batch
    side_px: tuple[int, int] = (16, 8192)  # and smallest and largest side, in output pixels


@dataclass(frozen=True)
class Component:
    """One network: its portable graph, what it takes and gives, its engines."""

    graph: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    engines: tuple[Engine, ...]
    memory: Memory


@dataclass(frozen=True)
class Manifest:
    """bundle.json."""

    schema_version: int
    system: str
    preset: str
    precision: str
    licence: str  # of the base weights
    components: dict[str, Component]
    files: dict[str, File]
    made_with: dict[str, str]  # package -> version
    options: dict[str, str] = field(default_factory=dict)  # what the build was asked for
    program: str = "program.json"
    weights: str = "weights.json"
    constants: str | None = None
    tokenizers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """Where the bytes of one initializer are."""

    file: str  # inside its folder
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    folder: str | None = None  # none: the component's own


@dataclass(frozen=True)
class Folder:
    """A folder of weights: where it was at build and what must be in it."""

    path: str | None  # absolute; none when the weights are packed in the bundle
    files: dict[str, File]


@dataclass(frozen=True)
class Weights:
    """weights.json: every initializer of every component that is read from a file."""

    folders: dict[str, Folder]
    folder_of: dict[str, str]  # component -> the folder of most of its weights
    tensors: dict[str, dict[str, Reference]]  # component -> initializer -> bytes

    def folder_name(self, component: str, reference: Reference) -> str:
        """The folder that a component's initializer lies in."""
        return self.folder_of.get(component, "") if reference.folder is None else reference.folder


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and found whole."""

    root: Path
    manifest: Manifest
    program: Program
    weights: Weights
    digest: str  # SHA-256 of the manifest, which seals all the rest
    fresh: bool = False  # weights are read, whatever is remembered of their digests
    _checked: dict[tuple[str, Path | None], Path] = field(default_factory=dict, repr=False, compare=False)

    def path(self, name: str) -> Path:
        """A sealed file's place on disk."""
        return self.root / name

    def weights_folder(self, component: str, weights_dir: Path | None = None) -> Path | None:
        """The folder with most of the component's weights, its files checked; none when the component needs none."""
        name = self.weights.folder_of.get(component)
        return None if name is None else self.folder(name, weights_dir)

    def folder(self, name: str, weights_dir: Path | None = None) -> Path:
        """Where a folder of weights is now: packed, under `weights_dir`, or where it was at build."""
        checked = self._checked.get((name, weights_dir))
        if checked and self.fresh:  # once is enough to read gigabytes
            return checked
        folder = self.weights.folders[name]
        given = folder_given(weights_dir)
        under = [given / name, given, *sorted(given.glob(f"*/{name}"))] if given else []
        candidates = [self.root / "weights" / name, *under, *([Path(folder.path)] if folder.path else [])]
        wrong: BundleError | None = None
        for candidate in candidates:
            if all(_is_file(candidate / file) for file in folder.files):
                try:
                    _check_files(candidate, folder.files, "give the folder this bundle was built from", self.fresh)
                except BundleError as error:  # files of the same names may be another folder's
                    wrong = wrong or error
                    continue
                if given and candidate not in under and not checked:
                    asked, used = one_line(str(given)), one_line(str(candidate))
                    LOG.warning("weights of %r: %s is used, not %s; see --weights-dir", name, used, asked)
                self._checked[name, weights_dir] = candidate
                return candidate
        if wrong is not None:
            raise wrong
        wanted = one_line(", ".join(sorted(folder.files)[:3]))
        searched = ", ".join(one_line(str(candidate)) for candidate in candidates)
        raise BundleError(
            f"{self.root}: weights {wanted} of {name!r} are in none of {searched};"
            " pass --weights-dir, or rebuild with --pack"
        )

    def elsewhere(self, component: str) -> dict[str, Reference]:
        """The component's initializers that lie outside its own folder."""
        return {n: r for n, r in self.weights.tensors.get(component, {}).items() if r.folder is not None}


def folder_given(weights_dir: str | os.PathLike[str] | None) -> Path | None:
    """The folder of weights that a caller gives, if any, which must be there."""
    if weights_dir is None:
        return None
    if not Path(weights_dir).is_dir():
        raise UsageError(f"--weights-dir {one_line(str(weights_dir))} is no folder; give the one with the weights")
    return Path(weights_dir)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Keep what a document says from breaking or flooding the line of a refusal."""
    try:
        yield
    except BundleError as error:
        raise BundleError(one_line(str(error))) from None


@_one_line()
def read(root: str | os.PathLike[str], *, expect: str | None = None, fresh: bool = False) -> Bundle:
    """Read a bundle, check every sealed file and the program; refuse anything else in one line.

    `expect`: the digest, or its first 12 digits or more, of the only bundle to accept. `fresh`: read every file, also
    the weights', whose digest is remembered.
    """
    root = Path(root)
    if not _is_file(root / "bundle.json"):
        raise BundleError(f"{root}: no bundle.json there; give the directory that 'tilewright export build' made")
    where = str(root / "bundle.json")
    text = _bytes_of(root / "bundle.json")
    digest = sha256_of_bytes(text)
    _check_pin(digest, expect, where)
    manifest = _read_manifest(text, where)
    for name in [*manifest.files, *_named_files(manifest)]:
        _check_inside(root, name, where)
        if name not in manifest.files:
            raise BundleError(f"{where}: {name!r} is used but not listed under files; rebuild the bundle")
    _check_files(root, manifest.files, "rebuild the bundle, or copy it again", fresh)
    program = from_json(Program, _bytes_of(root / manifest.program), str(root / manifest.program))
    constants = safetensors_header(root / manifest.constants) if manifest.constants else {}
    signatures = {name: Signature(c.inputs, c.outputs) for name, c in manifest.components.items()}
    try:
        check(program, signatures, {name: spec for name, (spec, _, _) in constants.items()})
    except BundleError as error:
        raise BundleError(f"{root / manifest.program}: {str(error).removeprefix('program: ')}") from None
    tokenizers = {file for text in program.texts.values() for file in text.ids.values()}
    if unlisted := sorted(tokenizers - set(manifest.tokenizers)):
        raise BundleError(f"{root / manifest.program}: tokenizer {unlisted[0]!r} is not listed; rebuild the bundle")
    weights = from_json(Weights, _bytes_of(root / manifest.weights), str(root / manifest.weights))
    _check_weights(weights, manifest, root)
    _check_graphs(weights, manifest, root)
    return Bundle(root, manifest, program, weights, digest, fresh)


def _check_pin(digest: str, expect: str | None, where: str) -> None:
    if expect is None:
        return
    if not PIN.fullmatch(expect.lower()):
        raise UsageError(f"--expect {one_line(expect)!r} is no digest; give 12 to 64 hexadecimal digits of one")
    if not digest.startswith(expect.lower()):
        raise BundleError(f"{where}: SHA-256 {digest} is not the expected {expect}; get the bundle you pinned")


def _read_manifest(text: bytes, where: str) -> Manifest:
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


def _named_files(manifest: Manifest) -> Iterable[str]:
    for component in manifest.components.values():
        yield component.graph
        yield from (engine.file for engine in component.engines)
    yield from (manifest.program, manifest.weights)
    if manifest.constants is not None:
        yield manifest.constants
    yield from manifest.tokenizers


def _check_weights(weights: Weights, manifest: Manifest, root: Path) -> None:
    where = str(root / manifest.weights)
    for component, references in weights.tensors.items():
        if component not in manifest.components:
            raise BundleError(f"{where}: weights of {component!r}, which is no component; rebuild the bundle")
        for name, reference in references.items():
            folder = weights.folders.get(weights.folder_name(component, reference))
            file = folder.files.get(reference.file) if folder else None
            if file is None:
                raise BundleError(f"{where}: {component}.{name} lies in {reference.file!r}, which is not listed")
            if min(reference.offset, reference.length) < 0 or reference.offset + reference.length > file.size:
                raise BundleError(f"{where}: {component}.{name} reaches past the end of {reference.file!r}")
    if unknown := sorted(set(weights.folder_of.values()) - weights.folders.keys()):
        raise BundleError(f"{where}: folder {unknown[0]!r} is not listed; rebuild the bundle")
    for name, folder in weights.folders.items():
        if folder.path is not None and not PurePosixPath(folder.path).is_absolute():
            raise BundleError(f"{where}: folder {name!r}: path {folder.path!r} is not absolute; rebuild the bundle")
        for path in (name, *(f"{name}/{file}" for file in folder.files)):
            _check_inside(root, f"weights/{path}", where)


def _check_graphs(weights: Weights, manifest: Manifest, root: Path) -> None:
    """What a graph reads outside is what weights.json says, which may say more: folding drops what has no effect."""
    for component, c in manifest.components.items():
        listed = weights.tensors.get(component, {})
        for file in sorted({c.graph, *(engine.file for engine in c.engines if engine.backend == "ort")}):
            for name, external in external_data(_bytes_of(root / file), str(root / file)).items():
                if name not in listed or external != _external(listed[name]):
                    bytes_of = f"{external.length} bytes at {external.offset} of {external.location!r}"
                    raise BundleError(
                        f"{root / file}: {name!r} is {external.dtype} {list(external.shape)}, {bytes_of},"
                        f" which {manifest.weights} does not say; rebuild the bundle"
                    )


def _external(r: Reference) -> External:
    location = r.file if r.folder is None else f"{r.folder}/{r.file}"
    return External(location, r.offset, r.length, r.dtype, r.shape)


def _check_inside(root: Path, name: str, where: str) -> None:
    path = PurePosixPath(name)
    odd = "\\" in name or not name.isprintable()
    if path.is_absolute() or ".." in path.parts or odd or str(path) != name or name == ".":
        raise BundleError(f"{where}: path {name!r} is not a plain relative POSIX path; rebuild the bundle")
    try:
        inside = (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):
        inside = False
    if not inside:
        raise BundleError(f"{where}: {name!r} leaves the bundle through a link; copy the bundle with its files")


@_one_line()
def _check_files(root: Path, files: dict[str, File], remedy: str, fresh: bool) -> None:
    for name, file in files.items():
        path = root / name
        if not _is_file(path):
            raise BundleError(f"{path}: missing; {remedy}")
        try:
            if (size := path.stat().st_size) != file.size:
                raise BundleError(f"{path}: {size} bytes, sealed with {file.size}; {remedy}")
            if sha256_of_file(path, fresh=fresh) != file.sha256:
                raise BundleError(f"{path}: SHA-256 differs from the sealed {file.sha256[:12]}...; {remedy}")
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}; {remedy}") from None


def _is_file(path: Path) -> bool:
    """Whether a file is there; unlike `Path.is_file`, also for a name too long to exist."""
    try:
        return path.is_file()
    except OSError:
        return False


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; rebuild the bundle") from None


@_one_line()
def safetensors_header(path: Path) -> dict[str, tuple[TensorSpec, int, int]]:
    """Name -> (type and shape, offset in the file, length) of every tensor of a safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > min(size - 8, 100_000_000):
            raise BundleError(f"{path}: not a safetensors file, or cut short; copy it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {name: _tensor(entry, 8 + length, size) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"{path}: unreadable safetensors header ({error}); copy it again") from None


def _tensor(entry: dict[str, Any], base: int, size: int) -> tuple[TensorSpec, int, int]:
    start, end = entry["data_offsets"]
    dtype, width = SAFETENSORS_DTYPES[entry["dtype"]]
    spec = TensorSpec(dtype, tuple(entry["shape"]))
    if any(type(number) is not int for number in (start, end, *spec.shape)):
        raise ValueError(f"offsets {start}..{end} and shape {list(spec.shape)} are not all integers")
    if not 0 <= start <= end <= size - base:
        raise ValueError(f"offsets {start}..{end} lie outside the file")
    if end - start != width * math.prod(int(d) for d in spec.shape):
        raise ValueError(f"offsets {start}..{end} do not hold {dtype} {list(spec.shape)}")
    return spec, base + start, end - start


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Complete the manifest with the files it names, as they are now, and write it."""
    listed = [manifest.program, manifest.weights, *([manifest.constants] if manifest.constants else [])]
    listed += sorted(set(_named_files(manifest)) - set(listed))
    files = {n: File((root / n).stat().st_size, sha256_of_file(root / n)) for n in listed}
    (root / "bundle.json").write_text(to_json(replace(manifest, files=files)), encoding="utf-8")


def seal(staging: Path, manifest: Manifest, target: Path) -> None:
    """List the staged files in the manifest, write it, and put the directory in the place of `target` at once."""
    check_replaceable(target)
    target = target.resolve()  # a link to a bundle stays, and what it points at is replaced
    write_manifest(staging, manifest)
    read(staging)
    for path in [*staging.rglob("*"), staging]:
        _fsync(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() or not _renamed(staging, target):
        _exchange(staging, target)
        shutil.rmtree(staging)
    _fsync(target.parent)


def _renamed(staging: Path, target: Path) -> bool:
    """Whether a directory took a free place; another build may take that place first."""
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def check_replaceable(target: Path) -> None:
    """Refuse to put a bundle in the place of anything but a bundle of ours, or of an empty folder."""
    if target.exists() and not (_is_ours(target) or (target.is_dir() and not any(target.iterdir()))):
        raise UsageError(f"{target}: exists and is not a bundle of tilewright; choose another -o")


def _is_ours(target: Path) -> bool:
    """Whether a folder's bundle.json is a manifest, of any schema; another tool's file of that name is not."""
    try:
        document = json.loads((target / "bundle.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"schema_version", "system", "components"} <= document.keys()


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories; in one step where the kernel can, else in two."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2
    if hasattr(libc, "renameat2") and not libc.renameat2(at_cwd, bytes(one), at_cwd, bytes(other), exchange):
        return
    aside = other.with_name(f".{other.name}.{os.getpid()}.old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_schema() -> dict[str, object]:
    """The JSON Schema of the three documents of a bundle."""
    kinds = {"bundle.json": Manifest, "program.json": Program, "weights.json": Weights}
    return {name: schema(kind, f"Tilewright {name}, schema {SCHEMA_VERSION}") for name, kind in kinds.items()}
