"""Weights by reference: which file, where in it, for every parameter of a network.

Nothing is read but headers. Random weights, which have no file yet, are written once, tensor by tensor.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle import SAFETENSORS_DTYPES, Reference, safetensors_header
from tilewright.runtime.digests import writing
from tilewright.runtime.errors import BundleError, InputError, UsageError
from tilewright.runtime.program import TensorSpec

__all__ = ["Tensors", "attach", "copy_tensors", "find", "open_reference", "random_weights"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tensors:
    """What the weight files of one folder hold."""

    folder: Path  # real, with every link resolved
    tensors: dict[str, Reference]
    sources: dict[str, str]  # file in the folder -> the name the user knows it by


def find(folder: Path) -> Tensors:
    """Index every safetensors file under a folder (or one file), links followed to where the bytes are."""
    if not folder.exists():
        raise InputError(f"weights {folder}: no such file or folder; give the folder with the .safetensors files")
    named = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
    if not named:
        raise InputError(f"weights {folder}: holds no .safetensors file; convert the weights to safetensors first")
    real = [file.resolve() for file in named]
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
    return Tensors(root, tensors, sources)


def attach(
    wanted: Mapping[str, Shapes],
    found: Tensors,
    keys: Callable[[str, str], Iterable[str]],
    ignored: Callable[[str], bool],
) -> dict[str, dict[str, Reference]]:
    """For every component, the bytes of each of its parameters; every key of the files is accounted for."""
    missing: list[str] = []
    references: dict[str, dict[str, Reference]] = {}
    used: set[str] = set()
    for component, shapes in wanted.items():
        references[component] = {}
        for parameter, shape in shapes.items():
            names = tuple(keys(component, parameter))
            key = next((name for name in names if name in found.tensors), None)
            if key is None:
                missing.append(names[0])
                continue
            used.add(key)
            if found.tensors[key].shape != shape:
                raise InputError(
                    f"weights {found.folder / found.tensors[key].file}: {key!r} has shape"
                    f" {list(found.tensors[key].shape)}, the network needs {list(shape)}; is this the right preset?"
                )
            references[component][parameter] = found.tensors[key]
    unexpected = sorted(key for key in found.tensors.keys() - used if not ignored(key))
    for what, names_of in (("lacks", sorted(set(missing))), ("holds unexpected", unexpected)):
        if names_of:
            raise InputError(
                f"weights {found.folder} ({', '.join(sorted(found.sources)[:2])}): {what} {len(names_of)} tensors:"
                f" {', '.join(names_of[:3])}{', ...' if len(names_of) > 3 else ''}; give the weights of this system"
            )
    return references


def open_reference(folder: Path, reference: Reference, mode: Literal["r", "c"] = "r") -> npt.NDArray[np.uint8]:
    """The bytes of a tensor, mapped read-only or, for `c`, copied when written to; the file stays as it is."""
    return np.memmap(folder / reference.file, np.uint8, mode, reference.offset, (reference.length,))


def random_weights(shapes: Shapes, seed: int, path: Path) -> None:
    """Write seeded float32 weights that keep activations of order one; the same bytes on every machine."""
    specs = {name: TensorSpec("float32", shape) for name, shape in sorted(shapes.items())}
    _write(path, specs, (_random(name, shapes[name], seed) for name in specs), f"random weights, seed {seed}")


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
    _write(path, specs, (open_reference(source, r).tobytes() for r in ordered.values()), "copied by tilewright")
    return {
        name: Reference(path.name, spec.dtype, references[name].shape, offset, length)
        for name, (spec, offset, length) in safetensors_header(path).items()
    }


def _write(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[bytes], note: str) -> None:
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
