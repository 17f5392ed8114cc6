"""Simulation of a job on a number of devices: the executor's queue with a virtual clock, without engines."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from tilewright.runtime.bundle.program import Program, state_shape
from tilewright.runtime.errors import UsageError
from tilewright.runtime.execute.queue import LANES, Batch, Queue, Work
from tilewright.runtime.images.canvas import padded
from tilewright.runtime.inputs import whole
from tilewright.runtime.plan.lower import Block, Graph, lower
from tilewright.runtime.plan.passes import least_px, part_bytes, plan_of

__all__ = ["Cost", "Run", "Simulation", "graph_of", "simulate", "svg", "timeline"]

SHOWN = 16  # devices in the timeline of text
MOST_NODES = 5_000_000
WIDTH, LEFT, ROW = 1000, 60, 18  # of the timeline's picture: its bars, the names of devices, the height of a row


@dataclass(frozen=True)
class Cost:
    """Seconds that a node takes: its engines, and joining the tiles that it reads."""

    step_s: float
    join_s: float = 0.0


@dataclass(frozen=True)
class Run:
    """One batch on a device, with the times at which its engines began and ended."""

    device: int
    pass_name: str
    step: int
    tiles: tuple[int, ...]
    image: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Simulation:
    """The runs of a simulation, and its totals."""

    devices: int
    runs: tuple[Run, ...]
    makespan_s: float
    critical_path_s: float  # a lower bound for any number of devices
    work_s: float
    peak_bytes: int  # parts of grids and states of tiles that wait to be read; no engine, no input, no result

    @property
    def utilisation(self) -> float:
        """The share of the devices' time in which engines ran."""
        return self.work_s / (self.devices * self.makespan_s)

    @property
    def bound_s(self) -> float:
        """A lower bound for the time of any order of the nodes on these devices."""
        return max(self.critical_path_s, self.work_s / self.devices)


def graph_of(
    program: Program,
    width: int,
    height: int,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    steps: int | None = None,
    images: int = 1,
) -> Graph:
    """The nodes of an image whose result has this size. More than can be simulated, for so many images, are refused."""
    least = least_px(program, tile)
    wide, high = (padded(side, program.multiple_px, least) for side in (width, height))
    plans = {p.name: plan_of(program, p, high, wide, tile, overlap) for p in program.passes}
    steps = None if steps is None else whole("steps", steps, 1)
    counts = {p.name: steps or p.steps.count for p in program.passes if p.steps}
    if steps is not None and not counts:
        raise UsageError(f"steps={steps}: this bundle has no steps; leave it out")
    if steps is not None and steps < 1:
        raise UsageError(f"steps={steps} must be at least 1")
    nodes = images * sum(plans[p.name].count * counts.get(p.name, 1) for p in program.passes)
    if nodes > MOST_NODES:
        raise UsageError(
            f"{width}x{height} px, {images} image(s): {nodes} nodes are too many to simulate, at most {MOST_NODES} can"
            " be; use a larger tile, fewer steps or fewer images"
        )
    return lower(program, plans, counts)


def simulate(graphs: Sequence[Graph], devices: int, cost: Cost) -> Simulation:
    """Run the nodes of these images on so many devices, all submitted at once."""
    queue = Queue(devices)
    works = [Work(graph, frozenset(range(len(graph.blocks))), _key(i), i) for i, graph in enumerate(graphs)]
    for work in works:
        queue.add(work)
    free = [0.0] * devices  # when a device's last batch ends
    idle = [(0, device) for device in range(devices)]  # the least busy first; an entry may be out of date
    ends: list[tuple[float, int, Batch]] = []
    runs: list[Run] = []
    now, ledgers = 0.0, [_Ledger(graph) for graph in graphs]
    held = peak = 0
    while True:
        while idle:
            load, device = idle[0]
            if load != queue.busy[device]:
                heappop(idle)
                continue
            if (batch := queue.take(device)) is None:
                break
            heappop(idle)
            if load + 1 < LANES:
                heappush(idle, (load + 1, device))
            start = max(now + _join_s(batch.nodes[0][1], cost), free[device])
            free[device] = start + _seconds(batch.nodes[0][1], cost)
            runs.append(_run(batch, start, free[device]))
            heappush(ends, (free[device], len(runs), batch))
        if not ends:
            break
        now, _, batch = heappop(ends)
        queue.complete(batch)
        held += sum(ledgers[work.owner].ran(block.number, tile) for work, block, tile in batch.nodes)
        peak = max(peak, held)
        heappush(idle, (queue.busy[batch.device], batch.device))
    critical = max(_critical_path(graph, cost) for graph in graphs)
    work_s = sum(run.end_s - run.start_s for run in runs)
    return Simulation(devices, tuple(runs), now, critical, work_s, peak)


