"""The seams of a bundle's tiles, on pictures in which they show most."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tilewright.runtime.images import seams
from tilewright.runtime.plan.tiles import TilePlan

__all__ = ["PICTURES", "seam_excess"]

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
    tops, lefts = seams.borders(plan.tops, plan.tile_height), seams.borders(plan.lefts, plan.tile_width)
    return seams.seam_excess(image.transpose(1, 2, 0), tops, lefts, token_px)
