"""The tile plan of a pass over an image."""

from collections.abc import Collection, Iterable

from tilewright.runtime.bundle.program import Grid, Pass, Program
from tilewright.runtime.errors import UsageError
from tilewright.runtime.plan.tiles import TilePlan, tile_plan

__all__ = ["least_px", "part_bytes", "plan_of", "smaller_tile", "table_for_tokens"]


def least_px(program: Program, tile: int | None, shortest: int = 1) -> int:
    """The shortest side of a padded image: the side of a tile if tiles have fixed sides.

    `shortest`: the shortest side of a tile that the engines take.
    """
    return max([shortest, *(tile or p.tiles.px for p in program.passes if p.tiles and p.tiles.fixed_px)])


def plan_of(program: Program, p: Pass, height: int, width: int, tile: int | None, overlap: int | None) -> TilePlan:
    """The tile plan of a pass. Without tiles, or for an image that is taken whole, it has one tile."""
    whole = tile_plan(width, height, max(width, height), 0, program.multiple_px)
    if p.tiles is None:
        return whole
    direct = p.tiles.whole_up_to_px
    if tile is None and direct and min(height, width) <= min(direct) and max(height, width) <= max(direct):
        return whole
    size = p.tiles.px if tile is None else tile
    if p.tiles.fixed_px and size not in p.tiles.fixed_px:
        raise UsageError(f"tile={size} is not one of the sizes this bundle is made for: {list(p.tiles.fixed_px)}")
    fitting = min(p.tiles.overlap_px, size // 2) // program.multiple_px * program.multiple_px
    return tile_plan(width, height, size, fitting if overlap is None else overlap, program.multiple_px)


def smaller_tile(
    program: Program, passes: Iterable[tuple[Pass, TilePlan]], overlap: int | None, shortest: int = 1
) -> int | None:
    """The side of the next smaller tiles for all passes: a fixed side, or half, with room for both overlaps.

    `shortest`: the shortest side that the engines take. None if there is no smaller side.
    """
    tiled = [(p.tiles, plan) for p, plan in passes if p.tiles]
    side = max((max(plan.tile_height, plan.tile_width) for _, plan in tiled), default=0)
    least = max([2 * (tiles.overlap_px if overlap is None else overlap) for tiles, _ in tiled], default=0)
    least = max(least, shortest)
    fixed = [set(tiles.fixed_px) for tiles, _ in tiled if tiles.fixed_px]
    if fixed:
        return max((px for px in set.intersection(*fixed) if least <= px < side), default=None)
    least = -(-max(least, 1) // program.multiple_px) * program.multiple_px
    half = min([side // 2, *(tiles.px for tiles, _ in tiled if tiles.px < side)])  # of an image that was taken whole
    smaller = max(least, half // program.multiple_px * program.multiple_px)
    return smaller if smaller < side else None


def part_bytes(grid: Grid, plan: TilePlan) -> int:
    """The bytes of the float32 part of a grid that one tile writes."""
    return 4 * grid.channels * (plan.tile_height // grid.px) * (plan.tile_width // grid.px)


def table_for_tokens(p: Pass, name: str, px: int, constants: Collection[str]) -> str | None:
    """The name of the constant `name.TOKENS` for tiles of this many pixels, or none."""
    table = f"{name}.{px // p.steps.px_per_token}" if p.steps else name
    return table if table in constants else None
