"""Removing files from the cache."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tilewright.export.build.cache import sweep
from tilewright.runtime.bundle.digests import cache_dir
from tilewright.runtime.errors import UsageError

__all__ = ["Cleaned", "clean"]

DAY = 86_400


@dataclass(frozen=True)
class Cleaned:
    """The freed bytes, and the converted weights that stay."""

    freed_bytes: int
    converted_bytes: int  # bytes of converted weights that stay
    bundles: list[str]  # bundles that read converted weights in the cache, or did so


def clean(older_than_days: float = 0.0, *, converted: bool = False) -> Cleaned:
    """Remove results of stages, digests and notes: all, or those unused for some days. Also converted weights."""
    if not older_than_days >= 0:
        raise UsageError(f"--older-than {older_than_days:g} must be 0 or more days")
    root, limit, freed = cache_dir(), time.time() - older_than_days * DAY, 0
    bundles = sorted(_pointing_at(root / "converted"))
    for stage in (root / "build").glob("*"):
        sweep(stage, ".*.part")
    for entry in _entries(root, converted):
        if entry.stat().st_mtime <= limit:
            freed += _size(entry)
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return Cleaned(freed, _size(root / "converted"), bundles)


def _entries(root: Path, converted: bool) -> Iterator[Path]:
    yield from sorted(entry for entry in (root / "build").glob("*/*") if not entry.name.startswith("."))
    yield from sorted((root / "digests").glob("*"))
    yield from sorted((root / "built").glob("*"))
    if converted:
        yield from sorted((root / "converted").glob("*"))


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file())


def _pointing_at(folder: Path) -> Iterator[str]:
    """The bundles of past builds with weights in this folder."""
    for note in (cache_dir() / "built").glob("*.json"):
        try:
            bundle = json.loads(note.read_text())["bundle"]
            weights = json.loads((Path(bundle) / "weights.json").read_text())
            paths = [Path(f["path"]) for f in weights["folders"].values() if f.get("path")]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if any(path.is_relative_to(folder) or path.is_relative_to(folder.resolve()) for path in paths):
            yield bundle
