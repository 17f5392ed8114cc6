"""Commands that must fail."""

from pathlib import Path

import pytest

from tilewright.cli.main import main

__all__ = ["refused"]


def refused(capsys: pytest.CaptureFixture[str], code: int, part: str, *words: str) -> None:
    """A command must fail with this code and one line of error, and leave nothing in the folder it runs in."""
    before = sorted(Path().iterdir())
    capsys.readouterr()
    assert main(list(words)) == code
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("tilewright: "))
    assert part in line and len(line) < 700, line
    assert not any(line.startswith("trace ") for line in lines)  # nothing was traced before
    assert sorted(Path().iterdir()) == before
