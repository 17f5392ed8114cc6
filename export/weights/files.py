"""Weights by reference: which file, where in it, for every parameter of a network. Nothing is read but headers."""

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tilewright.export.system import Origin, Rows, System, Tensors
from tilewright.export.weights.pickled import PICKLED, as_safetensors, listed
from tilewright.export.weights.writing import WIDTHS, write_tensors
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import BundleError, InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

__all__ = [
    "STAND_IN",
    "attach",
    "converted",
    "copy_tensors",
    "find",
    "locate",
    "mapped_tensor",
    "open_reference",
    "resolve",
]

VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)(?=\.[a-z]+$)")
STAND_IN = "stand-in: zeros in the place of weights"
SHOWN = 6  # files and folders in a complaint
Shapes = Mapping[str, tuple[int, ...]]


def find(folder: Path, variant: str = "") -> Tensors:
    """Index every weight file under a folder (or one file) by its name there; pickles are listed, not converted."""
    if not folder.exists():
        raise InputError(f"weights {folder}: no such file or folder; give the folder with the .safetensors files")
    named = [folder] if folder.is_file() else _indexed(folder, variant) or _listed(folder, variant)
    if not named:
        there = _content(folder)
        raise InputError(
            f"weights {folder}: holds no .safetensors file, and no .bin, but {there}; give the folder that does"
        )
    top = folder.parent if folder.is_file() else folder
    sources = {file.relative_to(top).as_posix(): str(file) for file in named}
    pickles = frozenset(name for name in sources if Path(name).suffix in PICKLED)
    tensors: dict[str, Reference] = {}
    for name, file in zip(sources, named, strict=True):
        for key, reference in _headers(file, name).items():
            if key in tensors:
                raise InputError(f"weights {folder}: {key!r} is in {tensors[key].file} and in {name}; keep one of them")
            tensors[key] = reference
    stand_in = any(_note(top / name) == STAND_IN for name in sources.keys() - pickles)
    return Tensors(top.resolve(), tensors, sources, stand_in, pickles)


def converted(found: Tensors) -> Tensors:
    """The same tensors with bytes to refer to: those of pickles in what is made of them now, or was before."""
    if not found.pickles:
        return found
    made = {name: as_safetensors(found.folder / name).absolute() for name in sorted(found.pickles)}
    files = {name: made.get(name, found.folder / name) for name in found.sources}
    root = Path(os.path.commonpath([file.parent for file in files.values()]))
    names = {name: file.relative_to(root).as_posix() for name, file in files.items()}
    headers = {name: _headers(files[name], names[name]) for name in files}
    tensors = {key: headers[reference.file][key] for key, reference in found.tensors.items()}
    sources = {names[name]: shown for name, shown in found.sources.items()}
    return Tensors(root, tensors, sources, found.stand_in)


def _headers(file: Path, name: str) -> dict[str, Reference]:
    """References to all tensors of a file; to those of a pickle, as if they lay there one behind the other."""
    if file.suffix in PICKLED:
        references, end = {}, 0
        for key, spec in listed(file).items():
            shape = tuple(int(d) for d in spec.shape)
            length = WIDTHS[spec.dtype] * math.prod(shape)
            references[key] = Reference(name, spec.dtype, shape, end, length)
            end += length
        return references
    try:
        header = safetensors_header(file)
    except BundleError as error:
        raise InputError(str(error)) from None
    except OSError as error:
        raise InputError(f"weights {file}: {error.strerror} ({file.resolve()}); copy it again") from None
    return {
        key: Reference(name, spec.dtype, tuple(int(d) for d in spec.shape), offset, length)
        for key, (spec, offset, length) in header.items()
    }


def _note(file: Path) -> str | None:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        note: str | None = (json.loads(stream.read(length)).get("__metadata__") or {}).get("note")
        return note


def _listed(folder: Path, variant: str) -> list[Path]:
    """The weight files under a folder; of those that come in several variants, one."""
    files = sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("*.bin"))
    there = {file: VARIANT.sub("", file.name) for file in files}
    kept = []
    for file, plain in there.items():
        rivals = [other for other, name in there.items() if name == plain and other.parent == file.parent]
        asked = [other for other in rivals if variant and f".{variant}." in other.name]
        if file in (asked or [other for other in rivals if other.name == plain] or rivals):
            kept.append(file)
    return kept


def _indexed(folder: Path, variant: str) -> list[Path]:
    """The shards that an index in the folder names; of several indices, the variant's, or the one without a variant."""
    indices = sorted(folder.glob("*.safetensors.index*.json"), key=lambda path: len(path.name))
    indices = [path for path in indices if variant and f".{variant}." in path.name] or indices
    if not indices:
        return []
    try:
        shards = sorted(set(json.loads(indices[0].read_bytes())["weight_map"].values()))
        named = [folder / Path(shard).name for shard in shards]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"weights {indices[0]}: unreadable index ({type(error).__name__}); copy it again") from None
    if missing := [path.name for path in named if not path.is_file()]:
        raise InputError(f"weights {indices[0]}: names {missing[0]!r}, which is not there; copy the missing shard")
    return named