def _key(image: int) -> Callable[[Block, int], Hashable]:
    return lambda block, tile: (block.number, image)


def _seconds(block: Block, cost: Cost) -> float:
    return 0.0 if block.section == "shared" else cost.step_s


def _join_s(block: Block, cost: Cost) -> float:
    return cost.join_s if any(writer is not None for _, writer in block.reads) else 0.0


def _run(batch: Batch, start: float, end: float) -> Run:
    work, block, _ = batch.nodes[0]
    name = work.graph.program.passes[block.place].name
    return Run(batch.device, name, block.step, tuple(tile for *_, tile in batch.nodes), work.owner, start, end)


def _critical_path(graph: Graph, cost: Cost) -> float:
    longest: dict[int, float] = {}
    for block in reversed(graph.blocks):
        after = max((longest[n] for n, _ in graph.followers[block.number]), default=0.0)
        longest[block.number] = _seconds(block, cost) + _join_s(block, cost) + after
    return max(longest.values())


class _Ledger:
    """The bytes that a job's values hold while its nodes run."""

    def __init__(self, graph: Graph) -> None:
        grids = graph.program.grids
        sizes = {
            (grid, block.number): part_bytes(grids[grid], block.plan) for block in graph.blocks for grid in block.writes
        }
        # grid, block -> tile -> nodes that have yet to read the part
        unread = {(grid, number): [0] * graph.blocks[number].size for grid, number in sizes}
        over = {(key, number): lies for key, readers in graph.readers.items() for number, lies in readers}
        self.reads = [
            [
                (over[(grid, writer), block.number].below, unread[grid, writer], sizes[grid, writer])
                for grid, writer in block.reads
                if writer is not None
            ]
            for block in graph.blocks
        ]
        self.writes = [
            [
                ([lies for _, lies in graph.readers.get((grid, block.number), ())], unread[grid, block.number], size)
                for grid in block.writes
                for size in [sizes[grid, block.number]]
            ]
            for block in graph.blocks
        ]
        self.states = [_state_bytes(graph, block) for block in graph.blocks]

    def ran(self, block: int, tile: int) -> int:
        """The bytes that a node adds: its outputs, less what it was the last to read."""
        added = self.states[block]
        for below, unread, size in self.reads[block]:
            for part in below(tile):
                unread[part] -= 1
                if not unread[part]:
                    added -= size
        for readers, unread, size in self.writes[block]:
            unread[tile] = sum(lies.count_above(tile) for lies in readers)
            added += size if unread[tile] else 0
        return added


def _state_bytes(graph: Graph, block: Block) -> int:
    """The bytes of a tile's states, added by the first node of the tile and taken away by the last."""
    p = graph.program.passes[block.place]
    if not p.state or block.section == "shared":
        return 0
    blocks, plan = graph.tile_blocks[block.place], block.plan
    shapes = [state_shape(state, plan.tile_height, plan.tile_width) for state in p.state.values()]
    return 4 * sum(map(math.prod, shapes)) * ((block.number == blocks[0]) - (block.number == blocks[-1]))


def timeline(simulation: Simulation, columns: int = 72) -> str:
    """A line for each device: the last digit of the step that runs, or a dot where none runs."""
    scale = columns / simulation.makespan_s
    lines = [["."] * columns for _ in range(min(simulation.devices, SHOWN))]
    for run in (run for run in simulation.runs if run.device < SHOWN):
        first = int(run.start_s * scale)
        for column in range(first, max(first + 1, round(run.end_s * scale))):
            lines[run.device][min(column, columns - 1)] = str(run.step % 10)
    more = simulation.devices - SHOWN
    rows = [f"{device:>4} {''.join(line)}" for device, line in enumerate(lines)]
    return "\n".join([*rows, *([f"     and {more} more devices"] if more > 0 else [])])


