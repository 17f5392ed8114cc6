"""Bundles of engines that restore images of any size: build them, restore with them, check what they run on."""

import argparse
import importlib
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from tilewright.runtime.errors import UsageError

__all__ = ["GROUPS", "parse", "parser", "within"]

GROUPS = {  # name -> the module that adds its verbs, which are they
    "export": ("tilewright.cli.export", "build, inspect and verify bundles"),
    "runtime": ("tilewright.cli.runtime", "restore images with a bundle"),
    "kernels": ("tilewright.cli.kernels", "list, check and time the ops"),
}
COMPLETION = "completion"
SHELLS = ("bash", "zsh", "fish")

EXIT_CODES = """exit codes: 0 ok, 1 internal error, 2 usage, 3 bundle invalid, 4 missing dependency or environment
mismatch, 5 not enough memory or disk, 6 build failed, 7 accuracy gate, 8 bad input image or weights,
130 interrupted, 143 terminated"""


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as everything here does; a bundle's own arguments are no abbreviations of ours."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, after a verb has added the arguments that depend on its words."""
        if args is not None and (add := self.get_default("more_arguments")):
            add(self, args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from tilewright import runtime

        print(f"tilewright {runtime.__version__}", flush=True)
        parser.exit()


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for these words: every group, the verbs of the group that they name, its arguments."""
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
    """What the words of a command say, checked; its `run` does it."""
    root = parser(words)
    arguments, extra = root.parse_known_args(words)
    if extra:
        options = [name for action in within(root, words)._actions for name in action.option_strings]
        takes = getattr(arguments, "takes", f"see tilewright {' '.join(words[:2])} --help")
        raise UsageError(f"unknown argument {extra[0]!r}{_did_you_mean(extra[0], options)}; {takes}")
    return arguments


def within(root: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser that the words lead to: a group's, then a verb's."""
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
