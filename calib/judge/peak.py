"""The most memory that a process needs to restore a picture with one engine. Each engine has a process of its own."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from tilewright.runtime.errors import ResourceError

__all__ = ["peak_of"]


def peak_of(root: Path, engine: str, picture: Path, load: dict[str, Any], restore: dict[str, Any]) -> int:
    """The bytes that a new process needs at most. `load` and `restore`: options of these functions."""
    asked = pickle.dumps((str(root), engine, str(picture), load, restore))
    ran = subprocess.run([sys.executable, "-m", __name__], input=asked, capture_output=True, check=False)
    if ran.returncode:
        said = ran.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"it ended with {ran.returncode}"]
        raise ResourceError(f"{engine}: the process that measures its memory failed: {said[0]}")
    return int(json.loads(ran.stdout))


def _measure() -> None:
    from tilewright.runtime.memory.machine import peak_bytes
    from tilewright.runtime.restore import load

    root, engine, picture, options, restore = pickle.load(sys.stdin.buffer)
    with load(root, engine=engine, **options) as restorer:
        restorer(picture, **restore)
    print(json.dumps(peak_bytes()))


if __name__ == "__main__":
    _measure()
