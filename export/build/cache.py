"""The cache of builds: a directory for every result, filled by one process at a time, complete when it is there.

Locks are files that the system locks, so a killed process holds none. They work between threads, processes and
containers that share the folder.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tilewright.runtime.bundle.digests import cache_dir, sha256_of_bytes, writing

try:
    import fcntl
except ImportError:  # Windows, where two builds must not share a cache
    fcntl = None  # type: ignore[assignment]

__all__ = ["Stage", "filling", "staging", "sweep", "write"]


@dataclass(frozen=True)
class Stage:
    """A step of a build: what it depends on, and the work that fills its directory."""

    name: str
    inputs: dict[str, str]
    work: Callable[[Path], None] = field(compare=False)

    @property
    def key(self) -> str:
        """Digest of the inputs."""
        return sha256_of_bytes(json.dumps([self.name, self.inputs], sort_keys=True).encode())

    @property
    def directory(self) -> Path:
        """Where its results are, once they are."""
        return cache_dir() / "build" / self.name / self.key[:32]


def write(path: Path, text: str) -> None:
    """Put a text in a file, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def filling(directory: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path | None]:
    """A folder that becomes this directory on success; none where the directory is there, perhaps since now."""
    if directory.is_dir():
        yield None
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f".{directory.name}.lock"), on_wait):
        if directory.is_dir():  # another build was faster
            yield None
            return
        with staging(directory) as folder:
            yield folder
            folder.rename(directory)


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A sibling directory to fill. What killed builds left of such siblings is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, f".{target.name}.*.part")
    folder, lock = _new_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(parent: Path, pattern: str) -> None:
    """Remove what killed builds left; what a live build fills is locked, and stays."""
    for left in parent.glob(pattern):
        if (lock := _take(left, wait=False)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _new_folder(target: Path) -> tuple[Path, int]:
    """A folder that is ours alone, and the lock that says so."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        if (lock := _take(folder, wait=True)) is not None:  # none where it was taken for a left one in between
            folder.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner alone
            return folder, lock


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Alone with a lock file, which goes with its holder."""
    waits, lock = False, None
    while lock is None:
        path.touch()
        lock = _take(path, wait=waits)
        if lock is None and not waits:
            on_wait()
            waits = True
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _take(path: Path, *, wait: bool) -> int | None:
    """The descriptor that holds the lock of a file or folder; none where another holds it, or where it has gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
