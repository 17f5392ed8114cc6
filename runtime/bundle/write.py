"""Writing a bundle: sealing its files, and putting the directory in its place in one step."""

import ctypes
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from tilewright.runtime.bundle.arguments import arguments_of
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.manifest import File, Manifest, named_files
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.strict import from_json, to_json
from tilewright.runtime.errors import UsageError

__all__ = ["check_replaceable", "seal", "write_manifest"]


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Add all files and the program's arguments to the manifest, and write it."""
    listed = [manifest.program, manifest.weights, *([manifest.constants] if manifest.constants else [])]
    listed += sorted(set(named_files(manifest)) - set(listed))
    files = {n: File((root / n).stat().st_size, sha256_of_file(root / n)) for n in listed}
    program = from_json(Program, (root / manifest.program).read_bytes(), str(root / manifest.program))
    complete = replace(manifest, files=files, arguments=arguments_of(program))
    (root / "bundle.json").write_text(to_json(complete), encoding="utf-8")


def seal(staging: Path, manifest: Manifest, target: Path) -> None:
    """Write the manifest of a staged directory, check the bundle, and let it replace `target` in one step."""
    check_replaceable(target)
    target = target.resolve()  # a link to a bundle stays, and the bundle behind it is replaced
    write_manifest(staging, manifest)
    read_bundle(staging)
    for path in [*staging.rglob("*"), staging]:
        _fsync(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() or not _renamed(staging, target):
        _exchange(staging, target)
        shutil.rmtree(staging)
    _fsync(target.parent)


def _renamed(staging: Path, target: Path) -> bool:
    """Whether the directory could be renamed to a free name; another build may be faster."""
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def check_replaceable(target: Path) -> None:
    """Refuse a target that is neither one of our bundles nor an empty folder nor free."""
    if target.exists() and not (_is_ours(target) or (target.is_dir() and not any(target.iterdir()))):
        raise UsageError(f"{target}: exists and is not a bundle of tilewright; choose another -o")


def _is_ours(target: Path) -> bool:
    """Whether the bundle.json in a folder is one of our manifests, of any schema."""
    try:
        document = json.loads((target / "bundle.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"schema_version", "system", "components"} <= document.keys()


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories, in one step if the kernel can do that."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2
    if hasattr(libc, "renameat2") and not libc.renameat2(at_cwd, bytes(one), at_cwd, bytes(other), exchange):
        return
    aside = other.with_name(f".{other.name}.{os.getpid()}.old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
