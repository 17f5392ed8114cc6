"""Converting pictures for networks: enlarged and padded crops in, 8-bit pixels out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from tilewright.runtime.images.read import Pixels

__all__ = ["Canvas", "Enlarged", "fill", "padded"]

Canvas = npt.NDArray[np.float32]


_REACH = 3  # source pixels on each side that an enlarged pixel depends on; the bicubic filter reads 2


_BAND = 128  # rows at a time: a float buffer of so many rows stays in the CPU's cache


def _enlarged(pixels: Pixels, scale: int) -> Pixels:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Enlarged:
    """An enlarged and padded picture, computed crop by crop, so that it is never in memory as a whole.

    The bottom and the right are padded to the multiple by reflection, or by repeating the edge if a side is too short.
    """

    rgb: Pixels
    scale: int
    multiple: int
    least: int = 1  # the shortest side of the padded picture

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the padded picture: channels, height, width."""
        height, width = (padded(side * self.scale, self.multiple, self.least) for side in self.rgb.shape[:2])
        return 3, height, width

    def crop(self, top: int, left: int, height: int, width: int) -> Canvas:
        """The planes of a crop in [0, 1], equal to a crop of the whole enlarged picture."""
        rows = _source_rows(top, height, self.rgb.shape[0] * self.scale, self.shape[1])
        columns = _source_rows(left, width, self.rgb.shape[1] * self.scale, self.shape[2])
        first_row, last_row = self._support(rows)
        first_column, last_column = self._support(columns)
        pixels = self.rgb[first_row:last_row, first_column:last_column]
        pixels = pixels if self.scale == 1 else _enlarged(np.ascontiguousarray(pixels), self.scale)
        pixels = _rows_of(pixels, rows - first_row * self.scale, 0)
        pixels = _rows_of(pixels, columns - first_column * self.scale, 1)
        planes = np.empty((3, height, width), np.float32)
        for channel in range(3):
            np.divide(pixels[:, :, channel], 255, out=planes[channel], dtype=np.float32)
        return planes

    def _support(self, rows: npt.NDArray[np.int64]) -> tuple[int, int]:
        """The source rows that the filter reads for these enlarged rows; Pillow cuts them at the image's border."""
        return max(0, int(rows.min()) // self.scale - _REACH), int(rows.max()) // self.scale + 1 + _REACH


def padded(side: int, multiple: int, least: int) -> int:
    """The padded length of a side: a multiple, and at least `least`."""
    return -(-max(side, least) // multiple) * multiple


def _source_rows(start: int, count: int, filled: int, padded: int) -> npt.NDArray[np.int64]:
    rows = np.arange(start, start + count)
    mirrored = 2 * (filled - 1) - rows if padded - filled <= filled - 1 else np.full_like(rows, filled - 1)
    return np.where(rows < filled, rows, mirrored)


def _rows_of(pixels: Pixels, rows: npt.NDArray[np.int64], axis: int) -> Pixels:
    """The rows of pixels with these indices, as a view if they are consecutive."""
    if rows[-1] - rows[0] == len(rows) - 1 and rows.max() == rows[-1]:
        span = slice(int(rows[0]), int(rows[-1]) + 1)
        return pixels[span] if axis == 0 else pixels[:, span]
    return np.take(pixels, rows, axis)


def fill(rgb: Pixels, start: int, left: int, canvas: Canvas) -> None:
    """Write planes into a picture at a place: clamped to [0, 1], rounded to 8 bits, cropped; NaN becomes 0."""
    height = max(0, min(canvas.shape[1], rgb.shape[0] - start))
    width = max(0, min(canvas.shape[2], rgb.shape[1] - left))
    buffer = np.empty((min(_BAND, height), width), np.float32)
    for top in range(0, height, _BAND):
        rows = slice(top, min(top + _BAND, height))
        values = buffer[: rows.stop - top]
        for channel in range(3):
            np.fmax(canvas[channel, rows, :width], 0, out=values)  # unlike maximum, it replaces NaN
            np.minimum(values, 1, out=values)
            np.multiply(values, 255, out=values)
            np.add(values, 0.5, out=values)
            rgb[start + top : start + rows.stop, left : left + width, channel] = values
