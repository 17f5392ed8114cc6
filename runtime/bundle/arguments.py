"""The arguments of a bundle, which a caller may set besides the image. They follow from the program."""

import json
import keyword
import math
import re
from dataclasses import dataclass, field

from tilewright.runtime.bundle.program import Input, Program
from tilewright.runtime.bundle.strict import check_limits
from tilewright.runtime.errors import BundleError

__all__ = ["RESERVED", "Argument", "argument_of", "arguments_of", "check_arguments", "flag"]

KINDS = ("words", "tensors", "number", "integer", "choice")
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
OPTIONS = (  # options of `tilewright runtime restore` and `profile`
    *(
        "bundle",
        "expect",
        "explain",
        "force",
        "format",
        "help",
        "json",
        "max_pixels",
        "memory",
        "memory_limit",
        "overlap",
        "quiet",
    ),
    *("resolutions", "runs", "scale", "seed", "steps", "threads", "tile", "verbose", "version", "weights_dir"),
    *("devices", "engine", "batch", "resume", "checkpoint", "cluster", "bits", "color", "jitter", "native"),
    *("eager", "html", "interpolate"),
)
PARAMETERS = ("self", "image", "restorer", "sizes", "on_progress", "on_part", "beside")  # of Python functions
RESERVED = (*OPTIONS, *PARAMETERS)


@dataclass(frozen=True)
class Argument:
    """An argument that a caller may set: a number, an integer, a choice, words, or a safetensors file of tensors."""

    kind: str = field(metadata={"enum": KINDS})
    help: str = ""
    default: int | float | str | None = None
    choices: tuple[str, ...] = ()
    least: int | float | None = None
    most: int | float | None = None
    needed: bool = False  # it has no default; a file of tensors may replace words

    def __post_init__(self) -> None:
        check_limits(self)

    @property
    def takes(self) -> str:
        """The allowed values, in a few words."""
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
        """The default, in a few words."""
        if self.needed:
            return "needed"
        if self.default is None:
            return "default: none"
        return f"default: {self.default if self.kind == 'choice' else _plain(self.default)}"


def _plain(value: int | float | str) -> str:
    exact = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if exact else value, ensure_ascii=False)


def flag(name: str) -> str:
    """The option of the command line for an argument."""
    return f"--{name.replace('_', '-')}"


def arguments_of(program: Program) -> dict[str, Argument]:
    """All arguments: words, then files, then inputs of a single value. Larger inputs come from files or words."""
    arguments = {
        name: Argument("words", text.help, text.default, needed=text.default is None)
        for name, text in program.texts.items()
    }
    of_words = {name for text in program.texts.values() for name in text.ids}
    needed = {name for name, spec in program.inputs.items() if spec.default is None} - of_words
    for name, file in program.files.items():
        arguments[name] = Argument("tensors", file.help, needed=bool(needed & set(file.tensors.values())))
    return arguments | {name: argument_of(spec) for name, spec in program.inputs.items() if not spec.shape}


def argument_of(spec: Input) -> Argument:
    """The argument for an input of a single value."""
    if spec.choices:
        usual = next((name for name, number in spec.choices.items() if number == spec.default), None)
        choices = tuple(sorted(spec.choices, key=lambda name: spec.choices[name]))
        return Argument("choice", spec.help, usual, choices, needed=spec.default is None)
    kind = "number" if "float" in spec.dtype else "integer"
    default = (
        None if isinstance(spec.default, str) else spec.default
    )  # a text names a constant, whose number is in the bundle
    return Argument(kind, spec.help, default, (), spec.least, spec.most, spec.default is None)


def check_arguments(program: Program) -> None:
    """Refuse names that callers cannot use, and ranges that make no sense."""
    for name, spec in program.inputs.items():
        _check_range(f"program: input {name!r}", spec)
    named = [(name, text.help) for name, text in program.texts.items()]
    named += [(name, file.help) for name, file in program.files.items()]
    named += [(name, spec.help) for name, spec in program.inputs.items() if not spec.shape]
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


def _check_range(where: str, spec: Input) -> None:
    least, most = -math.inf if spec.least is None else spec.least, math.inf if spec.most is None else spec.most
    if (least, most) != (-math.inf, math.inf) and (spec.shape or spec.choices):
        raise BundleError(f"{where}: only a single number without choices has a range; remove least and most")
    if least > most:
        raise BundleError(f"{where}: least {least:g} is above most {most:g}; exchange them")
    if isinstance(spec.default, int | float) and not least <= spec.default <= most:
        raise BundleError(f"{where}: default {_plain(spec.default)} is not {argument_of(spec).takes}")
