"""Which node runs next: the nodes that are ready, in the order of their longest path to the end. Pure, no threads.

Jobs take turns by the work they were given so far. A tile that keeps its state to itself is finished before many others
begin, so that memory does not grow with the image. The threads that run nodes, and the simulation, drive this.
"""

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from tilewright.runtime.plan.lower import Block, Graph

__all__ = ["Batch", "Queue", "Work"]

Entry = tuple[int, int, int]  # minus the rank, tile, block: the order within a job


@dataclass(eq=False)
class Work:
    """A job's nodes, and how far they are."""

    graph: Graph
    runs: frozenset[int]  # the blocks of this round
    key: Callable[[Block, int], Hashable]  # nodes of one key may share a call
    owner: Any = None
    left: list[list[int]] = field(default_factory=list)  # block -> tile -> nodes it waits for
    todo: list[int] = field(default_factory=list)  # block -> nodes that are not done
    ready: dict[Hashable, list[Entry]] = field(default_factory=dict)
    held: dict[int, list[Entry]] = field(default_factory=dict)  # pass -> tiles that may not begin yet
    open: dict[int, int] = field(default_factory=dict)  # pass -> tiles begun and not finished
    turns: int = 0  # nodes given out so far
    running: int = 0
    stopped: bool = False

    def done(self) -> bool:
        """Whether no node is left."""
        return not any(self.todo)


@dataclass(frozen=True)
class Batch:
    """Nodes that one run of an engine takes together."""

    nodes: tuple[tuple[Work, Block, int], ...]
    device: int


class Queue:
    """Ready nodes of all jobs."""

    def __init__(self, devices: int = 1, *, pass_by_pass: bool = False) -> None:
        self.pass_by_pass = pass_by_pass  # no pass begins before the one before it has ended
        self.works: list[Work] = []
        self.busy = [0] * devices  # batches that a device runs or makes ready
        self.retired: set[int] = set()  # devices that failed
        self.waiting = 0  # nodes that are ready

    def add(self, work: Work) -> None:
        """Take a job in; it begins level with the job that was given least."""
        graph = work.graph
        work.turns = min((w.turns for w in self.works), default=0)
        work.todo = [block.size if block.number in work.runs else 0 for block in graph.blocks]
        work.left = [[] for _ in graph.blocks]
        self.works.append(work)
        for block in graph.blocks:
            if block.number in work.runs:
                waits = [w for w in block.waits if w.block in work.runs]
                work.left[block.number] = [
                    sum(_count(graph, w.block, w.beneath, w.rule, tile) for w in waits) for tile in range(block.size)
                ]
        for block in graph.blocks:
            for tile, count in enumerate(work.left[block.number]):
                if not count:
                    self._offer(work, block, tile)

    def remove(self, work: Work) -> None:
        """Take a job out; what runs is let run."""
        work.stopped = True
        if work in self.works:
            self.works.remove(work)
            self.waiting -= sum(map(len, work.ready.values()))

    def take(self, device: int) -> Batch | None:
        """The nodes that a device runs next, as many as may share a call; none when all wait.

        A busy device takes a batch to make it ready only where enough is left for all others: they may soon be idle.
        """
        if device in self.retired or (self.busy[device] and self.waiting < len(self.busy) - len(self.retired)):
            return None
        for work in sorted((w for w in self.works if w.ready), key=lambda w: w.turns):
            if not (allowed := [key for key in work.ready if self._allowed(work, key)]):
                continue
            key = min(allowed, key=lambda key: work.ready[key][0])
            first = self._pop(work, key)
            nodes, most = [first], first[1].batch
            for other in [work, *(w for w in sorted(self.works, key=lambda w: w.turns) if w is not work)]:
                while len(nodes) < most and key in other.ready:
                    nodes.append(self._pop(other, key))
            self.busy[device] += 1
            return Batch(tuple(nodes), device)
        return None

    def complete(self, batch: Batch) -> None:
        """Count nodes as done, and offer those that waited for them."""
        self.busy[batch.device] -= 1
        for work, block, tile in batch.nodes:
            work.running -= 1
            if work.stopped:
                continue
            work.todo[block.number] -= 1
            self._finish(work, block)
            for number, wait in work.graph.followers[block.number]:
                if number not in work.runs:
                    continue
                left = work.left[number]
                for follower in _above(wait.rule, wait.beneath, tile, len(left)):
                    left[follower] -= 1
                    if not left[follower]:
                        self._offer(work, work.graph.blocks[number], follower)

    def put_back(self, batch: Batch) -> None:
        """Offer nodes again that did not run to their end."""
        self.busy[batch.device] -= 1
        for work, block, tile in batch.nodes:
            work.running -= 1
            if not work.stopped:
                self._push(work, block, tile)

    def _offer(self, work: Work, block: Block, tile: int) -> None:
        if block.private and self._begins(work, block):
            if work.open.get(block.place, 0) >= (4 * len(self.busy) - 2) * block.batch:
                heappush(work.held.setdefault(block.place, []), _entry(work, block, tile))
                return
            work.open[block.place] = work.open.get(block.place, 0) + 1
        self._push(work, block, tile)

    def _finish(self, work: Work, block: Block) -> None:
        """Let the next tile of a private pass begin where one has ended."""
        if not block.private or block.section == "shared" or block.number != _last(work, block):
            return
        work.open[block.place] -= 1
        if held := work.held.get(block.place):
            _, tile, number = heappop(held)
            work.open[block.place] += 1
            self._push(work, work.graph.blocks[number], tile)

    def _begins(self, work: Work, block: Block) -> bool:
        blocks = work.graph.of_pass[work.graph.program.passes[block.place].name]
        return block.section != "shared" and block.number == next(
            n for n in blocks if work.graph.blocks[n].section != "shared"
        )

    def _allowed(self, work: Work, key: Hashable) -> bool:
        if not self.pass_by_pass:
            return True
        place = work.graph.blocks[work.ready[key][0][2]].place
        return not any(left for block, left in zip(work.graph.blocks, work.todo, strict=True) if block.place < place)

    def _push(self, work: Work, block: Block, tile: int) -> None:
        self.waiting += 1
        heappush(work.ready.setdefault(work.key(block, tile), []), _entry(work, block, tile))

    def _pop(self, work: Work, key: Hashable) -> tuple[Work, Block, int]:
        _, tile, number = heappop(work.ready[key])
        if not work.ready[key]:
            del work.ready[key]
        self.waiting -= 1
        work.running += 1
        work.turns += 1
        return work, work.graph.blocks[number], tile


def _entry(work: Work, block: Block, tile: int) -> Entry:
    return -work.graph.ranks[block.number], tile, block.number


def _last(work: Work, block: Block) -> int:
    return work.graph.of_pass[work.graph.program.passes[block.place].name][-1]


def _count(graph: Graph, block: int, under: Any, rule: str, tile: int) -> int:
    if under is not None:
        count: int = under.count_below(tile)
        return count
    return 1 if rule == "same" else graph.blocks[block].size


def _above(rule: str, under: Any, tile: int, size: int) -> Collection[int]:
    if under is not None:
        tiles: list[int] = under.above(tile)
        return tiles
    return (tile,) if rule == "same" else range(size)
