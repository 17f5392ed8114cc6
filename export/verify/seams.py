"""The seams of a bundle's tiles, on pictures in which they show most."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.images import seams
from tilewright.runtime.images.canvas import Enlarged
from tilewright.runtime.plan.passes import least_px, plan_of
from tilewright.runtime.plan.tiles import TilePlan
from tilewright.runtime.restore import Restorer

__all__ = ["PICTURES", "SEAM_GATE", "seam_excess", "seams_of"]

LEAST_TILE_PX = 96  # side of tiles when seams are judged: convolutions reach further than 12 of the smallest tokens
SEAM_GATE = 0.15  # for `seam_excess`: blended tiles of random networks reach 0.09, averaged ones of the demo 0.4

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


def seams_of(restorer: Restorer, job: Job, steps: int | None, make: Callable[[int, int], Pixels]) -> float:
    """The seams of a picture of 3 x 3 tiles that overlap by a third, after so many steps."""
    program = restorer.bundle.program
    fixed = job.tile_px is not None and least_px(program, job.tile_px) == job.tile_px
    usual = min(p.tiles.px for p in program.passes if p.tiles)
    tile = job.tile_px if fixed and job.tile_px else min(max(12 * program.multiple_px, LEAST_TILE_PX), usual)
    if not fixed:  # a third must be whole tokens; larger tiles would show the same seams
        tile = max(tile // (3 * program.multiple_px), 1) * 3 * program.multiple_px
    overlap = tile // 3 // program.multiple_px * program.multiple_px
    whole = 3 * tile - 2 * overlap
    side = -(-whole // program.scale)
    enlarged = Enlarged(make(side, side), program.scale, program.multiple_px, least_px(program, tile))
    tiled = replace(job, image=enlarged, tile_px=tile, overlap_px=overlap, steps=steps)
    devices = len(restorer.executor.devices)
    image = run(program, restorer.engines, restorer.constants, tiled, devices=devices)
    last = [p for p in program.passes if "result" in p.writes()][-1]
    plan = plan_of(program, last, image.shape[1], image.shape[2], tile, overlap)
    excess = seam_excess(image, plan, program.multiple_px)
    if fixed or excess <= SEAM_GATE:
        return excess
    direct = run(program, restorer.engines, restorer.constants, replace(tiled, tile_px=whole, overlap_px=0))
    direct_excess = seam_excess(direct, plan, program.multiple_px)
    return excess - max(direct_excess, 0)  # changes that one tile shows too belong to the picture
