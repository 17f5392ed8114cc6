"""A process that is told to stop while it writes leaves no temporary file, and no half of one."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilewright.runtime.images.read import read_image

TOLD = """
import signal, sys
from pathlib import Path
import numpy as np
from tilewright.runtime.images.write import write_image
from tilewright.runtime.bundle.digests import writing

class Stopped(BaseException):
    pass

def stop(number, frame):
    raise Stopped

signal.signal(signal.SIGTERM, stop)
folder, pixels = Path(sys.argv[1]), np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)

def picture():
    write_image(folder / "out.png", pixels)

def text():
    with writing(folder / "out.txt") as temporary, temporary.open("w") as file:
        for line in range(100_000):
            print(line, file=file)

write = {"picture": picture, "text": text}[sys.argv[2]]
write()  # it imports modules, and Python loses the exception of a signal that comes while it frees a lock of an import
print("ready", flush=True)
while True:
    write()
"""


@pytest.mark.parametrize("kind", ["picture", "text"])
@pytest.mark.parametrize("after", [0.02, 0.05, 0.11])
def test_what_is_being_written_when_the_signal_comes_leaves_nothing(tmp_path: Path, kind: str, after: float) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TOLD, str(tmp_path), kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None and running.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30
        while not any(path.name.startswith(".") for path in tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(after)
        running.send_signal(signal.SIGTERM)
        try:
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert "Stopped" in said
    assert {path.name for path in tmp_path.iterdir()} <= {"out.png", "out.txt"}
    if (tmp_path / "out.png").exists():
        assert read_image(tmp_path / "out.png").rgb.shape == (1500, 1500, 3)
    if (tmp_path / "out.txt").exists():
        assert (tmp_path / "out.txt").read_text().endswith("99999\n")
