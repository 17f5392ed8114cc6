"""The groups of verbs, and what their words call."""

import argparse
from typing import Any, NoReturn

from tilewright.cli import export, kernels, runtime
from tilewright.runtime.errors import UsageError

__all__ = ["parser", "run"]

GROUPS = {
    "export": (export, "build, inspect and verify bundles"),
    "runtime": (runtime, "restore images with a bundle"),
    "kernels": (kernels, "list, check and time the ops"),
}

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


def parser() -> argparse.ArgumentParser:
    """Every group and verb."""
    root = _Parser(prog="tilewright", description=__doc__, epilog=EXIT_CODES)
    groups = root.add_subparsers(metavar="GROUP", required=True)
    for name, (group, summary) in GROUPS.items():
        verbs = groups.add_parser(name, help=summary, epilog=EXIT_CODES)
        group.add_verbs(verbs.add_subparsers(metavar="VERB", required=True))
    return root


def run(words: list[str]) -> None:
    """Do what the words of a command say."""
    arguments, extra = parser().parse_known_args(words)
    if extra:
        raise UsageError(f"unknown argument {extra[0]!r}; {getattr(arguments, 'takes', 'see --help')}")
    arguments.run(arguments)
