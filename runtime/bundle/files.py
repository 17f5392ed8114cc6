"""Checking the files of a bundle: they lie inside it, are complete, and have not changed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.manifest import File, OlderSchema
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import BundleError

__all__ = ["bytes_of", "check_files", "check_inside", "is_file", "refusals_in_one_line"]


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Shorten a refusal to one printable line, whatever text of a document it contains."""
    try:
        yield
    except OlderSchema:
        raise
    except BundleError as error:
        raise BundleError(one_line(str(error))) from None


def check_inside(root: Path, name: str, where: str) -> None:
    """Refuse a name that is no plain relative path, and a link that leads out of the bundle."""
    path = PurePosixPath(name)
    odd = "\\" in name or not name.isprintable()
    if path.is_absolute() or ".." in path.parts or odd or str(path) != name or name == ".":
        raise BundleError(f"{where}: path {name!r} is not a plain relative POSIX path; rebuild the bundle")
    try:
        inside = (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):
        inside = False
    if not inside:
        raise BundleError(f"{where}: {name!r} leaves the bundle through a link; copy the bundle with its files")


@refusals_in_one_line()
def check_files(root: Path, files: dict[str, File], remedy: str, fresh: bool) -> None:
    """Refuse files that are missing, or whose size or digest differs from the sealed one."""
    for name, file in files.items():
        path = root / name
        if not is_file(path):
            raise BundleError(f"{path}: missing; {remedy}")
        try:
            if (size := path.stat().st_size) != file.size:
                raise BundleError(f"{path}: {size} bytes, sealed with {file.size}; {remedy}")
            if sha256_of_file(path, fresh=fresh) != file.sha256:
                raise BundleError(f"{path}: SHA-256 differs from the sealed {file.sha256[:12]}...; {remedy}")
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}; {remedy}") from None


def is_file(path: Path) -> bool:
    """Whether a file exists. Unlike `Path.is_file`, this does not fail for a name that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def bytes_of(path: Path) -> bytes:
    """The bytes of a sealed file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; rebuild the bundle") from None
