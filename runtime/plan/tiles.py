"""Splitting an image into overlapping tiles, and the weights that join the tiles again.

Every tile of a plan has the same size, so an engine built for one shape serves them all: the last row and column
shift inwards instead of shrinking, and share more than the nominal overlap with their neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tilewright.runtime.errors import UsageError
from tilewright.runtime.plan.noise import WORD_MAX, philox4x32

__all__ = ["Tile", "TilePlan", "moved", "starts", "tile_plan", "weights"]

MOVES = WORD_MAX  # the region of the noise that moves tiles
MOST_STARTS = 100_000  # tiles in a row or a column: a plan lists their starts
Weights = list[npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Tile:
    """A rectangle of output pixels."""

    index: int  # row-major position in the plan
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TilePlan:
    """The places of an image's tiles, in output pixels."""

    height: int
    width: int
    tile_height: int  # smaller than the nominal tile if the image is smaller
    tile_width: int
    overlap: int  # the least that neighbours share
    tops: tuple[int, ...]  # one for each row of tiles
    lefts: tuple[int, ...]  # one for each column of tiles

    @property
    def count(self) -> int:
        """How many tiles there are; it does not list them."""
        return len(self.tops) * len(self.lefts)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles in row-major order."""
        corners = ((top, left) for top in self.tops for left in self.lefts)
        return tuple(Tile(i, top, left, self.tile_height, self.tile_width) for i, (top, left) in enumerate(corners))


def starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Return the places where the tiles of one axis start."""
    if length <= tile:
        return (0,)
    count = _count(length, tile, overlap)
    return (*(i * (tile - overlap) for i in range(count - 1)), length - tile)


def _count(length: int, tile: int, overlap: int) -> int:
    return max(1, -(-(length - overlap) // (tile - overlap)))


def tile_plan(width: int, height: int, tile: int, overlap: int, multiple: int) -> TilePlan:
    """Return the tile plan of an image whose sides are already padded to the multiple."""
    if multiple < 1:
        raise UsageError(f"multiple={multiple} is no size; use 1 or more")
    for name, value in {"width": width, "height": height, "tile": tile}.items():
        if value < 1 or value % multiple:
            raise UsageError(f"{name}={value} is not a positive multiple of {multiple}; use {_up(value, multiple)}")
    if not 0 <= 2 * overlap <= tile or overlap % multiple:
        most = tile // 2 // multiple * multiple
        raise UsageError(f"overlap={overlap} does not fit tile={tile}; use a multiple of {multiple} from 0 to {most}")
    if _count(max(width, height), tile, overlap) > MOST_STARTS:
        raise UsageError(
            f"a side of {max(width, height)} px is more than {MOST_STARTS} tiles of {tile} px; use a larger tile"
            " or a smaller image"
        )
    tops, lefts = starts(height, tile, overlap), starts(width, tile, overlap)
    return TilePlan(height, width, min(tile, height), min(tile, width), overlap, tops, lefts)


def moved(plan: TilePlan, multiple: int, seed: int, step: int) -> TilePlan:
    """The plan with its inner tiles moved by offsets that depend only on the seed and the step.

    Neighbours still share at least half of the nominal overlap. Tiles at the border stay, so that all is covered.
    """
    most = plan.overlap // 2 // multiple
    words = philox4x32(np.array([step, 0, 0, 0], np.uint32), (seed, MOVES))
    down, across = (int(word) % (2 * most + 1) - most for word in words[:2])
    return replace(
        plan,
        tops=_moved(plan.tops, down * multiple, multiple),
        lefts=_moved(plan.lefts, across * multiple, multiple),
    )


def _moved(starts: tuple[int, ...], by: int, multiple: int) -> tuple[int, ...]:
    # the last tile may lie less than a pitch after the one before it
    return (*starts[:1], *(min(start + by, starts[-1] - multiple) for start in starts[1:-1]), *starts[1:][-1:])


def weights(plan: TilePlan, px: int) -> tuple[Weights, Weights]:
    """Return the weights of each row and of each column of tiles, for a grid whose cells have `px` output pixels.

    The weight of a tile is the outer product of its row's and its column's.
    """
    sizes = (plan.height, plan.width, plan.tile_height, plan.tile_width, plan.overlap, *plan.tops, *plan.lefts)
    if px < 1 or any(size % px for size in sizes):
        raise UsageError(f"px={px} does not divide the tile plan; use a divisor of {np.gcd.reduce(sizes)}")
    rows = _axis_weights([top // px for top in plan.tops], plan.tile_height // px, plan.overlap // px)
    columns = _axis_weights([left // px for left in plan.lefts], plan.tile_width // px, plan.overlap // px)
    return rows, columns


def _axis_weights(starts: Sequence[int], tile: int, overlap: int) -> Weights:
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / max(1, overlap))
    raw = [np.ones(tile) for _ in starts]
    for before, after in pairwise(raw):
        before[tile - overlap :] = ramp[::-1]
        after[:overlap] = ramp
    total = np.zeros(starts[-1] + tile)
    for start, weight in zip(starts, raw, strict=True):
        total[start : start + tile] += weight
    normalised = (weight / total[start : start + tile] for start, weight in zip(starts, raw, strict=True))
    return [weight.astype(np.float32) for weight in normalised]


def _up(value: int, multiple: int) -> int:
    return max(1, -(-value // multiple)) * multiple
