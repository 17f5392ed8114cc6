"""Where the bytes of every parameter are: in the user's files, or made here (random, merged with a LoRA, copied)."""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tilewright.export.build.request import Request
from tilewright.export.system import Rows
from tilewright.export.systems import system
from tilewright.export.weights.files import Tensors, attach, copy_tensors, find, random_weights, resolve, write_tensors
from tilewright.runtime.bundle import File, Folder, Reference, Weights
from tilewright.runtime.digests import sha256_of_file
from tilewright.runtime.errors import InputError
from tilewright.runtime.program import TensorSpec
from tilewright.runtime.strict import to_json

__all__ = ["attach_weights"]


def attach_weights(request: Request, traced: Path, directory: Path) -> None:
    """Fill a directory with weights.json, what of the weights is made here, and an account of every tensor."""
    module = system(request.system)
    shapes = json.loads((traced / "parameters.json").read_text())
    wanted = {c: {name: tuple(shape) for name, shape in s.items()} for c, s in shapes.items()}
    packed = directory / "weights"
    found = {name: module.ORIGINS[name].read(tensors) for name, tensors in request.used.items()}
    for origin, named in _lacking(module, wanted, found).items():
        if request.seed is None:
            needs = module.ORIGINS[origin]
            raise InputError(f"{needs.what} is needed for this and not there; add it under --{needs.argument}")
        random_weights(named, request.seed or 0, packed / origin / f"{origin}.safetensors")
        found[origin] = find(packed / origin)
    merging = bool(request.settings.get("merged")) and "lora" in found
    kept = found | {"lora": _without_pairs(found["lora"])} if merging else found
    references = attach(wanted, kept, module)
    accounts = _accounts(request, found, references)
    if merging:
        found["merged"] = _merge(request, found, references, packed / "merged" / "merged.safetensors")
    if request.pack:
        for origin in {str(r.folder) for refs in references.values() for r in refs.values()}:
            if not (packed / origin).is_dir():
                raw = request.found.get(origin, found[origin])
                found[origin] = _pack(origin, raw, references, packed / origin / f"{origin}.safetensors")
    accounts_text = json.dumps(accounts, indent=1, sort_keys=True)
    (directory / "accounts.json").write_text(accounts_text, encoding="utf-8")
    (directory / "weights.json").write_text(to_json(_weights(found, references, packed)), encoding="utf-8")


