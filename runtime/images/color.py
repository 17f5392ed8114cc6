"""Colours of a restored picture, taken from the enlarged input: by low frequencies, or by mean and spread.

A picture is recoloured rectangle by rectangle. Each pixel has the same operations wherever a rectangle begins, and the
sums over a picture are exact, so the bytes depend on neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.images.canvas import Canvas, Enlarged, Stored, fill

__all__ = ["COLORS", "recolored"]

COLORS = ("off", "wavelet", "adain")
LEVELS = 5  # each blurs twice as wide as the one before
REACH = 2**LEVELS - 1  # pixels on each side that a recoloured pixel depends on
BLOCK = 512  # side of the rectangles that are computed at once
LEAST = 1e-5  # added to variances of values from 0 to 1


def recolored(color: str, rgb: Stored, source: Stored, scale: int) -> Stored:
    """A picture with the colours of its enlarged source."""
    enlarged = Enlarged(source, scale, 1)
    return rgb if color == "off" else _Recolored(rgb, enlarged, _wavelet if color == "wavelet" else _adain)


@dataclass(frozen=True)
class _Recolored:
    """A picture that is recoloured where it is read."""

    rgb: Stored
    source: Enlarged
    change: Callable[[_Recolored, int, int, int, int], Canvas]  # the new planes of top, left, bottom, right

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        return self.rgb.shape

    @property
    def dtype(self) -> Any:
        """Unsigned integers of 8 or 16 bits."""
        return self.rgb.dtype

    def __getitem__(self, spans: tuple[slice, slice]) -> npt.NDArray[Any]:
        (top, bottom, _), (left, right, _) = (
            span.indices(side) for span, side in zip(spans, self.shape[:2], strict=True)
        )
        result = np.empty((bottom - top, right - left, 3), self.dtype)
        for t in range(top, bottom, BLOCK):
            for e in range(left, right, BLOCK):
                planes = self.change(self, t, e, min(t + BLOCK, bottom), min(e + BLOCK, right))
                fill(result, t - top, e - left, planes)
        return result

    def planes(self, top: int, left: int, bottom: int, right: int) -> Canvas:
        """A rectangle of the picture, as planes in [0, 1]."""
        planes = self.rgb[top:bottom, left:right].transpose(2, 0, 1)
        levels: Canvas = np.divide(planes, np.iinfo(self.dtype).max, dtype=np.float32)
        return levels

    @cached_property
    def lines(self) -> tuple[Canvas, Canvas]:
        """For each channel the factor and the number to add that give it the mean and the spread of the source."""
        most, (height, width) = int(np.iinfo(self.dtype).max), self.shape[:2]
        sums = [[[0, 0] for _ in range(3)] for _ in range(2)]  # of the picture, of the source: values, squares
        for top in range(0, height, BLOCK):
            for left in range(0, width, BLOCK):
                bottom, right = min(top + BLOCK, height), min(left + BLOCK, width)
                planes = self.source.crop(top, left, bottom - top, right - left)
                levels = np.rint(planes * np.float32(most)).astype(np.int64)
                for totals, values in zip(
                    sums, (self.rgb[top:bottom, left:right].transpose(2, 0, 1), levels), strict=True
                ):
                    for total, channel in zip(totals, values.astype(np.int64), strict=True):
                        total[0] += int(channel.sum())
                        total[1] += int((channel * channel).sum())
        count = height * width
        means = [[total[0] / count / most for total in totals] for totals in sums]
        spreads = [
            [
                ((count * squares - values**2) / (count * max(1, count - 1)) / most**2 + LEAST) ** 0.5
                for values, squares in t
            ]
            for t in sums
        ]
        gain = [wide / narrow for narrow, wide in zip(*spreads, strict=True)]
        shift = [there - here * by for here, there, by in zip(*means, gain, strict=True)]
        return np.array(gain, np.float32)[:, None, None], np.array(shift, np.float32)[:, None, None]


def _wavelet(picture: _Recolored, top: int, left: int, bottom: int, right: int) -> Canvas:
    """The low frequencies of the source, and the high ones of the picture."""
    height, width = picture.shape[:2]
    t, e = max(0, top - REACH), max(0, left - REACH)
    b, r = min(height, bottom + REACH), min(width, right + REACH)
    planes = picture.planes(t, e, b, r)
    # the blur is linear: that of the difference is the difference of the blurs
    planes += _blurred(picture.source.crop(t, e, b - t, r - e) - planes)
    return planes[:, top - t : bottom - t, left - e : right - e]


def _blurred(planes: Canvas) -> Canvas:
    """What is left of planes after blurs with 1 2 1, each twice as wide; the border's pixels are repeated."""
    for level in range(LEVELS):
        for axis in (1, 2):
            places = np.arange(planes.shape[axis])
            before, after = (
                np.take(planes, np.clip(places + shift, 0, places[-1]), axis) for shift in (-(2**level), 2**level)
            )
            planes = (before + planes * np.float32(2) + after) * np.float32(0.25)
    return planes


def _adain(picture: _Recolored, top: int, left: int, bottom: int, right: int) -> Canvas:
    """The picture with each channel's mean and spread of the source."""
    gain, shift = picture.lines
    return picture.planes(top, left, bottom, right) * gain + shift
