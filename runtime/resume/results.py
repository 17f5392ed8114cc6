"""The list of the results in a folder: of which image each is, and of which arguments."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.opening import only_files
from tilewright.runtime.resume.checkpoint import require_same

__all__ = ["Results"]


class Results:
    """A file with a line of JSON for each result, written as soon as the result is. A later line replaces an earlier.

    A result is of this job if its line names the same image and the same arguments, and its file has not changed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "finished.resume"
        self.lock = Lock()

    def read(self) -> dict[str, dict[str, Any]]:
        """Name of a result -> its line, for results whose files have not changed."""
        lines: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError):
            with open(self.path, "rb", opener=only_files) as file:
                texts = file.read().splitlines()
            for text in texts:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # a line that was cut short
                    line = json.loads(text)
                    lines[Path(line["result"]).name] = line
        return {name: line for name, line in lines.items() if line.get("file") == _identity(self.path.parent / name)}

    def holds(self, line: Mapping[str, Any] | None, source: Path) -> bool:
        """Whether a line is of this image."""
        try:
            return line is not None and line.get("image") == sha256_of_file(source, remember=False)
        except OSError:
            return False

    def require_same(self, line: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        """Refuse a line of other arguments."""
        require_same(self.path, line.get("asked", {}), asked)

    def add(self, target: Path, source: Path, asked: Mapping[str, Any]) -> None:
        """Add a result. Without its line, it would only be made again."""
        with self.lock, contextlib.suppress(OSError):
            image = sha256_of_file(source, remember=False)
            line = {"result": target.name, "file": _identity(target), "image": image, "asked": asked}
            with open(self.path, "a", encoding="ascii", opener=only_files) as file:
                file.write("\n" * self._cut_short() + json.dumps(line) + "\n")

    def _cut_short(self) -> bool:
        """Whether the last line has no end."""
        with self.path.open("rb") as file:
            return bool(file.seek(0, 2)) and (file.seek(-1, 2), file.read())[1] != b"\n"

    def remove(self) -> None:
        """Remove the list."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def _identity(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
