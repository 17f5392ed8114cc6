"""Checking and converting a caller's arguments: numbers, names of choices, words, files of tensors."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.bundle.arguments import Argument, argument_of
from tilewright.runtime.bundle.program import Input, Program, TensorSpec
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.errors import BundleError, InputError, TilewrightError, UsageError
from tilewright.runtime.text import token_ids

__all__ = ["check_names", "checked", "gather", "read_tensors", "seconds", "tensors_of", "value_of", "whole"]

LONGEST_S = 1e8  # three years
SHOWN = 60  # most characters of a value in a message


def value_of(program: Program, name: str, arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    """The checked array of an input, from the caller or its default."""
    spec = program.inputs[name]
    value = arguments.get(name, spec.default)
    if value is None:
        labels = [text for text, t in program.texts.items() if name in t.ids]  # names that the caller knows
        labels += [file for file, f in program.files.items() if name in f.tensors.values()]
        raise UsageError(f"{[*labels, name][0]} has no default; give it a value")
    if isinstance(value, str) and name not in arguments:
        return constants[value[1:]]
    return checked(name, _shown(name, value), spec, value).reshape(spec.spec.shape)


def checked(name: str, shown: str, spec: Input, value: Any) -> Any:
    """The array of an input. `shown` is the value for messages, as the caller wrote it: `gain=3` or `--gain 3`."""
    takes = argument_of(spec).takes
    if isinstance(value, str) and spec.choices:
        if value not in spec.choices:
            raise UsageError(f"{shown} is not {takes}")
        value = spec.choices[value]
    try:
        array = _cast(value, spec.dtype)
        fits = array.dtype.kind == "f" or np.array_equal(array, value)  # only floats may be rounded
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits or isinstance(value, str | bytes) or (np.asarray(value).dtype == bool and spec.dtype != "bool"):
        expected = f"an array of {spec.dtype}" if spec.shape else takes
        raise UsageError(f"{shown} is not {expected}")
    if array.shape != spec.shape:
        expected = f"an array of {list(spec.shape)}" if spec.shape else takes
        raise UsageError(f"{name} has shape {list(array.shape)}; give {expected}")
    if spec.shape:
        _require_finite(f"{name} holds", array, UsageError)
    elif not np.isfinite(array):
        raise UsageError(f"{shown} is not finite as {spec.dtype}; give {takes}")
    if spec.choices and not np.isin(array, list(spec.choices.values())).all():
        raise UsageError(f"{shown} is not {takes}")
    too_low = spec.least is not None and array < np.asarray(spec.least, array.dtype)
    if too_low or (spec.most is not None and array > np.asarray(spec.most, array.dtype)):
        raise UsageError(f"{shown} is not {takes}")
    return array


def _shown(name: str, value: Any) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return f"{name}={text}" if len(text) <= SHOWN and "\n" not in text else f"{name}, a {type(value).__name__},"


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value of one of our own options, which must be an integer, not 1.5 and not True, within these bounds."""
    takes = Argument("integer", least=least, most=most).takes
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{_shown(name, value)} is not {takes}")
    number = int(value)
    if number < least or (most is not None and number > most):
        raise UsageError(f"{name}={number} is not {takes}")
    return number


