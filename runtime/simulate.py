"""Simulation of a job on a number of devices: the executor's queue with a virtual clock, without engines."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from tilewright.runtime.bundle.program import state_shape
from tilewright.runtime.execute.queue import Batch, Queue, Work
from tilewright.runtime.plan.lower import Block, Graph

__all__ = ["Cost", "Run", "Simulation", "simulate", "svg", "timeline"]

LANES = 2  # as in the executor: one batch runs while the next is prepared
SHOWN = 16  # devices in the timeline of text
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


def simulate(graphs: Sequence[Graph], devices: int, cost: Cost) -> Simulation:
    """Run the nodes of these images on so many devices, all submitted at once."""
    queue = Queue(devices)
    works = [Work(graph, frozenset(range(len(graph.blocks))), _key(i), i) for i, graph in enumerate(graphs)]
    for work in works:
        queue.add(work)
    free = [0.0] * devices  # when a device's last batch ends
    lanes = [(0, device) for device in range(devices)]  # the least busy first
    ends: list[tuple[float, int, Batch]] = []
    runs: list[Run] = []
    now, ledgers = 0.0, [_Ledger(graph) for graph in graphs]
    peak = 0
    while True:
        while lanes and (batch := queue.take(lanes[0][1])):
            load, device = heappop(lanes)
            if load + 1 < LANES:
                heappush(lanes, (load + 1, device))
            start = max(now + _join_s(batch.nodes[0][1], cost), free[device])
            free[device] = start + _seconds(batch.nodes[0][1], cost)
            runs.append(_run(batch, start, free[device]))
            heappush(ends, (free[device], len(runs), batch))
        if not ends:
            break
        now, _, batch = heappop(ends)
        queue.complete(batch)
        for work, block, tile in batch.nodes:
            ledgers[work.owner].ran(block, tile)
        peak = max(peak, sum(ledger.bytes for ledger in ledgers))
        load = queue.busy[batch.device]
        lanes = [(n, d) for n, d in lanes if d != batch.device]
        lanes.append((load, batch.device))
        heapify(lanes)
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
        self.graph, self.bytes = graph, 0
        self.unread: dict[tuple[str, int, int], int] = {}  # grid, block, tile -> nodes that have yet to read the part

    def ran(self, block: Block, tile: int) -> None:
        """Count what a node wrote, and drop what it was the last to read."""
        for grid, writer in block.reads:
            if writer is not None:
                over = next(over for number, over in self.graph.readers[grid, writer] if number == block.number)
                for part in over.below(tile):
                    self._read(grid, writer, part)
        for grid in block.writes:
            readers = self.graph.readers.get((grid, block.number), ())
            if count := sum(over.count_above(tile) for _, over in readers):
                self.unread[grid, block.number, tile] = count
                self.bytes += self._part_bytes(grid, block)
        p = self.graph.program.passes[block.place]
        if p.state and block.section != "shared":
            blocks = [n for n in self.graph.of_pass[p.name] if self.graph.blocks[n].section != "shared"]
            here = self.graph.plan(block).tiles[tile]
            shapes = [state_shape(state, here.height, here.width) for state in p.state.values()]
            state_bytes = 4 * sum(math.prod(shape) for shape in shapes)
            self.bytes += state_bytes * ((block.number == blocks[0]) - (block.number == blocks[-1]))

    def _read(self, grid: str, writer: int, part: int) -> None:
        self.unread[grid, writer, part] -= 1
        if not self.unread[grid, writer, part]:
            del self.unread[grid, writer, part]
            self.bytes -= self._part_bytes(grid, self.graph.blocks[writer])

    def _part_bytes(self, name: str, block: Block) -> int:
        grid, plan = self.graph.program.grids[name], self.graph.plan(block)
        return 4 * grid.channels * (plan.tile_height // grid.px) * (plan.tile_width // grid.px)


def timeline(simulation: Simulation, columns: int = 72) -> str:
    """A line for each device: the last digit of the step that runs, or a dot where none runs."""
    scale = columns / simulation.makespan_s
    lines = []
    for device in range(min(simulation.devices, SHOWN)):
        line = ["."] * columns
        for run in (run for run in simulation.runs if run.device == device):
            for column in range(int(run.start_s * scale), max(int(run.start_s * scale) + 1, round(run.end_s * scale))):
                line[min(column, columns - 1)] = str(run.step % 10)
        lines.append(f"{device:>4} {''.join(line)}")
    more = simulation.devices - SHOWN
    return "\n".join([*lines, *([f"     and {more} more devices"] if more > 0 else [])])


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
    for run in (run for run in simulation.runs if run.device < rows):
        what = f"{run.pass_name}, step {run.step + 1}, tiles {', '.join(map(str, run.tiles))}, image {run.image + 1}"
        colour = _colour(run.step / max(1, last) if run.pass_name in stepped else None, run.image)
        x, width = LEFT + run.start_s * scale, max(0.2, (run.end_s - run.start_s) * scale - 0.6)
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


def _colour(progress: float | None, image: int) -> str:
    """Blue for the first step, orange for the last, grey without steps; darker for some of several images."""
    light = 60 - 12 * (image % 3)
    return f"hsl(0 0% {light}%)" if progress is None else f"hsl({240 - 205 * progress:.0f} 65% {light}%)"
