"""Which machine code in bundles may run: code that was compiled with this user's cache, or that the caller asks for.

A graph can only compute. Machine code can do all that the user can, so code of strangers never runs by itself.
"""

from collections.abc import Mapping
from pathlib import Path

from tilewright.runtime.bundle.digests import cache_dir, sha256_of_file
from tilewright.runtime.bundle.manifest import Manifest
from tilewright.runtime.errors import EnvironmentMismatch

__all__ = ["strangers", "trust"]

CODE = ("aoti",)  # backends whose engines are machine code


def trust(file: Path) -> None:
    """Remember machine code that was compiled here."""
    note = _note(sha256_of_file(file))
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch()


def strangers(manifest: Manifest) -> Mapping[str, frozenset[str]]:
    """Component -> its engines whose machine code was compiled elsewhere."""
    return {
        name: frozenset(
            spec.name
            for spec in component.engines
            if spec.backend in CODE and not _trusted(manifest.files[spec.graph].sha256)
        )
        for name, component in manifest.components.items()
    }


def _trusted(sha256: str) -> bool:
    try:
        return _note(sha256).is_file()
    except EnvironmentMismatch:  # the user has no home, and so no cache
        return False


def _note(sha256: str) -> Path:
    return cache_dir() / "compiled" / sha256
