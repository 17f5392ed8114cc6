"""Bundles changed as a forger would change them, and the line in which they must be refused."""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from tilewright.runtime.bundle.digests import sha256_of_bytes
from tilewright.runtime.bundle.manifest import Manifest
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.bundle.weights import Weights
from tilewright.runtime.errors import BundleError

__all__ = [
    "ABSENT",
    "DOCUMENTS",
    "REQUIRED",
    "SEALED",
    "TICKS",
    "is_default",
    "means",
    "overwrite",
    "put",
    "refusal",
    "reseal",
]

DOCUMENTS = {"bundle.json": Manifest, "program.json": Program, "weights.json": Weights}
SEALED = ["constants.safetensors", "program.json", "sharpen.onnx", "weights.json"]
ABSENT = object()
TICKS = itertools.count(10**18, 10**9)  # modification times: no two writes of this module look alike


def refusal(act, *arguments, longest: int = 600) -> str:
    """The line in which a bundle is refused."""
    with pytest.raises(BundleError) as caught:
        act(*arguments)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert text.isprintable(), f"more than one line: {text!r}"
    assert len(text) <= longest
    return text


def overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tick = next(TICKS)
    os.utime(path, ns=(tick, tick))


def reseal(root: Path, name: str, data: bytes) -> None:
    """Write a document and, as a forger would, its size and digest into the manifest."""
    overwrite(root / name, data)
    if name != "bundle.json":
        manifest = json.loads((root / "bundle.json").read_text())
        manifest["files"][name] = {"size": len(data), "sha256": sha256_of_bytes(data)}
        overwrite(root / "bundle.json", json.dumps(manifest).encode())


def put(root: Path, name: str, keys: tuple, value: object) -> None:
    """Set, or take away, one value of a document."""
    document = json.loads((root / name).read_text())
    parent = document
    for key in keys[:-1]:
        parent = parent[key]
    if value is ABSENT:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = value
    reseal(root, name, json.dumps(document).encode())


def means(value: object, document: object) -> bool:
    """Whether a value that was read says what the JSON says, and nothing else."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: f for f in dataclasses.fields(value)}
        return (
            isinstance(document, dict)
            and document.keys() <= fields.keys()
            and all(
                means(getattr(value, name), document[name]) if name in document else is_default(value, field)
                for name, field in fields.items()
            )
        )
    if isinstance(value, Mapping):
        same = isinstance(document, dict) and value.keys() == document.keys()
        return same and all(means(value[key], document[key]) for key in value)
    if isinstance(value, tuple):
        same = isinstance(document, list) and len(value) == len(document)
        return same and all(map(means, value, document))
    if isinstance(value, bool) or isinstance(document, bool):
        return value is document
    if isinstance(value, float) and isinstance(document, int):
        return value == float(document)
    return type(value) is type(document) and value == document


def is_default(value: object, field: dataclasses.Field) -> bool:
    made = field.default_factory is not dataclasses.MISSING
    return getattr(value, field.name) == (field.default_factory() if made else field.default)


REQUIRED = {
    "bundle.json": [
        *((key,) for key in ("schema_version", "system", "preset", "licence", "components", "files")),
        ("made_with",),
        *(("components", "sharpen", key) for key in ("graph", "inputs", "outputs", "engines")),
        *(("components", "sharpen", "engines", 0, key) for key in ("name", "backend", "device", "precision", "files")),
        *(("components", "sharpen", "inputs", "image", key) for key in ("dtype", "shape")),
        *(("files", "program.json", key) for key in ("size", "sha256")),
    ],
    "program.json": [
        *((key,) for key in ("scale", "multiple_px", "grids", "passes")),
        *(("grids", "result", key) for key in ("px", "channels")),
        *(("passes", 0, "once", 0, key) for key in ("run", "inputs", "outputs")),
        *(("passes", 0, "tiles", key) for key in ("px", "overlap_px")),
        ("passes", 0, "name"),
    ],
    "weights.json": [
        *((key,) for key in ("folders", "tensors")),
        *(("folders", "sharpen", key) for key in ("path", "files")),
        *(("tensors", "sharpen", "weight", key) for key in ("file", "dtype", "shape", "offset", "length")),
    ],
}
