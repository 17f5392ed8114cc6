"""Weights by reference: which file, where in it, for every parameter of a network.

Nothing is read but headers. Random weights, which have no file yet, are written once, tensor by tensor.
"""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from tilewright.export.system import Origin, Rows
from tilewright.runtime.bundle import SAFETENSORS_DTYPES, Reference, safetensors_header
from tilewright.runtime.digests import writing
from tilewright.runtime.errors import BundleError, InputError, UsageError
from tilewright.runtime.program import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = [
    "STAND_IN",
    "Tensors",
    "attach",
    "copy_tensors",
    "find",
    "locate",
    "mapped_tensor",
    "open_reference",
    "random_weights",
    "resolve",
    "write_tensors",
]

VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)(?=\.[a-z]+$)")
STAND_IN = "stand-in: zeros in the place of weights"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tensors:
    """What the weight files of one folder hold."""

    folder: Path  # real, with every link resolved
    tensors: dict[str, Reference]
    sources: dict[str, str]  # file in the folder -> the name the user knows it by
    stand_in: bool = False  # zeros in the place of weights


def find(folder: Path, variant: str = "") -> Tensors:
    """Index every weight file under a folder (or one file), links followed to where the bytes are."""
    if not folder.exists():
        raise InputError(f"weights {folder}: no such file or folder; give the folder with the .safetensors files")
    named = [folder] if folder.is_file() else _indexed(folder, variant) or _listed(folder, variant)
    if not named:
        raise InputError(f"weights {folder}: holds no .safetensors file, and no .bin; give the folder that does")
    real = [_readable(file).resolve() for file in named]
    root = Path(os.path.commonpath([file.parent for file in real]))
    tensors: dict[str, Reference] = {}
    sources: dict[str, str] = {}
    for file, shown in zip(real, named, strict=True):
        name = file.relative_to(root).as_posix()
        sources[name] = str(shown)
        try:
            header = safetensors_header(file)
        except BundleError as error:
            raise InputError(str(error)) from None
        except OSError as error:
            raise InputError(f"weights {shown}: {error.strerror} ({file}); copy it again") from None
        for key, (spec, offset, length) in header.items():
            if key in tensors:
                raise InputError(f"weights {folder}: {key!r} is in {tensors[key].file} and in {name}; keep one of them")
            tensors[key] = Reference(name, spec.dtype, tuple(int(d) for d in spec.shape), offset, length)
    return Tensors(root, tensors, sources, any(_note(file) == STAND_IN for file in real))


def _note(file: Path) -> str | None:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        note: str | None = (json.loads(stream.read(length)).get("__metadata__") or {}).get("note")
        return note


def _readable(file: Path) -> Path:
    """The file, or what a pickle was converted to."""
    from tilewright.export.weights.pickled import SUFFIXES, as_safetensors

    return as_safetensors(file) if file.suffix in SUFFIXES else file


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
    root = given.get(origin.argument)
    if root is None:
        if required and origin.needed:
            raise InputError(f"{origin.what} is not given; give --{origin.argument.replace('_', '-')}")
        return None
    flag = f"--{origin.argument.replace('_', '-')}"
    if not root.exists():
        raise InputError(f"{origin.what}: {root} is not there; give {flag} PATH")
    roots = [root, *(sorted(root.glob("*/")) if root.is_dir() and origin.argument == "weights" else [])]
    tried = [folder / place for folder in roots for place in origin.places]
    path = next((path for path in tried if path.exists()), None)
    if path is None and root.is_file():
        path = root
    if path is None and origin.needed:
        looked = ", ".join(str(t) for t in tried[: len(origin.places)])
        raise InputError(f"{origin.what}: none of {looked} is there; give {flag} PATH")
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