def _lacking(
    module: Any, wanted: Mapping[str, Mapping[str, tuple[int, ...]]], found: Mapping[str, Tensors]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Origin -> the tensors that random weights must stand for."""
    lacking: dict[str, dict[str, tuple[int, ...]]] = {}
    for component, shapes in wanted.items():
        for name, shape in shapes.items():
            origin = module.origin(component, name)
            if origin in found:
                continue
            key: str | Rows = module.keys(component, name)[0]
            whole = (key, shape) if isinstance(key, str) else (key.key, (shape[0] * key.parts, *shape[1:]))
            lacking.setdefault(origin, {})[whole[0]] = whole[1]
    return lacking


def _without_pairs(found: Tensors) -> Tensors:
    """What a LoRA's file holds beside what is merged."""
    rest = {key: r for key, r in found.tensors.items() if not key.endswith((".lora_A", ".lora_B"))}
    return replace(found, tensors=rest)


def _accounts(
    request: Request, found: Mapping[str, Tensors], references: Mapping[str, Mapping[str, Reference]]
) -> dict[str, Any]:
    """For every origin, how many of its tensors graphs refer to, ran at build, were merged, or nobody reads."""
    accounts = {}
    for origin, tensors in found.items():
        key_at = _by_place(tensors)
        graph, now = (
            {key_at(r) for c in components for r in references[c].values() if r.folder == origin}
            for components in (request.components, request.build_time)
        )
        pairs = tensors.tensors.keys() - _without_pairs(tensors).tensors.keys()
        merged = len(pairs) if request.settings.get("merged") else 0
        accounts[origin] = {
            "tensors": len(tensors.tensors),
            "referenced": len(graph),
            "precomputed": len(now - graph),
            "merged": merged,
            "ignored": len(tensors.tensors.keys() - graph - now) - merged,
            "referenced_bytes": sum(tensors.tensors[key].length for key in graph),
        }
    return accounts


def _by_place(found: Tensors) -> Callable[[Reference], str]:
    """Finds the tensor that holds given bytes, all of it or some rows."""
    placed = sorted((r.file, r.offset, key) for key, r in found.tensors.items() if r.length)

    def key_at(reference: Reference) -> str:
        return placed[bisect_right(placed, (reference.file, reference.offset, "\U0010ffff")) - 1][2]

    return key_at


def _merge(
    request: Request, found: Mapping[str, Tensors], references: dict[str, dict[str, Reference]], path: Path
) -> Tensors:
    """Weights with their low-rank pairs added, one by one into a file; the references that change are replaced."""
    from tilewright.export.weights import lora

    module, pairs = system(request.system), found["lora"]
    touched: dict[str, tuple[Reference, lora.Adapter]] = {}
    merging: dict[str, set[str]] = {}
    used: set[str] = set()
    for component, refs in references.items():
        for name, reference in refs.items():
            stem = name.removesuffix("weight")
            if stem == name or module.origin(component, f"{stem}lora_A") != "lora":
                continue
            halves = [module.keys(component, f"{stem}{kind}") for kind in ("lora_A", "lora_B")]
            down, up = (resolve(pairs, names) for names in halves)
            if down and up:
                used.add(branch := halves[0][0].removesuffix(".lora_A"))
                touched[name] = (reference, lora.Adapter(down, up, request.settings["branches"][branch][1]))
                merging.setdefault(component, set()).add(name)
    if unknown := sorted(request.settings["branches"].keys() - used):
        raise InputError(
            f"LoRA {', '.join(pairs.sources.values())}: adapts {len(unknown)} modules that the network does not have:"
            f" {', '.join(unknown[:3])}; give the LoRA of this system and preset"
        )
    specs = {name: TensorSpec(r.dtype, r.shape) for name, (r, _) in sorted(touched.items())}
    strength = float(request.settings["lora_scale"])
    merged = (
        lora.merge(found[str(r.folder)].folder, r, pairs.folder, adapter, strength)
        for r, adapter in (touched[name] for name in specs)
    )
    write_tensors(path, specs, merged, "merged by tilewright")
    made = find(path.parent)
    for component, names in merging.items():
        references[component] |= {name: replace(made.tensors[name], folder="merged") for name in names}
    return made


def _pack(origin: str, found: Tensors, references: dict[str, dict[str, Reference]], path: Path) -> Tensors:
    """Copy the tensors that components read of an origin, under their own names; the references follow."""
    key_at = _by_place(found)
    named = {key_at(r): r for refs in references.values() for r in refs.values() if r.folder == origin}
    moved = copy_tensors(found.folder, {key: found.tensors[key] for key in named}, path)
    for refs in references.values():
        for name, r in refs.items():
            if r.folder == origin:
                key = key_at(r)
                offset = moved[key].offset + r.offset - found.tensors[key].offset
                refs[name] = replace(r, file=path.name, offset=offset)
    return find(path.parent)


def _weights(found: Mapping[str, Tensors], references: dict[str, dict[str, Reference]], packed: Path) -> Weights:
    """The document: a component's own folder is the one most of its bytes lie in."""
    folders, folder_of, tensors = {}, {}, {}
    for component, refs in references.items():
        sums: dict[str, int] = {}
        for r in refs.values():
            sums[str(r.folder)] = sums.get(str(r.folder), 0) + r.length
        if not sums:
            continue
        own = max(sorted(sums), key=lambda name: sums[name])
        folder_of[component] = own
        tensors[component] = {name: replace(r, folder=None) if r.folder == own else r for name, r in refs.items()}
    for origin in sorted({str(r.folder) for refs in references.values() for r in refs.values()}):
        root = found[origin].folder
        used = {r.file for refs in references.values() for r in refs.values() if r.folder == origin}
        files = {f: File((root / f).stat().st_size, sha256_of_file(root / f)) for f in sorted(used)}
        folders[origin] = Folder(None if (packed / origin).is_dir() else str(root), files)
    return Weights(folders, folder_of, tensors)
