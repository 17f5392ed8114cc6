"""SHA-256 of files, remembered by size, modification time and inode, so that gigabytes are read once."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cache_dir", "sha256_of_bytes", "sha256_of_file", "writing"]

ZEROS = bytes(1 << 20)  # also how much is read at a time


def cache_dir() -> Path:
    """Where builds and digests are kept: TILEWRIGHT_CACHE_DIR, else tilewright under XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("TILEWRIGHT_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilewright"


def sha256_of_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, from memory of an earlier reading if it has not changed since."""
    status = path.stat()
    seen = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
    note = cache_dir() / "digests" / sha256_of_bytes(json.dumps(seen).encode())
    with contextlib.suppress(OSError, ValueError):
        remembered = note.read_text("ascii")
        if re.fullmatch("[0-9a-f]{64}", remembered):
            return remembered
    digest = _sha256(path)
    with contextlib.suppress(OSError), writing(note) as temporary:
        temporary.write_text(digest)
    return digest


def _sha256(path: Path) -> str:
    """By reading; where a sparse file has a hole, its zeros are not fetched from the system."""
    digest, at, end = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb", buffering=0) as file:
        while at < end:
            start = min(end, _next_data(file.fileno(), at, end))
            for hole in range(at, start, len(ZEROS)):
                digest.update(ZEROS[: start - hole])
            file.seek(start)
            block = file.read(len(ZEROS))
            digest.update(block)
            at = start + len(block)
            if not block:
                break
    return digest.hexdigest()


def _next_data(descriptor: int, at: int, end: int) -> int:
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:  # no data from here on, or a system that cannot tell
        return end if error.errno == errno.ENXIO else at


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` on success and is removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
