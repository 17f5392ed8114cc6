"""Weights by reference: the file and the offset of every parameter of a network. Only headers are read."""

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tilewright.export.system import Origin, Rows, System, Tensors
from tilewright.export.weights.pickled import PICKLED, as_safetensors, listed
from tilewright.export.weights.writing import WIDTHS, write_tensors
from tilewright.runtime.bundle.opening import only_files
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
    "WeightReader",
    "converted",
    "copy_tensors",
    "find",
    "locate",
    "mapped_tensor",
    "open_reference",
    "reference_parameters",
    "resolve",
]

VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)(?=\.[a-z]+$)")
STAND_IN = "stand-in: zeros in the place of weights"
SHOWN = 6  # most names of files in a message
Shapes = Mapping[str, tuple[int, ...]]


def find(folder: Path, variant: str = "") -> Tensors:
    """All tensors in the weight files under a folder, or in one file. Pickles are listed, not converted."""
    if not folder.exists():
        raise InputError(f"weights {folder}: no such file or folder; give the folder with the .safetensors files")
    files = [folder] if folder.is_file() else _indexed(folder, variant) or _listed(folder, variant)
    if not files:
        content = _content(folder)
        raise InputError(
            f"weights {folder}: holds no .safetensors file, and no .bin, but {content}; give the folder that does"
        )
    top = folder.parent if folder.is_file() else folder
    sources = {file.relative_to(top).as_posix(): str(file) for file in files}
    pickles = frozenset(name for name in sources if Path(name).suffix in PICKLED)
    tensors: dict[str, Reference] = {}
    for name, file in zip(sources, files, strict=True):
        for key, reference in _headers(file, name).items():
            if key in tensors:
                raise InputError(f"weights {folder}: {key!r} is in {tensors[key].file} and in {name}; keep one of them")
            tensors[key] = reference
    stand_in = any(_note(top / name) == STAND_IN for name in sources.keys() - pickles)
    return Tensors(top.resolve(), tensors, sources, stand_in, pickles)


def converted(originals: Tensors) -> Tensors:
    """The same tensors, with pickles replaced by their safetensors files in the cache, which are made if missing."""
    if not originals.pickles:
        return originals
    safetensors_files = {name: as_safetensors(originals.folder / name).absolute() for name in sorted(originals.pickles)}
    files = {name: safetensors_files.get(name, originals.folder / name) for name in originals.sources}
    root = Path(os.path.commonpath([file.parent for file in files.values()]))
    names = {name: file.relative_to(root).as_posix() for name, file in files.items()}
    headers = {name: _headers(files[name], names[name]) for name in files}
    tensors = {key: headers[reference.file][key] for key, reference in originals.tensors.items()}
    sources = {names[name]: source for name, source in originals.sources.items()}
    return Tensors(root, tensors, sources, originals.stand_in)


def _headers(file: Path, name: str) -> dict[str, Reference]:
    """References to all tensors of a file. In a pickle, which has no offsets, they count as one after the other."""
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
    with open(file, "rb", opener=only_files) as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        note: str | None = (json.loads(stream.read(length)).get("__metadata__") or {}).get("note")
        return note


def _listed(folder: Path, variant: str) -> list[Path]:
    """The weight files under a folder; one of each file that comes in several variants."""
    files = sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("*.bin"))
    plain_names = {file: VARIANT.sub("", file.name) for file in files}
    chosen = []
    for file, plain in plain_names.items():
        rivals = [other for other, name in plain_names.items() if name == plain and other.parent == file.parent]
        of_variant = [other for other in rivals if variant and f".{variant}." in other.name]
        if file in (of_variant or [other for other in rivals if other.name == plain] or rivals):
            chosen.append(file)
    return chosen


def _indexed(folder: Path, variant: str) -> list[Path]:
    """The shards in the folder's index. Of several indices, the variant's or the one without a variant counts."""
    indices = sorted(folder.glob("*.safetensors.index*.json"), key=lambda path: len(path.name))
    indices = [path for path in indices if variant and f".{variant}." in path.name] or indices
    if not indices:
        return []
    try:
        with open(indices[0], "rb", opener=only_files) as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        shards = [folder / Path(shard).name for shard in names]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"weights {indices[0]}: unreadable index ({type(error).__name__}); copy it again") from None
    except OSError as error:
        raise InputError(f"weights {indices[0]}: {error.strerror}; copy it again") from None
    if missing := [path.name for path in shards if not path.is_file()]:
        raise InputError(f"weights {indices[0]}: names {missing[0]!r}, which is not there; copy the missing shard")
    return shards


