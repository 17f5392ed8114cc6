"""SHA-256 of files. Digests are remembered by path, size, inode and times, so that gigabytes are read once.

The time of the last change (ctime) counts too, because the time of modification can be set back.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tilewright.runtime.bundle.opening import not_a_file, only_files
from tilewright.runtime.errors import EnvironmentMismatch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["cache_dir", "identity_of", "next_data", "remembered_sha256", "sha256_of_bytes", "sha256_of_file", "writing"]

ZEROS = bytes(1 << 20)  # its length is also the size of one read


def cache_dir() -> Path:
    """The folder of builds and digests: TILEWRIGHT_CACHE_DIR, or tilewright under XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("TILEWRIGHT_CACHE_DIR"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "tilewright"
    try:
        return Path.home() / ".cache" / "tilewright"
    except RuntimeError:
        raise EnvironmentMismatch("HOME is not set and this user has no home; set TILEWRIGHT_CACHE_DIR") from None


def sha256_of_bytes(data: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(
    path: Path,
    *,
    fresh: bool = False,
    remember: bool = True,
    on_read: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """The SHA-256 of a file, in hexadecimal. It is remembered while the file does not change, except with `fresh`."""
    if not remember:
        return _sha256(path, on_read)
    if not fresh and (remembered := remembered_sha256(path)):
        return remembered
    identity = identity_of(path)
    digest = _sha256(path, on_read)
    note = _note(identity)
    if note and identity_of(path) == identity:  # a file that changed while it was read is not remembered
        with contextlib.suppress(OSError), writing(note) as temporary:
            temporary.write_text(digest)
    return digest


def remembered_sha256(path: Path) -> str | None:
    """The remembered digest of a file, if the file has not changed since."""
    if note := _note(identity_of(path)):
        with contextlib.suppress(OSError, ValueError):
            remembered = note.read_text("ascii")
            if re.fullmatch("[0-9a-f]{64}", remembered):
                return remembered
    return None


def _note(identity: tuple[str | int, ...]) -> Path | None:
    """The file that remembers a digest; none if the user has no home."""
    try:
        return cache_dir() / "digests" / sha256_of_bytes(json.dumps(identity).encode())
    except EnvironmentMismatch:
        return None


def identity_of(path: Path) -> tuple[str | int, ...]:
    """Values that differ between two files, and change when a file changes."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _sha256(path: Path, on_read: Callable[[int, int], None]) -> str:
    """The SHA-256 by reading the file. The zeros in holes of a sparse file are not read."""
    digest, at, end = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb", buffering=0, opener=only_files) as file:
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
    """The next place in a file with data, not in a hole."""
    if not hasattr(os, "SEEK_DATA"):  # Windows
        return at
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:  # there is no more data, or the file system does not know its holes
        return end if error.errno == errno.ENXIO else at


@contextlib.contextmanager
def writing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces `path` on success and is removed on failure.

    Its process holds a lock on it. A process that was killed leaves it; the next one that writes `path` removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path.is_file() or path.is_dir()):  # it would be replaced
        raise not_a_file(str(path))
    start = f".{sha256_of_bytes(os.fsencode(path.name))[:16]}."  # the name itself may be too long for more
    _remove_halves(path.parent, start)
    temporary = path.with_name(f"{start}{secrets.token_hex(8)}.part")  # a name that no other thread uses
    try:
        with _locked(temporary, mode):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # an error of a write does not name its file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _locked(path: Path, mode: int) -> BinaryIO:
    """A new file, whose lock this process holds while it is open."""
    while True:
        file = open(path, "xb", opener=partial(os.open, mode=mode))  # noqa: SIM115 - the caller closes it
        if fcntl is None:  # an open file of Windows cannot be renamed
            file.close()
            return file
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # otherwise another process has taken it for one that was left
            return file
        file.close()


def _remove_halves(folder: Path, start: str) -> None:
    """Remove temporary files of processes that were killed."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for half in list(folder.glob(f"{start}*.part")):
            with contextlib.suppress(OSError), half.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                half.unlink()