def seconds(name: str, value: Any, *, none: bool = False) -> float:
    """The value of one of our own options, which must be a number of seconds above 0. `none`: 0 is accepted too."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool | np.bool_) else math.nan
    if not (0 < number <= LONGEST_S or (none and number == 0)):
        above = "from 0" if none else "above 0"
        raise UsageError(f"{_shown(name, value)} is not a number of seconds {above} to {LONGEST_S:.0f}")
    return number


def gather(bundle: Bundle, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs and values of a program by name. Words become ids, files become their tensors; None is the default."""
    program, specs = bundle.program, _specs(bundle)
    check_names(bundle, arguments)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    values = {
        name: value for name, value in arguments.items() if name not in program.texts and name not in program.files
    }
    file_values = {
        name for file in arguments.keys() & program.files.keys() for name in program.files[file].tensors.values()
    }
    for name, text in program.texts.items():
        words = arguments.get(name, text.default)
        replaced = file_values or text.ids.keys() & arguments.keys()  # by tensors from a file, or by ids
        if words is not None and (name in arguments or not replaced):
            if not isinstance(words, str):
                raise UsageError(f"{_shown(name, words)} is not words; give a str")
            values |= {i: token_ids(bundle.path(t), words, program.inputs[i].shape[1]) for i, t in text.ids.items()}
    values = {n: _fitting(n, v, specs[n], UsageError) if n in specs else v for n, v in values.items()}
    specs |= {name: TensorSpec(i.dtype, i.shape) for name, i in program.inputs.items()}
    for file in arguments.keys() & program.files.keys():
        if not isinstance(arguments[file], str | os.PathLike):
            raise UsageError(f"{_shown(file, arguments[file])} is not a safetensors file; give its path")
        tensors = tensors_of(Path(arguments[file]), tuple(program.files[file].tensors))
        for tensor, name in program.files[file].tensors.items():
            values[name] = _fitting(f"{arguments[file]}: {tensor!r}", tensors[tensor], specs[name], InputError)
    return values


def check_names(bundle: Bundle, names: Iterable[str]) -> None:
    """Refuse a name that is neither an argument of the bundle nor an input or value of its program."""
    accepted = {*bundle.arguments, *bundle.program.inputs, *_specs(bundle)}
    if unknown := [name for name in names if name not in accepted]:
        listed = ", ".join(bundle.arguments) or "no arguments of its own"
        raise UsageError(f"unknown argument {unknown[0]!r}; this bundle takes {listed}")


def _specs(bundle: Bundle) -> dict[str, TensorSpec]:
    """The values of passes without tiles, which a caller may give instead. Each is one row."""
    return {
        target: bundle.manifest.components[call.run].outputs[name].rows(1)
        for p in bundle.program.passes
        if p.tiles is None
        for *_, call in p.calls()
        for name, target in call.outputs.items()
    }


def _fitting(where: str, value: Any, spec: TensorSpec, error: type[TilewrightError]) -> Any:
    """An array with the type and shape of `spec`; others are refused."""
    try:
        array = _cast(value, spec.dtype)
    except (TypeError, ValueError):
        raise error(f"{where} is no tensor of {spec.dtype}; use this bundle's own") from None
    sizes = zip(array.shape, spec.shape, strict=False)
    if array.ndim != len(spec.shape) or any(isinstance(d, int) and d != size for size, d in sizes):
        actual = list(array.shape)
        raise error(f"{where} has shape {actual}, this bundle takes {list(spec.shape)}; use its own")
    _require_finite(f"{where} holds", array, error)
    return array


def _cast(value: Any, dtype: str) -> Any:
    with np.errstate(over="ignore"):  # numbers that are too large become infinite and are refused later
        return np.asarray(value, np.dtype(dtype))


def _require_finite(subject: str, array: Any, error: type[TilewrightError]) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        raise error(f"{subject} {array[~finite].flat[0]} as {array.dtype}; give finite numbers")


def tensors_of(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """These tensors of a caller's file."""
    try:
        tensors = read_tensors(path)
    except (BundleError, OSError) as error:
        reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
        raise InputError(f"{reason}; give a safetensors file with {', '.join(names)}") from None
    if missing := [name for name in names if name not in tensors]:
        others = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise InputError(
            f"{path}: lacks the tensor {missing[0]!r} and holds {others}; give one with {', '.join(names)}"
        )
    return {name: tensors[name] for name in names}


def read_tensors(path: Path) -> dict[str, Any]:
    """The mapped tensors of a safetensors file. bfloat16, which NumPy lacks, becomes float32."""
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
