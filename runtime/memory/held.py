"""What a job holds between its calls: parts of grids, values of tiles, values of the job."""

import math
from collections.abc import Iterable, Mapping, Sequence

from tilewright.runtime.bundle.program import Pass, Tiles, state_shape
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.plan.passes import part_bytes
from tilewright.runtime.plan.tiles import TilePlan

__all__ = ["Held"]

WIDTHS = {"float64": 8, "int64": 8, "float16": 2, "bfloat16": 2, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}


class Held:
    """The bytes that a job holds between calls: parts of grids, values of tiles, values of the job."""

    def __init__(
        self,
        bundle: Bundle,
        passes: Sequence[tuple[Pass, TilePlan]],
        steps: int | None,
        devices: int,
        depth_first: bool = False,
    ) -> None:
        self.grids, self.passes, self.devices = bundle.program.grids, passes, devices
        joined = any(p.writes("each") & self.grids.keys() for p, _ in passes)
        self.depth_first = depth_first and not joined  # a joined pass needs all of its tiles at once
        self.job = 0
        self.kept: list[tuple[int, int, int, int]] = []  # written by a pass, read last by a pass, bytes a tile, tiles
        self.open: list[int] = []  # pass -> bytes of an open tile
        shapes: dict[tuple[Tiles | None, str], tuple[int, ...]] = {}
        of_tiles: dict[Tiles | None, set[str]] = {}
        for place, (p, plan) in enumerate(passes):
            shared = self._shared(p, of_tiles.setdefault(p.tiles, set()))
            sizes = self._pass_shapes(bundle, p, plan, _steps(p, steps), shapes)
            of_tile = 0
            for name, size in sizes.items():
                last = max((i for i, (q, _) in enumerate(passes) if name in q.reads()), default=place)
                if p.tiles is None or name in shared:
                    self.job += size
                elif last > place:
                    self.kept.append((place, last, size, plan.count))
                else:
                    of_tile += size
            self.open.append(of_tile)

    def at(self, place: int) -> int:
        """The most that is held while a pass runs."""
        p, plan = self.passes[place]
        stays, goes, comes = self.job, 0, 0
        spans = [*self.kept, *self._parts()]
        for first, last, size, count in spans:
            count = min(count, 2 * self._front(plan)) if self.depth_first else count
            if first < place < last:
                stays += size * count
            elif first < place == last:
                goes += size * count
            elif first == place < last:
                comes += size * count
        joined = bool(p.writes("each") & self.grids.keys())
        ready = (4 * self.devices - 2) if p.each else 2 * self.devices
        tiles = plan.count if joined else min(plan.count, ready * (p.tiles.batch if p.tiles else 1))
        front = self._front(plan)
        parts = {name: part_bytes(self.grids[name], plan) for name in p.writes() & self.grids.keys()}
        written = sum(parts.values())
        generation = plan.count * sum(size for name, size in parts.items() if name in p.writes("each"))
        # joined steps read what goes until the last of them
        changes = goes + max(comes, generation) if joined else max(goes, comes)
        return stays + changes + front * written + tiles * self.open[place]

    def _shared(self, p: Pass, of_tiles: set[str]) -> set[str]:
        """The values that a pass computes once for all of its tiles; `of_tiles` gets the names of the others."""
        if p.tiles is None:
            return set()
        shared: set[str] = set()
        of_tiles |= self.grids.keys() | p.state.keys()
        for section, *_, call in p.calls():
            targets = set(call.outputs.values())
            if section == "once" and call.shared(of_tiles):
                shared |= targets
            else:
                of_tiles |= targets
        return shared

    def _front(self, plan: TilePlan) -> int:
        """How many parts wait for the next row of tiles."""
        return min(plan.count, len(plan.lefts) + 2 + 2 * self.devices)

    def _parts(self) -> Iterable[tuple[int, int, int, int]]:
        """The parts of grids: first and last pass, bytes a tile, tiles. `result` goes to the picture at once."""
        for place, (p, plan) in enumerate(self.passes):
            for name in p.writes() & self.grids.keys():
                last = max((i for i, (q, _) in enumerate(self.passes) if name in q.reads()), default=place)
                yield place, last, part_bytes(self.grids[name], plan), plan.count

    def _pass_shapes(
        self,
        bundle: Bundle,
        p: Pass,
        plan: TilePlan,
        steps: int,
        shapes: dict[tuple[Tiles | None, str], tuple[int, ...]],
    ) -> dict[str, int]:
        """The bytes of each value that a pass writes for one tile, or for the job; `shapes` gets their shapes."""
        tile = plan.tile_height, plan.tile_width
        sizes = {}
        for name, state in p.state.items():
            shapes[p.tiles, name] = (1, *state_shape(state, *tile))
            sizes[name] = 4 * math.prod(shapes[p.tiles, name])
        for *_, call in p.calls():
            component = bundle.manifest.components[call.run]
            named = {"batch": 1, "steps": steps}
            for input_name, source in call.inputs.items():
                shape = self._source_shape(source.lstrip("~"), p, tile, shapes)
                spec = component.inputs[input_name].shape
                named = {d: n for d, n in zip(spec, shape, strict=False) if isinstance(d, str)} | named
            for output, target in call.outputs.items():
                if target in self.grids:
                    continue
                spec_of = component.outputs[output]
                shapes[p.tiles, target] = tuple(_size(d, named) for d in spec_of.shape)
                sizes[target] = WIDTHS.get(spec_of.dtype, 4) * math.prod(shapes[p.tiles, target])
        return sizes

    def _source_shape(
        self, source: str, p: Pass, tile: tuple[int, int], shapes: Mapping[tuple[Tiles | None, str], tuple[int, ...]]
    ) -> tuple[int, ...]:
        if grid := self.grids.get(source):
            return (1, grid.channels, tile[0] // grid.px, tile[1] // grid.px)
        return shapes.get((p.tiles, source), shapes.get((None, source), ()))


def _size(dim: int | str, named: Mapping[str, int]) -> int:
    """A size of a shape; `h/2` is half of `h`. One that no input has counts as 1."""
    if isinstance(dim, int):
        return dim
    whole, _, part = dim.partition("/")
    return named.get(dim, named.get(whole, 1) // int(part or 1))


def _steps(p: Pass, steps: int | None) -> int:
    return 1 if p.steps is None else p.steps.count if steps is None else steps
