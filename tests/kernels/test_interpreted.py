"""The kernels themselves, interpreted in a process of their own; the tests are in `interpreted`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.slow
def test_kernels_do_what_the_textbook_says():
    pytest.importorskip("triton", reason="kernels are interpreted by Triton, which is not installed")
    # Triton decides when it is imported whether it interprets, and an address out of bounds ends the process
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    done = subprocess.run(words, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
