"""The notes of past builds, one for each output: its stages, and the time that they took."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilewright.export.build.cache import write
from tilewright.export.build.parameters import count
from tilewright.export.build.request import Request
from tilewright.runtime.bundle.digests import cache_dir, sha256_of_bytes

__all__ = ["note_of", "remember", "remember_added", "usual_seconds"]

LIKE = 2.0  # a build is compared with those of at most so many times its parameters


def note_of(out: Path) -> Path:
    """The file that remembers the last build of an output."""
    return cache_dir() / "built" / f"{sha256_of_bytes(str(out.resolve()).encode())[:32]}.json"


def remember(
    request: Request, digest: str, stages: Mapping[str, Mapping[str, str]], seconds: Mapping[str, float]
) -> None:
    """Write the note of a build. Stages that did not run keep the time of their last run."""
    note = {
        "bundle": str(request.out.resolve()),
        "digest": digest,
        "stages": stages,
        "system": request.name,
        "parameters": count(request.parameters),
        "seconds": usual_seconds(request) | dict(seconds),
    }
    write(note_of(request.out), json.dumps(note, sort_keys=True))


def remember_added(out: Path, inputs: str, digest: str) -> None:
    """Add to the note of a build that its bundle got more engines. `inputs`: the digest of all they depend on."""
    note = json.loads(note_of(out).read_text())
    write(note_of(out), json.dumps(note | {"added": {"inputs": inputs, "digest": digest}}, sort_keys=True))


def usual_seconds(request: Request) -> dict[str, float]:
    """Stage -> the seconds that it took in the build of this system whose size is nearest, the latest of them."""
    size, seconds = count(request.parameters), dict[str, float]()
    for _, _, past in sorted(_past(request.name, size), key=lambda build: build[:2], reverse=True):
        seconds |= past
    return seconds


def _past(system: str, size: int) -> Iterator[tuple[float, float, dict[str, float]]]:
    """How far each build of a system like this one is in size and in time, and its seconds."""
    for file in (cache_dir() / "built").glob("*.json"):
        try:
            note: dict[str, Any] = json.loads(file.read_text())
            if note["system"] == system and size / LIKE <= note["parameters"] <= size * LIKE:
                far = abs(math.log(note["parameters"] / size))
                yield far, time.time() - file.stat().st_mtime, {s: float(n) for s, n in note["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
