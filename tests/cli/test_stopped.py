"""A signal ends a restoration in the middle of a call of ONNX Runtime, for one image and for a folder."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from support.endless import endless_bundle


def threads_of(process: subprocess.Popen[str]) -> int:
    """The threads of a process that work on a call: those of its device run, and the others wait."""
    return sum(" R " in stat.read_text() for stat in Path(f"/proc/{process.pid}/task").glob("*/stat") if stat.exists())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells which threads work")
@pytest.mark.parametrize("what", ["image", pytest.param("folder", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_an_endless_call(staged, tmp_path: Path, monkeypatch, what, number, code) -> None:
    monkeypatch.chdir(tmp_path)
    endless_bundle(staged, Path("b"))
    Path("in").mkdir()
    Image.new("RGB", (20, 20)).save("in/1.png")
    source, target = ("in/1.png", "out.png") if what == "image" else ("in", "out")
    words = ["runtime", "restore", source, target, "--bundle", "b", "--threads", "1", "-q"]
    command = [sys.executable, "-m", "tilewright", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        working = 0
        while working < 40 and running.poll() is None:  # one after another: the command is in its call
            working = working + 1 if threads_of(running) else 0
            time.sleep(0.05)
        running.send_signal(number)
        said = running.communicate(timeout=60)[1]
    assert running.returncode == code, said
    assert said.startswith("tilewright: interrupted" if code == 130 else "tilewright: terminated")
    assert said.count("\n") == 1 and not Path("out.png").exists()
