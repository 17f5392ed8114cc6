"""The pages of documentation: their commands, and the options that they name.

A block of commands runs in a test, one line after the other, unless a mark behind `sh` says why it cannot.
"""

import contextlib
import io
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tilewright.cli.main import main
from tilewright.runtime.bundle.program import Program

__all__ = [
    "MARKS",
    "OPTION",
    "ROOT",
    "Block",
    "all_options",
    "assert_flags_exist",
    "blocks",
    "commands",
    "help_of",
    "options_of",
    "page",
    "run_commands",
    "verbs_of",
]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MARKS = {"needs-network": "downloads or installs", "needs-minutes": "takes longer than a test may"}
MARKS |= {"needs-docker": "needs Docker"}
MARKS |= {"serves": "runs until it is stopped; tests/runtime/serve/test_docs.py runs the page"}
MARKS |= {"needs-gpu": "needs an NVIDIA GPU and TensorRT", "needs-cluster": "needs a Ray cluster"}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    language: str
    mark: str  # one of MARKS, or nothing: it runs
    text: str

    @property
    def lines(self) -> list[str]:
        """Its commands, without comments; continued lines are one."""
        lines = (re.sub(r"(^|\s)#.*", "", line).rstrip() for line in self.text.replace("\\\n", " ").splitlines())
        return [line for line in lines if line]


def page(name: str) -> str:
    """The text of a page."""
    return (DOCS / f"{name}.md").read_text()


def blocks(text: str, *languages: str) -> list[Block]:
    """The blocks in these languages, in order."""
    found = re.findall(r"^```(\w+)[ ]*([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in found if block[0] in languages]


def commands(text: str) -> list[str]:
    """The commands of a page that run."""
    return [line for block in blocks(text, "sh") if not block.mark for line in block.lines]


def run_commands(text: str, more: Mapping[str, tuple[str, ...]] | None = None) -> int:
    """Run a page's commands, with more words behind a verb's; how many commands there are."""
    lines = commands(text)
    for line in lines:
        words = shlex.split(line)[1:]
        assert main([*words, *(more or {}).get(words[1], ())]) == 0, line
    return len(lines)


@cache
def help_of(*words: str) -> str:
    """What a command says with --help."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            code = main([*words, "--help"])
        except SystemExit as ended:
            code = ended.code
    assert not code, f"tilewright {' '.join(words)} --help ends with {code}"
    return said.getvalue()


def verbs_of(group: str) -> list[str]:
    """The verbs of a group, as its help lists them."""
    listed = re.findall(r"^    ([a-z][a-z-]*)(?:\s|$)", help_of(group), re.MULTILINE)
    assert listed, help_of(group)
    return listed


def options_of(*words: str) -> set[str]:
    """The options of a command."""
    return set(OPTION.findall(help_of(*words)))


def all_options() -> set[str]:
    """The options of every command."""
    groups = ("export", "runtime", "calib", "kernels")
    return options_of().union(*(options_of(group, verb) for group in groups for verb in verbs_of(group)))


def assert_flags_exist(text: str, *programs: Program) -> None:
    """Every option that a page names is one of a command, or of a bundle with one of these programs."""
    bundles = {
        f"--{name.replace('_', '-')}" for p in programs for names in (p.inputs, p.texts, p.files) for name in names
    }
    for block in blocks(text, "sh"):
        if block.mark in ("needs-network", "needs-docker"):  # other tools' commands
            text = text.replace(block.text, "")
    assert set(OPTION.findall(text)) <= all_options() | bundles
