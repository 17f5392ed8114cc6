"""A folder that a command writes for other tools: new or empty before, and complete or absent after."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tilewright.export.build.cache import staging
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import ResourceError, UsageError, amount

__all__ = ["new_folder"]


@contextlib.contextmanager
def new_folder(out: Path, size: int) -> Iterator[Path]:
    """A folder to fill with so many bytes, which becomes `out` if the block ends well."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"-o {one_line(str(out))} is not an empty folder; choose another")
    free = shutil.disk_usage(next(p for p in out.absolute().parents if p.exists())).free
    if size > free:
        raise ResourceError(f"-o {out}: needs {amount(size)}, {amount(free)} are free; make room")
    with staging(out) as folder:
        yield folder
        folder.rename(out)
