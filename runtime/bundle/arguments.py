"""The arguments of a bundle: what a caller may choose besides the image, as its program says it."""

import json
import keyword
import math
import re
from dataclasses import dataclass

from tilewright.runtime.bundle.program import Input, Program
from tilewright.runtime.errors import BundleError

__all__ = ["RESERVED", "Argument", "argument_of", "arguments_of", "check_arguments", "flag"]

KINDS = ("words", "tensors", "number", "integer", "choice")
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
OPTIONS = (  # of `tilewright runtime restore` and `profile`
    *("bundle", "expect", "explain", "force", "help", "json", "max_pixels", "memory", "overlap", "quiet"),
    *("resolutions", "runs", "scale", "seed", "steps", "threads", "tile", "verbose", "version", "weights_dir"),
    "workers",
)
PARAMETERS = ("self", "image", "restorer", "sizes", "on_progress")  # of the Python functions
RESERVED = (*OPTIONS, *PARAMETERS)


@dataclass(frozen=True)
class Argument:
    """What a caller may choose: a number, an integer, a choice, words, or a safetensors file of tensors."""

    kind: str
    help: str = ""
    default: int | float | str | None = None
    choices: tuple[str, ...] = ()
    least: int | float | None = None
    most: int | float | None = None
    needed: bool = False  # there is no default; a file of tensors may stand for words

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")

    @property
    def takes(self) -> str:
        """What a value must be, in a few words."""
        if self.kind == "choice":
            return f"one of {', '.join(self.choices)}"
        names = {"words": "words", "tensors": "a safetensors file", "number": "a number", "integer": "a whole number"}
        if self.least is not None and self.most is not None:
            return f"{names[self.kind]} from {_plain(self.least)} to {_plain(self.most)}"
        if self.least is not None:
            return f"{names[self.kind]} of at least {_plain(self.least)}"
        return names[self.kind] + ("" if self.most is None else f" of at most {_plain(self.most)}")

    @property
    def otherwise(self) -> str:
        """What holds where it is not given."""
        if self.needed:
            return "needed"
        if self.default is None:
            return "default: none"
        return f"default: {self.default if self.kind == 'choice' else _plain(self.default)}"


def _plain(value: int | float | str) -> str:
    exact = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if exact else value, ensure_ascii=False)


def flag(name: str) -> str:
    """The argument as the command line has it."""
    return f"--{name.replace('_', '-')}"


def arguments_of(program: Program) -> dict[str, Argument]:
    """Words first, then files, then single values; an input that holds more is given by a file, or by words."""
    arguments = {
        name: Argument("words", text.help, text.default, needed=text.default is None)
        for name, text in program.texts.items()
    }
    of_words = {name for text in program.texts.values() for name in text.ids}
    needed = {name for name, taken in program.inputs.items() if taken.default is None} - of_words
    for name, file in program.files.items():
        arguments[name] = Argument("tensors", file.help, needed=bool(needed & set(file.tensors.values())))
    return arguments | {name: argument_of(taken) for name, taken in program.inputs.items() if not taken.shape}


def argument_of(taken: Input) -> Argument:
    """The argument that gives an input of a single value."""
    if taken.choices:
        usual = next((name for name, number in taken.choices.items() if number == taken.default), None)
        choices = tuple(sorted(taken.choices, key=lambda name: taken.choices[name]))
        return Argument("choice", taken.help, usual, choices, needed=taken.default is None)
    kind = "number" if "float" in taken.dtype else "integer"
    default = None if isinstance(taken.default, str) else taken.default  # of a constant, the number is in the bundle
    return Argument(kind, taken.help, default, (), taken.least, taken.most, taken.default is None)


def check_arguments(program: Program) -> None:
    """Refuse names that callers could not use, and ranges that do not fit."""
    for name, taken in program.inputs.items():
        _check_range(f"program: input {name!r}", taken)
    named = [(name, text.help) for name, text in program.texts.items()]
    named += [(name, file.help) for name, file in program.files.items()]
    named += [(name, taken.help) for name, taken in program.inputs.items() if not taken.shape]
    names = [name for name, _ in named]
    for name, help_ in named:
        where = f"program: argument {name!r}"
        if name in OPTIONS:
            raise BundleError(f"{where}: the command line has its own {flag(name)}; rename the argument")
        if name in PARAMETERS or keyword.iskeyword(name):
            raise BundleError(f"{where}: Python has its own {name!r}; rename the argument")
        if not NAME.fullmatch(name):
            raise BundleError(f"{where}: use small letters, digits, and single underscores between them")
        if names.count(name) > 1:
            raise BundleError(f"{where}: the name is taken; give every argument its own")
        if not help_.isprintable():
            raise BundleError(f"{where}: help {help_!r} is not one printable line; rewrite it")


def _check_range(where: str, taken: Input) -> None:
    least, most = -math.inf if taken.least is None else taken.least, math.inf if taken.most is None else taken.most
    if (least, most) != (-math.inf, math.inf) and (taken.shape or taken.choices):
        raise BundleError(f"{where}: only a single number without choices has a range; remove least and most")
    if least > most:
        raise BundleError(f"{where}: least {least:g} is above most {most:g}; exchange them")
    if isinstance(taken.default, int | float) and not least <= taken.default <= most:
        raise BundleError(f"{where}: default {_plain(taken.default)} is not {argument_of(taken).takes}")
