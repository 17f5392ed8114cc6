"""The bytes of a bundle: inside of it, elsewhere, shared by components, and those that a copy would take."""

import os
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.manifest import Component
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.weights import checked_folder

__all__ = ["space"]

Spans = list[tuple[int, int]]  # the first byte of each span, and the byte after its last one


def space(root: Path, weights_dir: Path | None = None, expect: str | None = None) -> dict[str, Any]:
    """A report on the bytes of each component and of each file, with sums."""
    bundle = read_bundle(root, expect=expect)
    checked_folder(weights_dir)
    inside = {f.relative_to(root).as_posix(): f.stat().st_size for f in sorted(root.rglob("*")) if f.is_file()}
    read = _read(bundle)
    components = {
        name: {"files": sum(inside[file] for file in _files(component)), "weights": 0, "elsewhere": 0, "shared": 0}
        for name, component in bundle.manifest.components.items()
    }
    files = {name: _file(size, _readers(bundle, name), elsewhere=False) for name, size in inside.items()}
    total = {"in_bundle": sum(inside.values()), "elsewhere": 0, "shared": 0, "copy": 0}
    for (folder, file), readers in read.items():
        path = bundle.folder(folder, weights_dir) / file
        within = path.is_relative_to(root)
        once, twice = _covered(readers.values())
        for name, spans in readers.items():
            alone, _ = _covered([spans])
            without, _ = _covered(other for reader, other in readers.items() if reader != name)
            components[name]["weights"] += alone
            components[name]["elsewhere"] += 0 if within else alone
            components[name]["shared"] += alone + without - once
        place = path.relative_to(root).as_posix() if within else os.fspath(path)
        files[place] = _file(path.stat().st_size, sorted(readers), elsewhere=not within) | {"read": once}
        total["shared"] += twice
        if not within:
            total["elsewhere"] += once
            total["copy"] += _whole_tensors(path, [span for spans in readers.values() for span in spans])
    return {"bundle": str(root), "digest": bundle.digest, "components": components, "files": files, "bytes": total}


def _file(size: int, readers: Iterable[str], *, elsewhere: bool) -> dict[str, Any]:
    return {"bytes": size, "components": list(readers), "elsewhere": elsewhere}


def _files(component: Component) -> set[str]:
    """The graph of a component, and the files of its engines."""
    return {component.graph, *(file for engine in component.engines for file in engine.files)}


def _readers(bundle: Bundle, file: str) -> list[str]:
    return sorted(name for name, component in bundle.manifest.components.items() if file in _files(component))


def _read(bundle: Bundle) -> dict[tuple[str, str], dict[str, Spans]]:
    """Folder and file of weights -> component -> the spans that its graph and its engines read."""
    read: dict[tuple[str, str], dict[str, Spans]] = {}
    for name, component in bundle.manifest.components.items():
        for table in {name, *(engine.weights for engine in component.engines if engine.weights)}:
            for r in bundle.weights.tensors.get(table, {}).values():
                spans = read.setdefault((r.folder, r.file), {}).setdefault(name, [])
                spans.append((r.offset, r.offset + r.length))
    return dict(sorted(read.items()))


def _covered(readers: Iterable[Spans]) -> tuple[int, int]:
    """The bytes that one reader or more read, and those that two or more read."""
    edges: list[tuple[int, int]] = []
    for spans in readers:
        end = 0
        for start, stop in sorted(spans):  # a byte that one reader reads twice counts once
            edges += [(max(start, end), 1), (max(stop, end), -1)]
            end = max(end, stop)
    depth = at = once = twice = 0
    for place, change in sorted(edges):
        once += (place - at) * (depth > 0)
        twice += (place - at) * (depth > 1)
        depth, at = depth + change, place
    return once, twice


def _whole_tensors(path: Path, spans: Spans) -> int:
    """The bytes of all tensors of a file that these spans touch: a copy keeps tensors whole."""
    tensors = sorted((offset, length) for _, offset, length in safetensors_header(path).values() if length)
    starts = [offset for offset, _ in tensors]
    touched = {
        i
        for start, stop in spans
        for i in range(bisect_right(starts, start) - 1, bisect_right(starts, max(start, stop - 1)))
    }
    return sum(tensors[i][1] for i in touched)