def svg(simulation: Simulation) -> str:
    """The timeline as a picture: a row for each device, a bar for each batch, coloured by its step."""
    rows = min(simulation.devices, 4 * SHOWN)
    scale, below = WIDTH / simulation.makespan_s, ROW * rows + 6
    last = max(run.step for run in simulation.runs)
    stepped = {run.pass_name for run in simulation.runs if run.step}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {below + 62}"'
        ' font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for device in range(rows):
        parts.append(f'<text x="4" y="{ROW * device + 13}">device {device}</text>')
    for bar in _bars([run for run in simulation.runs if run.device < rows], 1 / scale):
        run, tiles = bar[0], [tile for run in bar for tile in run.tiles]
        named = f"tiles {', '.join(map(str, tiles))}" if len(bar) == 1 else f"{len(tiles)} tiles"
        what = f"{run.pass_name}, step {run.step + 1}, {named}, image {run.image + 1}"
        colour = _colour(run.step / max(1, last) if run.pass_name in stepped else None, run.image)
        x, width = LEFT + run.start_s * scale, max(0.2, (bar[-1].end_s - run.start_s) * scale - 0.6)
        parts.append(
            f'<rect x="{x:.2f}" y="{ROW * run.device + 2}" height="{ROW - 4}" width="{width:.2f}"'
            f' fill="{colour}"><title>{what}</title></rect>'
        )
    for tenth in range(0, 11, 2):
        x = LEFT + WIDTH * tenth / 10
        parts.append(f'<line x1="{x}" x2="{x}" y1="{below - 4}" y2="{below}" stroke="black"/>')
        parts.append(f'<text x="{x}" y="{below + 12}" text-anchor="middle">{simulation.makespan_s * tenth / 10:.1f}')
        parts.append(" s</text>")
    for place in range(40):  # the scale of colours
        parts.append(f'<rect x="{LEFT + 60 + 3 * place}" y="{below + 28}" height="12" width="3"')
        parts.append(f' fill="{_colour(place / 39, 0)}"/>')
    parts.append(f'<text x="{LEFT}" y="{below + 38}">first step</text>')
    parts.append(f'<text x="{LEFT + 186}" y="{below + 38}">last step</text>')
    parts.append(f'<rect x="{LEFT + 260}" y="{below + 28}" height="12" width="12" fill="{_colour(None, 0)}"/>')
    parts.append(f'<text x="{LEFT + 278}" y="{below + 38}">a pass without steps</text>')
    parts.append(f'<text x="{LEFT + 440}" y="{below + 38}">engines ran {simulation.utilisation:.1%} of the time</text>')
    return "".join(f"{part}\n" if part.endswith(">") else part for part in [*parts, "</svg>"])


def _bars(runs: Sequence[Run], pixel_s: float) -> list[list[Run]]:
    """Runs that are drawn as one bar: alike, side by side, and each too narrow to be seen."""
    bars: list[list[Run]] = []
    last: dict[int, list[Run]] = {}  # device -> its last bar
    for run in sorted(runs, key=lambda run: run.start_s):
        bar = last.get(run.device)
        narrow = run.end_s - run.start_s < 2 * pixel_s
        if bar and narrow and _kind(run) == _kind(bar[0]) and run.start_s - bar[-1].end_s < pixel_s:
            bar.append(run)
        else:
            last[run.device] = [run]
            bars.append(last[run.device])
    return bars


def _kind(run: Run) -> tuple[str, int, int]:
    return run.pass_name, run.step, run.image


def _colour(progress: float | None, image: int) -> str:
    """Blue for the first step, orange for the last, grey without steps; darker for some of several images."""
    light = 60 - 12 * (image % 3)
    return f"hsl(0 0% {light}%)" if progress is None else f"hsl({240 - 205 * progress:.0f} 65% {light}%)"
