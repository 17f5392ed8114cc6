"""What the caller gives a program: numbers, names of choices, words, files of tensors."""

import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.bundle.arguments import Argument, argument_of
from tilewright.runtime.bundle.program import Input, Program, TensorSpec
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.errors import BundleError, InputError, TilewrightError, UsageError
from tilewright.runtime.text import token_ids

__all__ = ["check_names", "checked", "gather", "read_tensors", "tensors_of", "value_of", "whole"]

SHOWN = 60  # characters of a refused value


def value_of(program: Program, name: str, given: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    """The array of an input, as given or defaulted, checked."""
    taken = program.inputs[name]
    value = given.get(name, taken.default)
    if value is None:
        asked = [text for text, t in program.texts.items() if name in t.ids]  # as the caller knows it
        asked += [file for file, f in program.files.items() if name in f.tensors.values()]
        raise UsageError(f"{[*asked, name][0]} has no default; give it a value")
    if isinstance(value, str) and name not in given:
        return constants[value[1:]]
    return checked(name, _shown(name, value), taken, value)


def checked(name: str, shown: str, taken: Input, value: Any) -> Any:
    """The array of a value for an input; a refusal shows the value as the caller wrote it, `gain=3` or `--gain 3`."""
    takes = argument_of(taken).takes
    if isinstance(value, str) and taken.choices:
        if value not in taken.choices:
            raise UsageError(f"{shown} is not {takes}")
        value = taken.choices[value]
    try:
        array = _cast(value, taken.dtype)
        fits = array.dtype.kind == "f" or np.array_equal(array, value)  # floats round, the others must not
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits or isinstance(value, str | bytes) or (np.asarray(value).dtype == bool and taken.dtype != "bool"):
        wanted = f"an array of {taken.dtype}" if taken.shape else takes
        raise UsageError(f"{shown} is not {wanted}")
    if array.shape != taken.shape:
        wanted = f"an array of {list(taken.shape)}" if taken.shape else takes
        raise UsageError(f"{name} has shape {list(array.shape)}; give {wanted}")
    if taken.shape:
        _require_finite(f"{name} holds", array, UsageError)
    elif not np.isfinite(array):
        raise UsageError(f"{shown} is not finite as {taken.dtype}; give {takes}")
    if taken.choices and not np.isin(array, list(taken.choices.values())).all():
        raise UsageError(f"{shown} is not {takes}")
    too_low = taken.least is not None and array < np.asarray(taken.least, array.dtype)
    if too_low or (taken.most is not None and array > np.asarray(taken.most, array.dtype)):
        raise UsageError(f"{shown} is not {takes}")
    return array


def _shown(name: str, value: Any) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return f"{name}={text}" if len(text) <= SHOWN and "\n" not in text else f"{name}, a {type(value).__name__},"


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number of our own, not 1.5 and not True; the rest of its range is checked where it is used."""
    takes = Argument("integer", least=least, most=most).takes
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{_shown(name, value)} is not {takes}")
    number = int(value)
    if number < least or (most is not None and number > most):
        raise UsageError(f"{name}={number} is not {takes}")
    return number


def gather(bundle: Bundle, given: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs and values by name: words become ids, files become the tensors they hold; None is the default."""
    program, specs = bundle.program, _specs(bundle)
    check_names(bundle, given)
    given = {name: value for name, value in given.items() if value is not None}
    made = {name: value for name, value in given.items() if name not in program.texts and name not in program.files}
    values = {name for file in given.keys() & program.files.keys() for name in program.files[file].tensors.values()}
    for name, text in program.texts.items():
        words = given.get(name, text.default)
        stood_for = values or text.ids.keys() & given.keys()  # by tensors from a file, or by ids
        if words is not None and (name in given or not stood_for):
            if not isinstance(words, str):
                raise UsageError(f"{_shown(name, words)} is not words; give a str")
            made |= {i: token_ids(bundle.path(t), words, program.inputs[i].shape[1]) for i, t in text.ids.items()}
    made = {n: _fitting(n, v, specs[n], UsageError) if n in specs else v for n, v in made.items()}
    specs |= {name: TensorSpec(i.dtype, i.shape) for name, i in program.inputs.items()}
    for file in given.keys() & program.files.keys():
        if not isinstance(given[file], str | os.PathLike):
            raise UsageError(f"{_shown(file, given[file])} is not a safetensors file; give its path")
        held = tensors_of(Path(given[file]), tuple(program.files[file].tensors))
        for tensor, name in program.files[file].tensors.items():
            made[name] = _fitting(f"{given[file]}: {tensor!r}", held[tensor], specs[name], InputError)
    return made


def check_names(bundle: Bundle, given: Iterable[str]) -> None:
    """Refuse a name that is no argument of the bundle, nor an array that may stand for what it makes of one."""
    known = {*bundle.arguments, *bundle.program.inputs, *_specs(bundle)}
    if unknown := [name for name in given if name not in known]:
        arguments = ", ".join(bundle.arguments) or "no arguments of its own"
        raise UsageError(f"unknown argument {unknown[0]!r}; this bundle takes {arguments}")


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
