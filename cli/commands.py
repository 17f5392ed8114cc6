"""Bundles of engines that restore images of any size: build them, restore with them, check what they run on."""

import argparse
import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from tilewright.runtime.errors import UsageError

__all__ = ["COMPLETION", "GROUPS", "SHELLS", "as_typed", "parse", "parser", "within"]

GROUPS = {  # name -> the module that adds its verbs, and its help
    "export": ("tilewright.cli.export", "build, inspect and verify bundles"),
    "runtime": ("tilewright.cli.runtime", "restore images with a bundle"),
    "calib": ("tilewright.cli.calib", "calibrate bundles for 8 bits: statistics of the numbers inside their networks"),
    "kernels": ("tilewright.cli.kernels", "list, check and time the ops"),
}
COMPLETION = "completion"
SHELLS = ("bash", "zsh", "fish")

EXIT_CODES = """exit codes: 0 ok, 1 internal error, 2 usage, 3 bundle invalid, 4 missing dependency or environment
mismatch, 5 not enough memory or disk, 6 build failed or lint finding, 7 accuracy gate, 8 bad input image or weights,
9 a device hangs, 130 interrupted, 143 terminated"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. It has no abbreviations, which a bundle's arguments could be mistaken for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse after the verb has added arguments that depend on the command's words."""
        if args is not None and (add := self.get_default("more_arguments")):
            add(self, args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Prints the version, and looks it up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"tilewright {version('tilewright')}", flush=True)
        parser.exit()


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for a command: all groups, and the verbs and arguments of the group that it names."""
    root = _Parser(prog="tilewright", description=__doc__, epilog=EXIT_CODES)
    root.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    groups = root.add_subparsers(metavar="GROUP", required=True)
    for name, (module, summary) in GROUPS.items():
        group = groups.add_parser(name, help=summary, description=summary, epilog=EXIT_CODES)
        if words[:1] == [name]:
            verbs = group.add_subparsers(metavar="VERB", required=True)
            importlib.import_module(module).add_verbs(verbs)
            _expect("verb", words[1:], verbs.choices)
    summary = "print a script that completes commands in a shell"
    completion = groups.add_parser(COMPLETION, help=summary, description=f"{summary}; see docs/command-line.md")
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=_complete)
    _expect("group", words, groups.choices)
    return root


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The checked arguments of a command. Their function `run` executes it."""
    root = parser(words)
    arguments, extra = root.parse_known_args(words)
    actions = [action for action in within(root, words)._actions if action.option_strings]
    if extra:
        near = _did_you_mean(extra[0], [name for action in actions for name in action.option_strings])
        takes = getattr(arguments, "takes", f"see tilewright {' '.join(words[:2])} --help")
        raise UsageError(f"unknown argument {extra[0]!r}{near}; {takes}")
    arguments.options = {action.dest.removeprefix("$"): action.option_strings[-1] for action in actions}
    return arguments


def as_typed(message: str, options: Mapping[str, str]) -> str:
    """A message of the library with arguments written as options of the command line: `tile=64` as `--tile 64`."""
    names = "|".join(map(re.escape, options))
    quoted_or_named = rf"'[^']*'|(?<![\w./-])({names})="  # text in quotes is the user's
    return re.sub(quoted_or_named, lambda m: f"{options[m[1]]} " if m[1] else m[0], message) if names else message


def within(root: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the group or verb that the words name."""
    for word in words[:2]:
        named = next((a.choices for a in root._actions if isinstance(a.choices, dict)), {})
        if word not in named:
            break
        root = named[word]
    return root


def _complete(arguments: argparse.Namespace) -> None:
    from tilewright.cli.completion import script

    print(script(arguments.shell), flush=True)


def _expect(what: str, words: Sequence[str], names: Collection[str]) -> None:
    if words and not words[0].startswith("-") and words[0] not in names:
        raise UsageError(f"{what} {words[0]!r} is not one of {', '.join(names)}{_did_you_mean(words[0], names)}")


def _did_you_mean(word: str, names: Collection[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, names, 1)
    return f"; did you mean {near[0]}?" if near else ""
