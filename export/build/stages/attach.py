"""attach: the place of every parameter's bytes, in the user's files or in new ones (random, merged, copied)."""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tilewright.export.build.attachment import Merge, References, find_references, merges, missing_tensors, origins_of
from tilewright.export.build.cache import Stage
from tilewright.export.build.code import code
from tilewright.export.build.request import Request
from tilewright.export.system import Tensors
from tilewright.export.weights.files import converted, copy_tensors, find
from tilewright.export.weights.finite import nonfinite
from tilewright.export.weights.lora import merge, without_pairs
from tilewright.export.weights.writing import random_weights, write_tensors
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.manifest import File
from tilewright.runtime.bundle.program import FLOATS, TensorSpec
from tilewright.runtime.bundle.strict import from_json, to_json
from tilewright.runtime.bundle.weights import Folder, Reference, Weights
from tilewright.runtime.errors import InputError

__all__ = ["random_weights_of", "read_weights", "stage"]


def stage(request: Request, digest: Callable[[Path], str]) -> Stage:
    """The stage; its inputs are the networks, the weights and their folders."""
    inputs = {
        "weights": random_weights_of(request),
        "packed": str(request.pack),
        "nonfinite": str(request.allow_nonfinite),
    }
    inputs["settings"] = request.settings.to_json()
    for name, spec in (request.components | request.build_time).items():
        inputs[f"network {name}"] = spec.recipe
    for name, tensors in request.used.items():
        inputs[f"folder {name}"] = str(tensors.folder)
        inputs |= {f"weights {name}/{file}": digest(tensors.folder / file) for file in tensors.sources}
    modules = {spec.module for spec in (request.components | request.build_time).values()}
    return Stage(
        "attach", inputs | code(__name__, request.system.module, *modules), lambda folder: _work(request, folder)
    )


def random_weights_of(request: Request) -> str:
    """The random weights of a request, as an input of a stage."""
    return "none" if request.seed is None else f"random, seed {request.seed}"


def read_weights(attached: Path) -> Weights:
    """The file weights.json that the stage wrote."""
    return from_json(Weights, (attached / "weights.json").read_bytes(), str(attached / "weights.json"))


def _work(request: Request, directory: Path) -> None:
    """Fill a directory with weights.json, with new weight files, and with an account of every tensor."""
    packed = directory / "weights"
    used = {name: converted(tensors) for name, tensors in request.used.items()}
    origins = origins_of(request, used)
    for origin, shapes in missing_tensors(request, origins).items():
        random_weights(shapes, request.seed or 0, packed / origin / f"{origin}.safetensors")
        origins[origin] = find(packed / origin)
    references = find_references(request, origins)
    if not request.allow_nonfinite:
        _check_finite(origins, references)
    changed = merges(request, origins, references)
    accounts = _accounts(request, origins, references)
    if changed:
        origins["merged"] = _merge(request, origins, references, changed, packed / "merged" / "merged.safetensors")
    if request.pack:
        for origin in {r.folder for refs in references.values() for r in refs.values()}:
            if not (packed / origin).is_dir():
                raw = used.get(origin, origins[origin])
                origins[origin] = _pack(origin, raw, references, packed / origin / f"{origin}.safetensors")
    text = json.dumps(accounts, indent=1, sort_keys=True)
    (directory / "accounts.json").write_text(text, encoding="utf-8")
    (directory / "weights.json").write_text(to_json(_document(origins, references, packed)), encoding="utf-8")


def _check_finite(origins: Mapping[str, Tensors], references: References) -> None:
    """Refuse weights with NaN or infinity."""
    key_at = {origin: _by_place(tensors) for origin, tensors in origins.items()}
    read = {
        key_at[r.folder](r): (origins[r.folder].folder, r)
        for refs in references.values()
        for r in refs.values()
        if r.dtype in FLOATS
    }
    if bad := nonfinite(read):
        file, name = bad
        raise InputError(f"weights {file}: {name!r} holds NaN or infinity; copy it again, or use --allow-nonfinite")


def _accounts(request: Request, origins: Mapping[str, Tensors], references: References) -> dict[str, Any]:
    """For every origin, how many tensors are read by graphs, used at build only, merged, or not read."""
    accounts = {}
    for origin, tensors in origins.items():
        key_at = _by_place(tensors)
        graph, now = (
            {key_at(r) for c in components for r in references[c].values() if r.folder == origin}
            for components in (request.components, request.build_time)
        )
        pairs = tensors.tensors.keys() - without_pairs(tensors).tensors.keys()
        merged = len(pairs) if request.settings.merged else 0
        accounts[origin] = {
            "tensors": len(tensors.tensors),
            "referenced": len(graph),
            "precomputed": len(now - graph),
            "merged": merged,
            "ignored": len(tensors.tensors.keys() - graph - now) - merged,
            "referenced_bytes": sum(tensors.tensors[key].length for key in graph),
        }
    return accounts


def _by_place(tensors: Tensors) -> Callable[[Reference], str]:
    """A function from a reference to the key of the tensor that contains its bytes."""
    placed = sorted((r.file, r.offset, key) for key, r in tensors.tensors.items() if r.length)

    def key_at(reference: Reference) -> str:
        return placed[bisect_right(placed, (reference.file, reference.offset, "\U0010ffff")) - 1][2]

    return key_at


def _merge(
    request: Request, origins: Mapping[str, Tensors], references: References, changed: list[Merge], path: Path
) -> Tensors:
    """Write the weights with their low-rank pairs added into a file, and let the references point to it."""
    lora = request.settings.lora
    assert lora is not None
    pairs, by_name = origins[lora.origin], {change.parameter: change for change in changed}
    specs = {name: TensorSpec(c.weight.dtype, c.weight.shape) for name, c in by_name.items()}
    merged = (
        merge(origins[c.weight.folder].folder, c.weight, pairs.folder, c.adapter, lora.strength)
        for c in by_name.values()
    )
    write_tensors(path, specs, merged, "merged by tilewright")
    tensors = find(path.parent)
    for change in changed:
        references[change.component][change.parameter] = replace(tensors.tensors[change.parameter], folder="merged")
    return tensors


def _pack(origin: str, tensors: Tensors, references: References, path: Path) -> Tensors:
    """Copy the tensors of an origin that components read into a file, and let the references point to it."""
    key_at = _by_place(tensors)
    named = {key_at(r): r for refs in references.values() for r in refs.values() if r.folder == origin}
    moved = copy_tensors(tensors.folder, {key: tensors.tensors[key] for key in named}, path)
    for refs in references.values():
        for name, r in refs.items():
            if r.folder == origin:
                key = key_at(r)
                offset = moved[key].offset + r.offset - tensors.tensors[key].offset
                refs[name] = replace(r, file=path.name, offset=offset)
    return find(path.parent)


def _document(origins: Mapping[str, Tensors], references: References, packed: Path) -> Weights:
    """The content of weights.json."""
    folders = {}
    for origin in sorted({r.folder for refs in references.values() for r in refs.values()}):
        root = origins[origin].folder
        used = {r.file for refs in references.values() for r in refs.values() if r.folder == origin}
        files = {f: File((root / f).stat().st_size, sha256_of_file(root / f)) for f in sorted(used)}
        folders[origin] = Folder(None if (packed / origin).is_dir() else str(root), files)
    return Weights(folders, {component: dict(refs) for component, refs in references.items() if refs})
