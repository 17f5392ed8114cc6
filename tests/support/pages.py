"""The commands and flags of a page of documentation."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from tilewright.cli.main import main
from tilewright.runtime.bundle.program import Program

__all__ = ["assert_flags_exist", "page", "run_commands"]

DOCS = Path(__file__).parents[2] / "docs"


def page(name: str) -> str:
    """The text of a page."""
    return (DOCS / f"{name}.md").read_text()


def run_commands(text: str, more: Mapping[str, tuple[str, ...]] | None = None) -> int:
    """Run a page's commands, with more words behind a verb's; how many commands there are."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    for line in lines:
        words = shlex.split(line)[1:]
        assert main([*words, *(more or {}).get(words[1], ())]) == 0, line
    return len(lines)


def assert_flags_exist(text: str, program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that a page names is one of the build, of a restoration, or of the system's program."""
    capsys.readouterr()
    for command in (["export", "build", "--help"], ["runtime", "restore", "--help"]):
        with pytest.raises(SystemExit):
            main(command)
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    known |= {f"--{name.replace('_', '-')}" for name in (*program.inputs, *program.texts, *program.files)}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known
