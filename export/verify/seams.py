"""Seams: how much more a picture changes across the borders of tiles than beside them.

excess = (mean step across borders - mean step beside borders) / (mean step beside borders + one 8-bit level)

The result is the larger excess of rows and columns; 0 means no seam. The level avoids a division by zero for flat
pictures. Steps beside a border are whole tokens away from it: a network's grid of tokens shows in its pictures, and
borders lie on that grid.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tilewright.runtime.plan.tiles import TilePlan

__all__ = ["PICTURES", "seam_excess"]

LEVEL = 1 / 255
BESIDE = 3  # a border is compared with so many tokens on each side
Pixels = npt.NDArray[np.uint8]
Planes = npt.NDArray[np.float32]


def _flat(width: int, height: int) -> Pixels:
    return np.full((height, width, 3), 128, np.uint8)


def _ramp(width: int, height: int) -> Pixels:
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    planes = (across + 0 * down, 0 * across + down, (across + down) / 2)
    return np.stack(planes, -1).astype(np.uint8)


PICTURES: dict[str, Callable[[int, int], Pixels]] = {"flat": _flat, "ramp": _ramp}


def seam_excess(image: Planes, plan: TilePlan, token_px: int) -> float:
    """The excess of a picture [3, H, W] in [0, 1] at the borders of a plan's tiles."""
    columns = _excess(image, _borders(plan.lefts, plan.tile_width), token_px)
    rows = _excess(image.transpose(0, 2, 1), _borders(plan.tops, plan.tile_height), token_px)
    return max(columns, rows)


def _borders(starts: tuple[int, ...], size: int) -> list[int]:
    """The places inside the picture where tiles begin or end."""
    return sorted({*starts[1:], *(start + size for start in starts[:-1])})


def _excess(image: Planes, borders: list[int], token_px: int) -> float:
    if not borders:
        return 0.0
    steps = np.abs(np.diff(image.astype(np.float64), axis=2)).mean((0, 1))  # steps[x - 1] leads to column x
    across = {b - 1 for b in borders}
    near = {b - 1 + d * token_px for b in borders for d in range(-BESIDE, BESIDE + 1)} - across
    beside = np.mean([steps[x] for x in sorted(near) if 0 <= x < len(steps)])
    return float((np.mean([steps[x] for x in sorted(across)]) - beside) / (beside + LEVEL))
