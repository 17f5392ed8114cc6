"""The sizes that a plan takes: a profile for each side of tiles and each number of tiles in a call."""

from collections.abc import Sequence

from tilewright.export.system import part_of
from tilewright.runtime.bundle.manifest import Component
from tilewright.runtime.bundle.program import Dim, Program
from tilewright.runtime.engines.choose import tile_sides
from tilewright.runtime.errors import UsageError

__all__ = ["Profile", "Shapes", "check_sides", "profiles", "sides_of"]

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # the least, the usual and the most of an input
Profile = dict[str, Shapes]
FREE = (1, 30, 1000)  # of sizes that no tile decides, as the steps of a schedule
ROWS = ("batch", "batch_or_1")


def check_sides(program: Program, tiles: Sequence[int]) -> None:
    """Refuse sides of tiles that the networks do not take."""
    usual = max((p.tiles.px for p in program.passes if p.tiles), default=0)
    fixed = {side for p in program.passes if p.tiles for side in p.tiles.fixed_px}
    if wrong := [side for side in tiles if side < 1 or side % program.multiple_px or (fixed and side not in fixed)]:
        takes = f"one of {sorted(fixed)}" if fixed else f"a positive multiple of {program.multiple_px}"
        raise UsageError(f"tile={wrong[0]} must be {takes} for this bundle; its own tiles have {usual} px")


def sides_of(program: Program, component: str, tiles: Sequence[int]) -> tuple[int, ...]:
    """The sides of tiles that a component gets: those that are asked for, or else the program's."""
    usual = tile_sides(program).get(component)
    if usual is None:
        return ()
    check_sides(program, tiles)
    return tuple(sorted(set(tiles) or {usual}))


def profiles(component: Component, sides: Sequence[int], least: int, batches: Sequence[int]) -> list[Profile]:
    """The profiles of a component, smallest first: it runs the first that fits.

    Each takes fewer tiles too, and tiles down to `least` px, since pictures may be smaller than a tile.
    """
    dims = {dim for spec in component.inputs.values() for dim in spec.shape if isinstance(dim, str)}
    if not dims:
        return []
    tiled = any(part_of(dim)[0] in component.px for dim in dims)
    made = [
        {name: _shapes(spec.shape, component, least, side, batch) for name, spec in component.inputs.items()}
        for side in (sides if tiled and sides else (least,))
        for batch in sorted(set(batches))
    ]
    return [profile for i, profile in enumerate(made) if profile not in made[:i]]  # some have no axis of tiles


def _shapes(shape: Sequence[Dim], component: Component, least: int, side: int, batch: int) -> Shapes:
    ranges = [_range(dim, component, least, side, batch) for dim in shape]
    low, usual, most = zip(*ranges, strict=True) if ranges else ((), (), ())
    return low, usual, most


def _range(dim: Dim, component: Component, least: int, side: int, batch: int) -> tuple[int, int, int]:
    if isinstance(dim, int):
        return dim, dim, dim
    name, part = part_of(dim)
    if dim in ROWS:
        return 1, batch if dim == "batch" else 1, batch
    if name in component.px:
        cells = [max(1, px // component.px[name] // part) for px in (least, side, side)]
        return cells[0], cells[1], cells[2]
    return FREE
