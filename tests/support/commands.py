"""Commands of ours, run in this process: a process of their own takes as long as many tests do."""

import io
import os
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from tilewright.cli.main import main

__all__ = ["refused", "told"]


def told(*words: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command, and return what it answers; notes and log lines are only shown by a process of its own."""
    here, typed = Path.cwd(), [*map(str, words)]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            os.chdir(cwd or here)
            with mock.patch.dict(os.environ, environment):
                code = main(typed)
        except SystemExit as ended:  # of --help and --version
            code = int(ended.code or 0)
        finally:
            os.chdir(here)
    return subprocess.CompletedProcess(typed, code, out.getvalue(), err.getvalue())


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
