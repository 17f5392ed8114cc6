"""Restore a picture that does not fit in a memory limit: the peak of the process, and what stops and resuming change.

The picture is made strip by strip, so that this process stays small. `--kills` ends the command with SIGKILL so many
times, at equal shares of the work, and resumes it. Prints JSON.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tilewright.runtime.images.vips import write_large
from tilewright.runtime.memory.machine import bytes_of
from tilewright.runtime.resume.checkpoint import share_in


def draw(path: Path, width: int, height: int) -> None:
    """Write soft shapes with some noise."""
    x = np.arange(width, dtype=np.float32)[None, :, None]
    channel = np.arange(3, dtype=np.float32)[None, None]

    def rows(top: int, bottom: int) -> np.ndarray:
        y = np.arange(top, bottom, dtype=np.float32)[:, None, None]
        noise = np.random.Generator(np.random.Philox(key=top)).integers(0, 16, (bottom - top, width, 3))
        return (110 + 70 * np.sin(x / 97 + channel) * np.cos(y / 61) + noise).astype(np.uint8)

    write_large(path, (height, width, 3), np.uint8, rows, kept={})


def command(arguments: argparse.Namespace, source: Path, target: Path, *more: str) -> list[str]:
    """The command that restores the picture."""
    words = [sys.executable, "-m", "tilewright", "runtime", "restore", source, target, "--bundle", arguments.bundle]
    words += ["--memory-limit", arguments.limit, "--devices", arguments.devices, "--threads", arguments.threads]
    steps = [] if arguments.steps is None else ["--steps", arguments.steps]
    return [str(word) for word in (*words, *steps, "-q", *more)]


def ran(words: list[str], until: float | None = None, file: Path | None = None) -> tuple[int, int]:
    """Run the command, or kill it once the file of finished parts holds a share; its code and its peak in bytes."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while until is not None and file is not None and process.poll() is None:
        if (share_in(file) or 0) >= until:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.2)
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path, help="for the pictures")
    parser.add_argument("--source", default="8192x8192")
    parser.add_argument("--limit", default="1GiB")
    parser.add_argument("--devices", default="cpu:0")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--steps")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--checkpoint", default="0.05", help="minutes")
    parser.add_argument("--compare", action="store_true", help="with a run that was not killed")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    width, height = map(int, arguments.source.split("x"))
    source, target = arguments.folder / "in.tif", arguments.folder / "out.tif"
    draw(source, width, height)
    begun, peaks = time.perf_counter(), []
    for kill in range(1, arguments.kills + 1):
        words = command(arguments, source, target, "--checkpoint", arguments.checkpoint, "--resume")
        code, peak = ran(words, kill / (arguments.kills + 1), target.with_name("out.tif.resume"))
        assert code == -signal.SIGKILL, code
        peaks.append(peak)
    code, peak = ran(command(arguments, source, target, *(["--resume"] if arguments.kills else [])))
    assert code == 0, code
    peaks.append(peak)
    report = {
        "source": arguments.source,
        "limit_bytes": bytes_of(arguments.limit),
        "peak_bytes": max(peaks),
        "seconds": time.perf_counter() - begun,
        "kills": arguments.kills,
        "devices": arguments.devices,
        "file_bytes": target.stat().st_size,
        "sha256": digest(target),
    }
    if arguments.compare:
        other = arguments.folder / "other.tif"
        code, _ = ran(command(arguments, source, other))
        assert code == 0, code
        report["same_bytes"] = digest(other) == report["sha256"]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
