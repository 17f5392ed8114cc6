"""The cache of builds: one directory for each result, filled by one process at a time and visible when complete.

Locks are file locks of the system, so a killed process holds none. They work between threads, processes and
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
except ImportError:  # on Windows two builds must not share a cache
    fcntl = None  # type: ignore[assignment]

__all__ = ["Stage", "filling", "staging", "sweep", "write"]


@dataclass(frozen=True)
class Stage:
    """A step of a build: its inputs, and the work that fills its directory."""

    name: str
    inputs: dict[str, str]
    work: Callable[[Path], None] = field(compare=False)

    @property
    def key(self) -> str:
        """The digest of the inputs."""
        return sha256_of_bytes(json.dumps([self.name, self.inputs], sort_keys=True).encode())

    @property
    def directory(self) -> Path:
        """The directory of its results; it exists when the stage is finished."""
        return cache_dir() / "build" / self.name / self.key[:32]


def write(path: Path, text: str) -> None:
    """Write a text into a file, completely or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def filling(directory: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path | None]:
    """A folder to fill, which becomes this directory on success. None if the directory exists already."""
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
    """A sibling directory to fill. Siblings that killed builds left behind are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, f".{target.name}.*.part")
    folder, lock = _new_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(parent: Path, pattern: str) -> None:
    """Remove folders that killed builds left behind. Folders of running builds are locked and stay."""
    for leftover in parent.glob(pattern):
        if (lock := _take(leftover)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)


def _new_folder(target: Path) -> tuple[Path, int]:
    """A new folder, and the lock on it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        if (lock := _take(folder)) is not None:  # none if another build has just removed it as a leftover
            folder.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
            return folder, lock


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file, which is removed at the end."""
    waits = False
    path.touch()
    while (lock := _take(path)) is None:
        if not waits:
            on_wait()
            waits = True
        _wait_for(path)
        path.touch()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _wait_for(path: Path) -> None:
    """Wait until no process holds the lock of a file."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)


def _take(path: Path) -> int | None:
    """The descriptor that holds the lock of a file or folder. None if another process holds it, or if it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None
