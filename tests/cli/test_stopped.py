"""A signal ends a restoration in the middle of a call of ONNX Runtime, for one image and for a folder."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from support.endless import endless_bundle
from support.forked import Forked


def threads_of(process: subprocess.Popen[str]) -> int:
    """The threads of a process that work on a call: those of its device run, and the others wait."""
    return sum(" R " in stat.read_text() for stat in Path(f"/proc/{process.pid}/task").glob("*/stat") if stat.exists())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells which threads work")
@pytest.mark.parametrize("what", ["image", pytest.param("folder", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_an_endless_call(tmp_path: Path, monkeypatch, what, number, code) -> None:
    monkeypatch.chdir(tmp_path)
    endless_bundle(Path("b"))
    Path("in").mkdir()
    Image.new("RGB", (20, 20)).save("in/1.png")
    source, target = ("in/1.png", "out.png") if what == "image" else ("in", "out")
    words = ["runtime", "restore", source, target, "--bundle", "b", "--threads", "1", "-q"]
    with Forked(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        working, deadline = 0, time.monotonic() + 120
        # one after another: the command is in its call
        while working < 40 and running.poll() is None and time.monotonic() < deadline:
            working = working + 1 if threads_of(running) else 0
            time.sleep(0.05)
        running.send_signal(number)
        said = running.communicate(timeout=60)[1]
    assert running.returncode == code, said
    assert said.startswith("tilewright: interrupted" if code == 130 else "tilewright: terminated")
    assert said.count("\n") == 1 and not Path("out.png").exists()


LIBRARY = """
import logging, os, signal, sys, time
from tilewright.cli import main

def run(words):
    library = logging.getLogger("library")
    library.addHandler(logging.StreamHandler())
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt:
        library.exception("what a library says of an exception")
        raise

main._run = run
sys.exit(main.main())
"""


@pytest.mark.parametrize("words", [(), ("--verbose",)])
def test_what_a_library_logs_of_a_signal_is_shown_only_when_asked_for(words) -> None:
    ended = subprocess.run([sys.executable, "-c", LIBRARY, *words], capture_output=True, text=True)
    assert ended.returncode == 143
    assert ended.stderr.splitlines()[-1] == "tilewright: terminated"
    assert ("what a library says" in ended.stderr) == bool(words)
    assert len(ended.stderr.splitlines()) == 1 or words


FREED = """
import os, signal, sys, time
from tilewright.cli import main

class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def run(words):
    Freed()
    time.sleep(60)

main._run = run
sys.exit(main.main())
"""


def test_a_signal_that_comes_while_an_object_is_freed_ends_the_command() -> None:
    ended = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (143, "tilewright: terminated\n")