def locate(origin: Origin, folders: Mapping[str, Path], *, required: bool) -> Path | None:
    """The folder or file of an origin's weights, below the path of its argument; none if the origin is optional."""
    root, base = folders.get(origin.argument), folders.get("weights")
    if root is None and base and "." not in origin.places:  # or beside the base model
        beside_base = any((folder / place).exists() for folder in (base, *base.glob("*/")) for place in origin.places)
        root = base if beside_base else None
    if root is None:
        if required and origin.needed:
            raise InputError(f"{origin.what} is not given; give --{origin.argument.replace('_', '-')}")
        return None
    flag = f"--{origin.argument.replace('_', '-')}"
    if not root.exists():
        raise InputError(f"{origin.what}: {root} is not there; give {flag} PATH")
    if not (root.is_dir() or root.is_file()):
        raise InputError(f"{origin.what}: {root} is a device or a pipe, not a file or folder; give {flag} PATH")
    roots = [root, *(sorted(root.glob("*/")) if root.is_dir() and root == base else [])]
    candidates = [folder / place for folder in roots for place in origin.places]
    path = next((path for path in candidates if path.exists()), None)
    if path is None and root.is_file():
        path = root
    if path is None and origin.needed:
        paths = ", ".join(str(t) for t in candidates[: len(origin.places)])
        raise InputError(f"{origin.what}: none of {paths} is there, {root} holds {_content(root)}; give {flag} PATH")
    return path


def resolve(tensors: Tensors, names: Iterable[str | Rows]) -> Reference | None:
    """A reference to the tensor, or rows of a tensor, with the first of these names that the files hold."""
    for name in names:
        whole = tensors.tensors.get(name if isinstance(name, str) else name.key)
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


def reference_parameters(
    parameters: Mapping[str, Shapes], origins: Mapping[str, Tensors], system: System
) -> dict[str, dict[str, Reference]]:
    """A reference for every parameter of every component. Missing and unexpected keys of the files are refused."""
    missing: dict[str, set[str]] = {name: set() for name in origins}
    used: dict[str, set[str]] = {name: set() for name in origins}
    references: dict[str, dict[str, Reference]] = {}
    for component, shapes in parameters.items():
        references[component] = {}
        for parameter, shape in shapes.items():
            origin, names = system.origin_of(component, parameter), system.keys(component, parameter)
            reference = resolve(origins[origin], names)
            named = [name if isinstance(name, str) else name.key for name in names]
            if reference is None:
                missing[origin].add(named[0])
                continue
            used[origin].add(next(name for name in named if name in origins[origin].tensors))
            if [d for d in reference.shape if d != 1] != [d for d in shape if d != 1]:  # a 1x1 convolution is a matrix
                raise InputError(
                    f"weights {origins[origin].sources[reference.file]}: {named[0]!r} has shape"
                    f" {list(reference.shape)}, the network needs {list(shape)}; give files of one model"
                )
            references[component][parameter] = replace(reference, shape=shape, folder=origin)
    for origin, tensors in origins.items():
        unexpected = {key for key in tensors.tensors.keys() - used[origin] if not system.ignored(origin, key)}
        if absent := sorted(missing[origin]):
            others = _some(sorted(unexpected if used[origin] else tensors.tensors))
            what = f"lacks {len(absent)} tensors: {_some(absent)}" + (f"; holds instead: {others}" if others else "")
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
    """The first few names in a folder."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return f"{', '.join(map(one_line, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''}" or "nothing"


def open_reference(folder: Path, reference: Reference, mode: Literal["r", "c"] = "r") -> "npt.NDArray[np.uint8]":
    """The bytes of a tensor, mapped from its file. With `c` they may be written to, which does not change the file."""
    import numpy as np

    return np.memmap(folder / reference.file, np.uint8, mode, reference.offset, (reference.length,))


def mapped_tensor(folder: Path, reference: Reference) -> "torch.Tensor":
    """A PyTorch tensor over the mapped bytes, which are copied when written to. PyTorch is loaded here."""
    import torch

    data = torch.from_numpy(open_reference(folder, reference, "c"))  # torch asks for writable memory
    return data.view(getattr(torch, reference.dtype)).reshape(reference.shape)


def copy_tensors(source: Path, references: Mapping[str, Reference], path: Path) -> dict[str, Reference]:
    """Copy these tensors, one by one, into a new safetensors file, and return references to the copies."""
    ordered = dict(sorted(references.items()))
    specs = {name: TensorSpec(r.dtype, r.shape) for name, r in ordered.items()}
    write_tensors(path, specs, (open_reference(source, r).tobytes() for r in ordered.values()), "copied by tilewright")
    return {
        name: Reference(path.name, spec.dtype, references[name].shape, offset, length)
        for name, (spec, offset, length) in safetensors_header(path).items()
    }


class WeightReader:
    """Reads the numbers of a graph's initializers, mapped from the files of its weights."""

    def __init__(self, references: Mapping[str, Reference], folders: Mapping[str, Path]) -> None:
        self.references, self.folders = references, folders

    def __call__(self, value: Any) -> "npt.NDArray[Any]":
        import numpy as np

        reference = self.references.get(value.name)
        if reference is None:
            return np.asarray(value.const_value.numpy())
        data = open_reference(self.folders[reference.folder], reference)
        return data.view(value.const_value.dtype.numpy()).reshape(reference.shape)