def locate(origin: Origin, given: Mapping[str, Path], *, required: bool) -> Path | None:
    """Where an origin's weights are under what its argument names, or none if it may be so."""
    root, base = given.get(origin.argument), given.get("weights")
    if root is None and base and "." not in origin.places:  # it may lie beside the base model
        there = any((folder / place).exists() for folder in (base, *base.glob("*/")) for place in origin.places)
        root = base if there else None
    if root is None:
        if required and origin.needed:
            raise InputError(f"{origin.what} is not given; give --{origin.argument.replace('_', '-')}")
        return None
    flag = f"--{origin.argument.replace('_', '-')}"
    if not root.exists():
        raise InputError(f"{origin.what}: {root} is not there; give {flag} PATH")
    roots = [root, *(sorted(root.glob("*/")) if root.is_dir() and root == base else [])]
    tried = [folder / place for folder in roots for place in origin.places]
    path = next((path for path in tried if path.exists()), None)
    if path is None and root.is_file():
        path = root
    if path is None and origin.needed:
        looked = ", ".join(str(t) for t in tried[: len(origin.places)])
        raise InputError(f"{origin.what}: none of {looked} is there, {root} holds {_content(root)}; give {flag} PATH")
    return path


def resolve(found: Tensors, names: Iterable[str | Rows]) -> Reference | None:
    """The bytes under the first of these names that the files hold."""
    for name in names:
        whole = found.tensors.get(name if isinstance(name, str) else name.key)
        if whole is None:
            continue
        if isinstance(name, str):
            return whole
        rows, row = whole.shape[0] // name.parts, whole.length // max(1, whole.shape[0])
        count = rows * (name.stop - name.start)
        return replace(
            whole,
            shape=(count, *whole.shape[1:]),
            offset=whole.offset + name.start * rows * row,
            length=count * row,
        )
    return None


def attach(
    wanted: Mapping[str, Shapes], found: Mapping[str, Tensors], system: System
) -> dict[str, dict[str, Reference]]:
    """For every component, the bytes of each of its parameters; every key of the files is accounted for."""
    missing: dict[str, set[str]] = {name: set() for name in found}
    used: dict[str, set[str]] = {name: set() for name in found}
    references: dict[str, dict[str, Reference]] = {}
    for component, shapes in wanted.items():
        references[component] = {}
        for parameter, shape in shapes.items():
            origin, names = system.origin_of(component, parameter), system.keys(component, parameter)
            reference = resolve(found[origin], names)
            named = [name if isinstance(name, str) else name.key for name in names]
            if reference is None:
                missing[origin].add(named[0])
                continue
            used[origin].add(next(name for name in named if name in found[origin].tensors))
            if [d for d in reference.shape if d != 1] != [d for d in shape if d != 1]:  # a 1x1 convolution is a matrix
                raise InputError(
                    f"weights {found[origin].sources[reference.file]}: {named[0]!r} has shape"
                    f" {list(reference.shape)}, the network needs {list(shape)}; give files of one model"
                )
            references[component][parameter] = replace(reference, shape=shape, folder=origin)
    for origin, tensors in found.items():
        unexpected = {key for key in tensors.tensors.keys() - used[origin] if not system.ignored(origin, key)}
        if lacking := sorted(missing[origin]):
            there = _some(sorted(unexpected if used[origin] else tensors.tensors))
            what = f"lacks {len(lacking)} tensors: {_some(lacking)}" + (f"; holds instead: {there}" if there else "")
        elif unexpected:
            what = f"holds unexpected {len(unexpected)} tensors: {_some(sorted(unexpected))}"
        else:
            continue
        files = ", ".join(sorted(tensors.sources.values())[:2])
        raise InputError(f"weights {files}: {what}; give {system.origins[origin].what}")
    return references


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(map(one_line, names[:3]))}{', ...' if len(names) > 3 else ''}"


def _content(folder: Path) -> str:
    """The first few things in a folder."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return f"{', '.join(map(one_line, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''}" or "nothing"


def open_reference(folder: Path, reference: Reference, mode: Literal["r", "c"] = "r") -> "npt.NDArray[np.uint8]":
    """The bytes of a tensor, mapped read-only or, for `c`, copied when written to; the file stays as it is."""
    import numpy as np

    return np.memmap(folder / reference.file, np.uint8, mode, reference.offset, (reference.length,))


def mapped_tensor(folder: Path, reference: Reference) -> "torch.Tensor":
    """The tensor for PyTorch, which is loaded here: over the mapped bytes, copied when written to."""
    import torch

    data = torch.from_numpy(open_reference(folder, reference, "c"))  # torch asks for writable memory
    return data.view(getattr(torch, reference.dtype)).reshape(reference.shape)


def copy_tensors(source: Path, references: Mapping[str, Reference], path: Path) -> dict[str, Reference]:
    """Copy just these tensors into one new safetensors file, one by one; where they are now."""
    ordered = dict(sorted(references.items()))
    specs = {name: TensorSpec(r.dtype, r.shape) for name, r in ordered.items()}
    write_tensors(path, specs, (open_reference(source, r).tobytes() for r in ordered.values()), "copied by tilewright")
    return {
        name: Reference(path.name, spec.dtype, references[name].shape, offset, length)
        for name, (spec, offset, length) in safetensors_header(path).items()
    }
