"""Seams: how much more a picture changes across the borders of tiles than beside them.

excess = (mean step across borders - mean step beside borders) / (mean step beside borders + one 8-bit level)

The result is the larger excess of rows and columns; 0 means no seam. The level avoids a division by zero for flat
pictures. Steps beside a border are whole tokens away from it: a network's grid of tokens shows in its pictures, and
borders lie on that grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.images.canvas import Stored

__all__ = ["borders", "seam_excess"]

LEVEL = 1 / 255
BESIDE = 3  # a border is compared with so many tokens on each side
BAND = 128  # rows that are read at once
Floats = npt.NDArray[np.float64]


def borders(starts: Sequence[int], size: int) -> list[int]:
    """The places inside the picture where tiles begin or end."""
    return sorted({*starts[1:], *(start + size for start in starts[:-1])})


def seam_excess(picture: Stored, tops: Sequence[int], lefts: Sequence[int], token_px: int) -> float:
    """The excess of a picture [H, W, 3] at these borders of tiles; integers are levels, floats lie in [0, 1]."""
    height, width = picture.shape[:2]
    if not [border for border in tops if border < height] + [border for border in lefts if border < width]:
        return 0.0
    down, across = _steps(picture)
    return max(_excess(down, tops, token_px), _excess(across, lefts, token_px))


def _steps(picture: Stored) -> tuple[Floats, Floats]:
    """The mean change from each row to the next, and from each column to the next."""
    height, width = picture.shape[:2]
    down, across = np.zeros(height - 1), np.zeros(width - 1)
    most = 1.0 if np.dtype(picture.dtype).kind == "f" else float(np.iinfo(picture.dtype).max)
    before: Any = None
    for top in range(0, height, BAND):
        bottom = min(top + BAND, height)
        band = picture[top:bottom, 0:width].astype(np.float64) / most
        across += np.abs(np.diff(band, axis=1)).sum((0, 2))
        joined = band if before is None else np.concatenate((before, band))
        down[max(0, top - 1) : bottom - 1] = np.abs(np.diff(joined, axis=0)).mean((1, 2))
        before = band[-1:]
    return down, across / (height * picture.shape[2])


def _excess(steps: Floats, places: Sequence[int], token_px: int) -> float:
    across = {place - 1 for place in places if 0 < place <= len(steps)}  # steps[x - 1] leads to column x
    near = {x + d * token_px for x in across for d in range(-BESIDE, BESIDE + 1)} - across
    near = {x for x in near if 0 <= x < len(steps)}
    if not across or not near:
        return 0.0
    beside = np.mean([steps[x] for x in sorted(near)])
    return float((np.mean([steps[x] for x in sorted(across)]) - beside) / (beside + LEVEL))
