"""Pixels in a file instead of memory, read and written by rectangles as if they were an array."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.errors import ResourceError, amount

__all__ = ["Channels", "PixelFile", "Rectangle", "disk_error", "require_room"]

Rectangle = tuple[int, int, int, int]  # top, left, bottom, right


class PixelFile:
    """Pixels [H, W, C] of 8 or 16 bits, which any thread may read and write. It holds none of them in memory.

    Without a path the file has no name, and goes when it is closed. `sums` has the CRC-32 of each rectangle that was
    written, so that a later process can tell whether the file still holds it.
    """

    def __init__(
        self, path: Path | None, shape: Sequence[int], dtype: Any = np.uint8, *, folder: Path | None = None
    ) -> None:
        height, width, channels = shape
        self.shape: tuple[int, ...] = height, width, channels
        self.path, self.dtype = path, np.dtype(dtype)
        self.ndim, self.pixel_bytes = 3, channels * self.dtype.itemsize
        self.sums: dict[Rectangle, int] = {}
        self.lock = Lock()
        if path is None:
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it lives as long as this
        else:
            self.file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self.file.truncate(height * width * self.pixel_bytes)

    def __getitem__(self, spans: tuple[slice, slice]) -> npt.NDArray[Any]:
        (top, bottom, _), (left, right, _) = (
            span.indices(side) for span, side in zip(spans, self.shape[:2], strict=True)
        )
        pixels = np.empty((max(0, bottom - top), max(0, right - left), self.shape[2]), self.dtype)
        for place, data in self._runs(top, left, pixels):
            with self.lock:
                self.file.seek(place)
                if self.file.readinto(data) != len(data):
                    raise ResourceError(f"{self.path or 'a temporary file'} became shorter while it was in use")
        return pixels

    def __setitem__(self, spans: tuple[slice, slice], pixels: npt.NDArray[Any]) -> None:
        (top, bottom, _), (left, right, _) = (
            span.indices(side) for span, side in zip(spans, self.shape[:2], strict=True)
        )
        pixels = np.ascontiguousarray(np.broadcast_to(pixels, (bottom - top, right - left, self.shape[2])), self.dtype)
        try:
            for place, data in self._runs(top, left, pixels):
                with self.lock:
                    self.file.seek(place)
                    while data:
                        data = data[self.file.write(data) :]
        except OSError as error:
            raise disk_error(self.path, error) from error
        if self.path is not None:
            self.sums[top, left, bottom, right] = zlib.crc32(pixels.data)

    def _runs(self, top: int, left: int, pixels: npt.NDArray[Any]) -> list[tuple[int, memoryview]]:
        """The bytes of a rectangle that lie in one piece, and where: all of its rows, or each by itself."""
        if not pixels.size:
            return []
        width, start = self.shape[1], (top * self.shape[1] + left) * self.pixel_bytes
        rows = [pixels] if pixels.shape[1] == width else list(pixels)
        return [
            (start + i * width * self.pixel_bytes, row.reshape(-1).view(np.uint8).data) for i, row in enumerate(rows)
        ]

    def holds(self, rectangle: Rectangle, total: int) -> bool:
        """Whether a rectangle has this CRC-32; if so, it counts as written."""
        top, left, bottom, right = rectangle
        if zlib.crc32(self[top:bottom, left:right].data) != total:
            return False
        self.sums[rectangle] = total
        return True

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from error

    def __enter__(self) -> PixelFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and remove it if it has a name and `remove` is true."""
        self.file.close()
        if remove and self.path is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


class Channels:
    """Some channels of pixels in a file, to read; a channel may come several times."""

    def __init__(self, pixels: PixelFile, channels: tuple[int, ...]) -> None:
        self.pixels, self.channels = pixels, channels
        self.shape: tuple[int, ...] = (*pixels.shape[:2], len(channels))
        self.dtype = pixels.dtype

    def __getitem__(self, spans: tuple[slice, slice]) -> npt.NDArray[Any]:
        pixels = self.pixels[spans]
        return pixels if self.channels == (*range(pixels.shape[2]),) else np.take(pixels, self.channels, axis=2)

    def close(self) -> None:
        """Close the file."""
        self.pixels.close()


def disk_error(path: Path | None, error: OSError) -> ResourceError:
    """An error of a write as one line."""
    where = f"{path}" if path else "the file for the pixels of the image"
    return ResourceError(
        f"{where} cannot be written ({error.strerror or error}): free space there, or choose another place"
    )


def require_room(folder: Path, sizes: dict[str, int]) -> None:
    """Refuse work whose files do not fit on the disk of a folder. `sizes`: what for -> bytes."""
    free, needed = shutil.disk_usage(folder).free, sum(sizes.values())
    if needed > free:
        parts = ", ".join(f"{amount(size)} for {name}" for name, size in sizes.items())
        raise ResourceError(
            f"{folder} needs room for {amount(needed)} ({parts}), and {amount(free)} are free there; free space, or"
            " choose another place"
        )
