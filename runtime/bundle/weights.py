"""weights.json: the place of every initializer's bytes, which may be outside of the bundle."""

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tilewright.runtime.bundle.external_data import External, external_data
from tilewright.runtime.bundle.files import bytes_of, check_inside
from tilewright.runtime.bundle.manifest import File, Manifest
from tilewright.runtime.bundle.strict import check_limits, one_line
from tilewright.runtime.errors import BundleError, UsageError

__all__ = ["Folder", "Reference", "Weights", "check_graphs", "check_weights", "checked_folder", "location"]

OTHER_FORMATS = ("aoti", "tensorrt")  # backends whose graphs are not ONNX


@dataclass(frozen=True)
class Reference:
    """The place of an initializer's bytes."""

    file: str  # inside its folder
    dtype: str
    shape: tuple[int, ...]
    offset: int = field(metadata={"minimum": 0})
    length: int = field(metadata={"minimum": 0})
    folder: str = ""  # the name of a folder in weights.json

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class Folder:
    """A folder of weights: its place at build, and the files that must be in it."""

    path: str | None  # absolute; none if the weights are packed in the bundle
    files: dict[str, File]


@dataclass(frozen=True)
class Weights:
    """The content of weights.json: all initializers that are read from files."""

    folders: dict[str, Folder]
    tensors: dict[str, dict[str, Reference]]  # component, or an engine's own table -> initializer -> its bytes

    def folders_of(self, table: str) -> list[str]:
        """The names of the folders that hold a table's weights."""
        return sorted({reference.folder for reference in self.tensors.get(table, {}).values()})


def location(reference: Reference) -> str:
    """The path of a file in a packed bundle. Graphs use this path in every bundle."""
    return f"weights/{reference.folder}/{reference.file}"


def checked_folder(weights_dir: str | os.PathLike[str] | None) -> Path | None:
    """The caller's folder of weights, which must exist; none without one."""
    if weights_dir is None:
        return None
    if not Path(weights_dir).is_dir():
        raise UsageError(f"--weights-dir {one_line(str(weights_dir))} is no folder; give the one with the weights")
    return Path(weights_dir)


def check_weights(weights: Weights, manifest: Manifest, root: Path) -> None:
    """Refuse a weights.json that contradicts the manifest or itself."""
    where = str(root / manifest.weights)
    tables = {engine.weights for c in manifest.components.values() for engine in c.engines if engine.weights}
    if missing := sorted(tables - weights.tensors.keys()):
        raise BundleError(f"{root / 'bundle.json'}: {manifest.weights} has no table {missing[0]!r}; rebuild the bundle")
    for component, references in weights.tensors.items():
        if component not in manifest.components and component not in tables:
            raise BundleError(f"{where}: weights of {component!r}, which is no component; rebuild the bundle")
        for name, reference in references.items():
            folder = weights.folders.get(reference.folder)
            file = folder.files.get(reference.file) if folder else None
            if file is None:
                raise BundleError(f"{where}: {component}.{name} lies in {reference.file!r}, which is not listed")
            if reference.offset + reference.length > file.size:
                raise BundleError(f"{where}: {component}.{name} reaches past the end of {reference.file!r}")
    for name, folder in weights.folders.items():
        if folder.path is not None and not PurePosixPath(folder.path).is_absolute():
            raise BundleError(f"{where}: folder {name!r}: path {folder.path!r} is not absolute; rebuild the bundle")
        for path in (name, *(f"{name}/{file}" for file in folder.files)):
            check_inside(root, f"weights/{path}", where)


def check_graphs(weights: Weights, manifest: Manifest, root: Path) -> None:
    """Refuse graphs that read other bytes than weights.json says. It may list more, as folding removes some."""
    for component, c in manifest.components.items():
        graphs = {(e.graph, e.weights or component) for e in c.engines if e.backend not in OTHER_FORMATS}
        for file, table in sorted({(c.graph, component), *graphs}):
            listed = weights.tensors.get(table, {})
            for name, external in external_data(bytes_of(root / file), str(root / file)).items():
                if name not in listed or external != _external(listed[name]):
                    place = f"{external.length} bytes at {external.offset} of {external.location!r}"
                    raise BundleError(
                        f"{root / file}: {name!r} is {external.dtype} {list(external.shape)}, {place},"
                        f" which {manifest.weights} does not say; rebuild the bundle"
                    )


def _external(r: Reference) -> External:
    return External(location(r), r.offset, r.length, r.dtype, r.shape)
