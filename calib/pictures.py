"""The pictures of a folder: which are observed, and which are held out to judge by."""

from collections.abc import Sequence
from pathlib import Path

from tilewright.runtime.errors import InputError
from tilewright.runtime.images.read import SUFFIXES

__all__ = ["IMAGES", "evenly", "images_in", "split"]

IMAGES = 16
LEAST = 4  # pictures: three to observe, and one to judge
EACH = 4  # of so many pictures, the last one is held out


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, in the order of their names."""
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); check the path") from error
    return [path for path in files if path.suffix.lower() in SUFFIXES]


def evenly(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many of the paths, evenly from all."""
    count = min(most, len(paths))
    return [paths[place * len(paths) // count] for place in range(count)]


def split(folder: Path, most: int) -> tuple[list[Path], list[Path]]:
    """The pictures to observe, and those to judge by."""
    paths = images_in(folder)
    if len(paths) < LEAST:
        raise InputError(
            f"{folder} holds {len(paths)} images; --calibrate needs {LEAST} or more, as it judges by some of them"
        )
    chosen = evenly(paths, most)
    judged = chosen[EACH - 1 :: EACH]
    return [path for path in chosen if path not in judged], judged
