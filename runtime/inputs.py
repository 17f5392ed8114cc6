"""What the caller gives a program: numbers, names of choices, words, files of tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.bundle.program import Program, TensorSpec
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.errors import BundleError, InputError, TilewrightError, UsageError
from tilewright.runtime.text import token_ids

__all__ = ["from_words", "gather", "read_tensors", "tensors_of", "value_of"]


def value_of(program: Program, name: str, given: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    """The array of an input, as given or defaulted, checked."""
    wanted = program.inputs[name]
    value = given.get(name, wanted.default)
    if value is None:
        asked = [text for text, t in program.texts.items() if name in t.ids]  # as the caller knows it
        asked += [file for file, tensors in program.files.items() if name in tensors.values()]
        raise UsageError(f"input {[*asked, name][0]!r} has no default; give it a value")
    if isinstance(value, str) and name not in given:
        return constants[value[1:]]
    choices = ", ".join(wanted.choices) or "none"
    if isinstance(value, str):
        if value not in wanted.choices:
            raise UsageError(f"input {name!r}: {value!r} is not one of {choices}")
        value = wanted.choices[value]
    try:
        array = _cast(value, wanted.dtype)
        fits = array.dtype.kind == "f" or np.array_equal(array, value)  # floats round, the others must not
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise UsageError(f"input {name!r} takes {wanted.dtype}, which this {type(value).__name__} is not")
    if array.shape != wanted.shape:
        raise UsageError(f"input {name!r} has shape {list(array.shape)}; give {list(wanted.shape)}")
    _require_finite(f"input {name!r} is", array, UsageError)
    if wanted.choices and not np.isin(array, list(wanted.choices.values())).all():
        raise UsageError(f"input {name!r}: {array.tolist()} is not one of {wanted.choices}")
    return array


def gather(bundle: Bundle, given: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs and values by name: words become ids, files become the tensors they hold."""
    program = bundle.program
    made = {name: value for name, value in given.items() if name not in program.texts and name not in program.files}
    values = {name for file in given.keys() & program.files.keys() for name in program.files[file].values()}
    for name, text in program.texts.items():
        words = given.get(name, text.default)
        stood_for = values or text.ids.keys() & given.keys()  # by tensors from a file, or by ids
        if words is not None and (name in given or not stood_for):
            made |= {i: token_ids(bundle.path(t), words, program.inputs[i].shape[1]) for i, t in text.ids.items()}
    specs = _specs(bundle)
    made = {n: _fitting(f"input {n!r}", v, specs[n], UsageError) if n in specs else v for n, v in made.items()}
    specs |= {name: TensorSpec(i.dtype, i.shape) for name, i in program.inputs.items()}
    for file in given.keys() & program.files.keys():
        held = tensors_of(Path(given[file]), tuple(program.files[file]))
        for tensor, name in program.files[file].items():
            made[name] = _fitting(f"{given[file]}: {tensor!r}", held[tensor], specs[name], InputError)
    return made


def _specs(bundle: Bundle) -> dict[str, TensorSpec]:
    """The values that a caller may give instead of a pass without tiles."""
    return {
        target: bundle.manifest.components[call.run].outputs[name]
        for p in bundle.program.passes
        if p.tiles is None
        for *_, call in p.calls()
        for name, target in call.outputs.items()
    }


def _fitting(where: str, given: Any, spec: TensorSpec, error: type[TilewrightError]) -> Any:
    """A tensor as its place takes it, or a refusal."""
    try:
        array = _cast(given, spec.dtype)
    except (TypeError, ValueError):
        raise error(f"{where} is no tensor of {spec.dtype}; use this bundle's own") from None
    sizes = zip(array.shape, spec.shape, strict=False)
    if array.ndim != len(spec.shape) or any(isinstance(d, int) and d != size for size, d in sizes):
        there = list(array.shape)
        raise error(f"{where} has shape {there}, this bundle takes {list(spec.shape)}; use its own")
    _require_finite(f"{where} holds", array, error)
    return array


def _cast(value: Any, dtype: str) -> Any:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
        return np.asarray(value, np.dtype(dtype))


def _require_finite(said: str, array: Any, error: type[TilewrightError]) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        raise error(f"{said} {array[~finite].flat[0]} as {array.dtype}; give finite numbers")


def tensors_of(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """These tensors of a file the caller gave."""
    try:
        held = read_tensors(path)
    except (BundleError, OSError) as error:
        reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
        raise InputError(f"{reason}; give a safetensors file with {', '.join(names)}") from None
    if missing := [name for name in names if name not in held]:
        there = ", ".join(sorted(held)[:3]) or "nothing"
        raise InputError(f"{path}: lacks the tensor {missing[0]!r} and holds {there}; give one with {', '.join(names)}")
    return {name: held[name] for name in names}


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, mapped; bfloat16, which NumPy has not, as float32."""
    header = safetensors_header(path)
    data = np.memmap(path, np.uint8, "r") if header else np.empty(0, np.uint8)
    tensors = {}
    for name, (spec, start, length) in header.items():
        raw: Any = data[start : start + length]
        if spec.dtype == "bfloat16":
            raw = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif spec.dtype.startswith("float8"):
            raise BundleError(f"{path}: {name!r} is {spec.dtype}, which NumPy has not; store it as float32")
        tensors[name] = (raw if raw.dtype == np.float32 else raw.view(np.dtype(spec.dtype))).reshape(spec.shape)
    return tensors


def from_words(program: Program, words: Sequence[str]) -> dict[str, Any]:
    """A program's inputs, texts and files from `--name value` or `--name=value`."""
    given: dict[str, Any] = {}
    left = list(words)
    while left:
        flag, equals, after = left.pop(0).partition("=")
        value = after if equals else left.pop(0) if left and not left[0].startswith("--") else None
        name = flag.removeprefix("--").replace("-", "_")
        typed = {n for n, wanted in program.inputs.items() if not wanted.shape}
        if (
            not flag.startswith("--")
            or name not in typed | program.texts.keys() | program.files.keys()
            or value is None
        ):
            known = (*sorted(typed), *program.texts, *program.files)
            accepted = ", ".join(f"--{n.replace('_', '-')} VALUE" for n in known) or "none"
            raise UsageError(f"unknown argument {flag!r}; this bundle's own arguments: {accepted}")
        if name in given:
            raise UsageError(f"argument {flag!r} is given twice; give it once")
        plain = name in program.texts or name in program.files or value in program.inputs[name].choices
        given[name] = value if plain else _number(program, name, value)
    return given


def _number(program: Program, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        choices = ", ".join(program.inputs[name].choices)
        what = f"is not one of {choices}" if choices else "is not a number; see the bundle's program.json"
        raise UsageError(f"--{name.replace('_', '-')} {value!r} {what}") from None
