"""The arguments of a command that runs a bundle: where it is, and the arguments that it has of its own."""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tilewright.cli.terminal import expect_argument
from tilewright.runtime.bundle.arguments import Argument, flag
from tilewright.runtime.bundle.program import Input
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import UsageError
from tilewright.runtime.inputs import checked

__all__ = ["LISTED", "bundle_arguments", "own_arguments", "own_values"]

LISTED = "A bundle has arguments of its own: --bundle DIR --help lists them."
METAVARS = {"words": "WORDS", "tensors": "FILE", "number": "NUMBER", "integer": "INTEGER"}


def bundle_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --bundle, and the options of its tiles."""
    parser.add_argument("--bundle", type=Path, required=required, metavar="DIR")
    expect_argument(parser)
    parser.add_argument(
        "--tile", type=int, metavar="PX", help="side of a tile in output pixels, instead of the bundle's"
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PX", help="pixels that two neighbouring tiles share, instead of the bundle's"
    )


class _Once(argparse.Action):
    """An argument of the bundle, which may be given once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if hasattr(namespace, self.dest):
            raise UsageError(f"{option_string} is given twice; give it once")
        setattr(namespace, self.dest, values)


def own_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Read the bundle that the command names, by --bundle or as a word, and add its arguments to the parser."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--bundle", nargs="?")
    reader.add_argument("--expect", nargs="?")
    named = reader.parse_known_args([*words])[0]
    root = named.bundle or next((word for word in words if (Path(word) / "bundle.json").is_file()), None)
    if root is None:
        return
    bundle = read_bundle(root, expect=named.expect)
    system = bundle.manifest.system
    group = parser.add_argument_group(f"arguments of this bundle ({system})", None if bundle.arguments else "none")
    for name, argument in bundle.arguments.items():
        group.add_argument(
            flag(name),
            action=_Once,
            dest=f"${name}",  # so that it cannot be one of ours
            type=_converter(name, bundle.program.inputs.get(name)),
            metavar=METAVARS.get(argument.kind) or f"{{{','.join(argument.choices)}}}",
            default=argparse.SUPPRESS,
            help=_help(argument).replace("%", "%%"),
        )
    flags = ", ".join(map(flag, bundle.arguments)) or "no arguments of its own"
    parser.set_defaults(opened=bundle, takes=f"this bundle takes {flags}")
    parser.epilog = None


def _converter(name: str, spec: Input | None) -> Callable[[str], Any]:
    """A function that converts a word of the command line into a value; texts and files stay as they are."""

    def convert(word: str) -> Any:
        if spec is None:
            return word
        value: Any = word
        if not spec.choices:
            with contextlib.suppress(ValueError):
                value = float(word) if "float" in spec.dtype else int(word)
        checked(flag(name), f"{flag(name)} {word!r}", spec, value)
        return value

    return convert


def _help(argument: Argument) -> str:
    ranged = "" if argument.least is argument.most is None else f"; {argument.takes}"
    return f"{argument.help}{ranged} ({argument.otherwise})"


def own_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of the bundle's arguments."""
    values = {name[1:]: value for name, value in vars(arguments).items() if name.startswith("$")}
    listed = arguments.opened.arguments
    from_file = any(listed[name].kind == "tensors" for name in values)
    for name, argument in listed.items():
        if argument.needed and name not in values and not from_file:
            raise UsageError(f"{flag(name)} has no default; give it: {argument.help or argument.takes}")
    return values
