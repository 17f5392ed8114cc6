"""Stand-ins for published weights: files with every name, shape and type, and zeros that use no disk space."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilewright.export.system import System
from tilewright.export.weights.files import STAND_IN
from tilewright.export.weights.writing import write_tensors
from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.errors import UsageError

__all__ = ["stand_in"]


def stand_in(
    system: System, out: Path, on_file: Callable[[str, int, int], None] = lambda what, done, total: None
) -> dict[str, Any]:
    """Write every file that a system of full size needs into a new folder; returns counts of files and bytes."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty; choose another -o")
    tensors = 0
    make = system.stand_in
    if make is None:
        raise UsageError(f"{system.name}: has no published files to stand in for; give weights of your own")
    files = make()
    try:
        for done, (file, content) in enumerate(files.items()):
            on_file("files", done, len(files))
            if isinstance(content, str):
                with writing(out / file) as temporary:
                    temporary.write_text(content, encoding="utf-8")
                continue
            write_tensors(out / file, dict(sorted(content.items())), (), STAND_IN)
            tensors += len(content)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # it was empty before
        raise
    return {
        "folder": str(out),
        "files": sorted(files),
        "tensors": tensors,
        "apparent_bytes": sum((out / file).stat().st_size for file in files),
        "disk_bytes": sum((out / file).stat().st_blocks * 512 for file in files),
    }
