"""SHA-256 of files, remembered by size, inode and times, so that gigabytes are read once.

The time of modification can be set back, that of the last change cannot.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from tilewright.runtime.errors import EnvironmentMismatch

__all__ = ["cache_dir", "next_data", "remembered_sha256", "sha256_of_bytes", "sha256_of_file", "writing"]

ZEROS = bytes(1 << 20)  # also how much is read at a time


def cache_dir() -> Path:
    """Where builds and digests are kept: TILEWRIGHT_CACHE_DIR, else tilewright under XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("TILEWRIGHT_CACHE_DIR"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "tilewright"
    try:
        return Path.home() / ".cache" / "tilewright"
    except RuntimeError:
        raise EnvironmentMismatch("HOME is not set and this user has no home; set TILEWRIGHT_CACHE_DIR") from None


def sha256_of_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(
    path: Path, *, fresh: bool = False, on_read: Callable[[int, int], None] = lambda done, total: None
) -> str:
    """Hexadecimal SHA-256 of a file, from memory of an earlier reading if it has not changed since; or read `fresh`."""
    if not fresh and (remembered := remembered_sha256(path)):
        return remembered
    seen = _seen(path)
    digest = _sha256(path, on_read)
    note = _note(seen)
    if note and _seen(path) == seen:  # what changed while it was read has another digest by now
        with contextlib.suppress(OSError), writing(note) as temporary:
            temporary.write_text(digest)
    return digest


def remembered_sha256(path: Path) -> str | None:
    """The digest of an earlier reading, if the file has not changed since."""
    if note := _note(_seen(path)):
        with contextlib.suppress(OSError, ValueError):
            remembered = note.read_text("ascii")
            if re.fullmatch("[0-9a-f]{64}", remembered):
                return remembered
    return None


def _note(seen: list[str | int]) -> Path | None:
    """Where a file's digest is remembered; without a home there is no memory."""
    try:
        return cache_dir() / "digests" / sha256_of_bytes(json.dumps(seen).encode())
    except EnvironmentMismatch:
        return None


def _seen(path: Path) -> list[str | int]:
    """What tells a file from any other and from itself after a change."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _sha256(path: Path, on_read: Callable[[int, int], None]) -> str:
    """By reading; where a sparse file has a hole, its zeros are not fetched from the system."""
    digest, at, end = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb", buffering=0) as file:
        while at < end:
            start = min(end, next_data(file.fileno(), at, end))
            for hole in range(at, start, len(ZEROS)):
                digest.update(ZEROS[: start - hole])
            file.seek(start)
            block = file.read(len(ZEROS))
            digest.update(block)
            at = start + len(block)
            on_read(at, end)
            if not block:
                break
    return digest.hexdigest()


def next_data(descriptor: int, at: int, end: int) -> int:
    """Where a file has data from there on; a hole reads as zeros."""
    if not hasattr(os, "SEEK_DATA"):  # Windows
        return at
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:  # no data from here on, or a system that cannot tell
        return end if error.errno == errno.ENXIO else at


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` on success and is removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")  # no other thread's
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # of a write, which does not know where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
