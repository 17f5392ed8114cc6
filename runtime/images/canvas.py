"""Converting pictures for networks: enlarged and padded crops in, pixels of 8 or 16 bits out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["Canvas", "Enlarged", "Stored", "enlarged_rows", "fill", "padded"]

Canvas = npt.NDArray[np.float32]


_REACH = 3  # source pixels on each side that an enlarged pixel depends on; the bicubic filter reads 2


_BAND = 128  # rows at a time: a float buffer of so many rows stays in the CPU's cache


class Stored(Protocol):
    """Pixels [H, W, C] in memory or on a disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width, channels."""

    @property
    def dtype(self) -> Any:
        """Unsigned integers of 8 or 16 bits."""

    def __getitem__(self, spans: tuple[slice, slice], /) -> npt.NDArray[Any]:
        """The pixels of a rectangle."""


def _enlarge(pixels: npt.NDArray[Any], scale: int) -> npt.NDArray[Any]:
    """Bicubic enlargement: pixels of 8 bits as Pillow makes them, those of 16 bits as floats from 0 to 1."""
    if pixels.dtype == np.uint16:
        levels = np.divide(pixels, 65535, dtype=np.float32)
        return levels if scale == 1 else np.clip(_bicubic(_bicubic(levels, scale, 1), scale, 0), 0, 1)
    if scale == 1:
        return pixels
    image = Image.fromarray(
        np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 and pixels.ndim == 3 else pixels)
    )
    return np.asarray(image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC))


def _bicubic(levels: Canvas, scale: int, axis: int) -> Canvas:
    """Enlarge along an axis with Pillow's filter. Every number has the same operations wherever a crop begins."""
    source = np.moveaxis(levels, axis, 0)
    count = len(source)
    result = np.empty((count * scale, *source.shape[1:]), np.float32)
    for phase in range(scale):
        total, weights = np.zeros_like(source), np.zeros((count,) + (1,) * (source.ndim - 1), np.float32)
        for shift in range(-2, 3):
            weight = np.float32(_cubic(shift + 0.5 - (phase + 0.5) / scale))
            rows = slice(max(0, -shift), max(0, count - max(0, shift)))  # the filter is cut at the border
            if weight and rows.stop > rows.start:
                total[rows] += weight * source[rows.start + shift : rows.stop + shift]
                weights[rows] += weight
        result[phase::scale] = total / weights
    return np.moveaxis(result, 0, axis)


def _cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


@dataclass(frozen=True)
class Enlarged:
    """An enlarged and padded picture, computed crop by crop, so that it is never in memory as a whole.

    The bottom and the right are padded to the multiple by reflection, or by repeating the edge if a side is too short.
    """

    rgb: Stored  # 8 or 16 bits
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
        pixels = _enlarge(pixels, self.scale)
        pixels = _rows_of(pixels, rows - first_row * self.scale, 0)
        pixels = _rows_of(pixels, columns - first_column * self.scale, 1)
        planes = np.empty((3, height, width), np.float32)
        for channel in range(3):
            if pixels.dtype == np.float32:
                planes[channel] = pixels[:, :, channel]
            else:
                np.divide(pixels[:, :, channel], 255, out=planes[channel], dtype=np.float32)
        return planes

    def _support(self, rows: npt.NDArray[np.int64]) -> tuple[int, int]:
        """The source rows that the filter reads for these enlarged rows; Pillow cuts them at the image's border."""
        return max(0, int(rows.min()) // self.scale - _REACH), int(rows.max()) // self.scale + 1 + _REACH


def padded(side: int, multiple: int, least: int) -> int:
    """The padded length of a side: a multiple, and at least `least`."""
    return -(-max(side, least) // multiple) * multiple


def enlarged_rows(pixels: Stored, scale: int, top: int, bottom: int) -> npt.NDArray[Any]:
    """Whole rows of an enlarged picture, equal to those of the picture enlarged at once."""
    first, last = max(0, top // scale - _REACH), min(pixels.shape[0], (bottom - 1) // scale + 1 + _REACH)
    return _enlarge(pixels[first:last, 0 : pixels.shape[1]], scale)[top - first * scale : bottom - first * scale]


def _source_rows(start: int, count: int, filled: int, padded: int) -> npt.NDArray[np.int64]:
    rows = np.arange(start, start + count)
    mirrored = 2 * (filled - 1) - rows if padded - filled <= filled - 1 else np.full_like(rows, filled - 1)
    return np.where(rows < filled, rows, mirrored)


def _rows_of(pixels: npt.NDArray[Any], rows: npt.NDArray[np.int64], axis: int) -> npt.NDArray[Any]:
    """The rows of pixels with these indices, as a view if they are consecutive."""
    if rows[-1] - rows[0] == len(rows) - 1 and rows.max() == rows[-1]:
        span = slice(int(rows[0]), int(rows[-1]) + 1)
        return pixels[span] if axis == 0 else pixels[:, span]
    return np.take(pixels, rows, axis)


def fill(rgb: Any, start: int, left: int, canvas: Canvas) -> npt.NDArray[Any]:
    """Write planes into a picture at a place, and return those pixels.

    They are clamped to [0, 1], rounded to the picture's 8 or 16 bits, and cropped; NaN becomes 0.
    """
    height = max(0, min(canvas.shape[1], rgb.shape[0] - start))
    width = max(0, min(canvas.shape[2], rgb.shape[1] - left))
    pixels = np.empty((height, width, 3), rgb.dtype)
    buffer = np.empty((min(_BAND, height), width), np.float32)
    for top in range(0, height, _BAND):
        rows = slice(top, min(top + _BAND, height))
        values = buffer[: rows.stop - top]
        for channel in range(3):
            np.fmax(canvas[channel, rows, :width], 0, out=values)  # unlike maximum, it replaces NaN
            np.minimum(values, 1, out=values)
            np.multiply(values, np.iinfo(rgb.dtype).max, out=values)
            np.add(values, 0.5, out=values)
            pixels[rows, :, channel] = values
    if pixels.size:
        rgb[start : start + height, left : left + width] = pixels
    return pixels