def attach(wanted: Mapping[str, Shapes], found: Mapping[str, Tensors], system: Any) -> dict[str, dict[str, Reference]]:
    """For every component, the bytes of each of its parameters; every key of the files is accounted for."""
    missing: dict[str, set[str]] = {name: set() for name in found}
    used: dict[str, set[str]] = {name: set() for name in found}
    references: dict[str, dict[str, Reference]] = {}
    for component, shapes in wanted.items():
        references[component] = {}
        for parameter, shape in shapes.items():
            origin, names = system.origin(component, parameter), system.keys(component, parameter)
            reference = resolve(found[origin], names)
            named = [name if isinstance(name, str) else name.key for name in names]
            if reference is None:
                missing[origin].add(named[0])
                continue
            used[origin].add(next(name for name in named if name in found[origin].tensors))
            if [d for d in reference.shape if d != 1] != [d for d in shape if d != 1]:  # a 1x1 convolution is a matrix
                raise InputError(
                    f"weights {found[origin].sources[reference.file]}: {named[0]!r} has shape"
                    f" {list(reference.shape)}, the network needs {list(shape)}; is this the right preset?"
                )
            references[component][parameter] = replace(reference, shape=shape, folder=origin)
    for origin, tensors in found.items():
        unexpected = {key for key in tensors.tensors.keys() - used[origin] if not system.ignored(origin, key)}
        for what, names_of in (("lacks", sorted(missing[origin])), ("holds unexpected", sorted(unexpected))):
            if names_of:
                raise InputError(
                    f"weights {', '.join(sorted(tensors.sources.values())[:2])}: {what} {len(names_of)}"
                    f" tensors: {', '.join(names_of[:3])}{', ...' if len(names_of) > 3 else ''};"
                    f" give {system.ORIGINS[origin].what}"
                )
    return references


def open_reference(folder: Path, reference: Reference, mode: Literal["r", "c"] = "r") -> npt.NDArray[np.uint8]:
    """The bytes of a tensor, mapped read-only or, for `c`, copied when written to; the file stays as it is."""
    return np.memmap(folder / reference.file, np.uint8, mode, reference.offset, (reference.length,))


def mapped_tensor(folder: Path, reference: Reference) -> "torch.Tensor":
    """The tensor for PyTorch, which is loaded here: over the mapped bytes, copied when written to."""
    import torch

    data = torch.from_numpy(open_reference(folder, reference, "c"))  # torch asks for writable memory
    return data.view(getattr(torch, reference.dtype)).reshape(reference.shape)


def random_weights(shapes: Shapes, seed: int, path: Path) -> None:
    """Write seeded float32 weights that keep activations of order one; the same bytes on every machine."""
    specs = {name: TensorSpec("float32", shape) for name, shape in sorted(shapes.items())}
    write_tensors(path, specs, (_random(name, shapes[name], seed) for name in specs), f"random weights, seed {seed}")


def _random(name: str, shape: tuple[int, ...], seed: int) -> bytes:
    if not 0 <= seed < 2**32:
        raise UsageError(f"--random-weights {seed} does not fit in 32 bits; use a number from 0 to {2**32 - 1}")
    generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
    values = generator.standard_normal(shape, np.float32)
    if len(shape) > 1:
        values *= np.float32((np.prod(shape[1:]) if len(shape) == 4 else shape[-1]) ** -0.5)
    else:
        values = values * np.float32(0.02) + np.float32(not name.endswith("bias"))
    return values.astype("<f4").tobytes()


def copy_tensors(source: Path, references: Mapping[str, Reference], path: Path) -> dict[str, Reference]:
    """Copy just these tensors into one new safetensors file, one by one; where they are now."""
    ordered = dict(sorted(references.items()))
    specs = {name: TensorSpec(r.dtype, r.shape) for name, r in ordered.items()}
    write_tensors(path, specs, (open_reference(source, r).tobytes() for r in ordered.values()), "copied by tilewright")
    return {
        name: Reference(path.name, spec.dtype, references[name].shape, offset, length)
        for name, (spec, offset, length) in safetensors_header(path).items()
    }


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[bytes], note: str) -> None:
    """A safetensors file of these tensors, written one by one; without any, their bytes are a hole."""
    stored = {dtype: (name, width) for name, (dtype, width) in SAFETENSORS_DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"note": note}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + stored[spec.dtype][1] * math.prod(int(d) for d in spec.shape)
        header[name] = {"dtype": stored[spec.dtype][0], "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in tensors:
            file.write(data)
        file.truncate(8 + len(text) + end)
