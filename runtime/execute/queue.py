"""Which node runs next: the nodes that are ready, in the order of their longest path to the end. No threads.

A job may ask for the reverse, so that its picture becomes final from the top to the bottom. Jobs take turns: next is
the job that has run the fewest nodes. In a pass whose tiles do not read each other, only a few tiles are open at a
time, so that memory does not grow with the image. The executor and the simulation use this queue.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from tilewright.runtime.plan.lower import Block, Graph

__all__ = ["LANES", "Batch", "Queue", "Work"]

LANES = 2  # batches that a device has at once: one runs while the next is prepared

Entry = tuple[int, int, int]  # rank, or minus the rank, tile, block: the order within a job


@dataclass(eq=False)
class Work:
    """The nodes of a job that have not ended."""

    graph: Graph
    runs: frozenset[int]  # the blocks that this round runs
    key: Callable[[Block, int], Hashable]  # nodes of the same key may share a call
    owner: Any = None
    depth_first: bool = False  # finish what is begun before anything else, so that the least is in memory
    left: list[list[int]] = field(default_factory=list)  # block -> tile -> nodes it waits for
    todo: list[int] = field(default_factory=list)  # block -> nodes that are not done
    ready: dict[Hashable, list[Entry]] = field(default_factory=dict)
    postponed: dict[int, list[Entry]] = field(default_factory=dict)  # pass -> tiles that may not begin yet
    open: dict[int, int] = field(default_factory=dict)  # pass -> tiles begun and not finished
    turns: int = 0  # nodes given out so far
    stopped: bool = False

    def done(self) -> bool:
        """Whether no node is left."""
        return not any(self.todo)


@dataclass(frozen=True)
class Batch:
    """Nodes that one run of an engine takes together."""

    nodes: tuple[tuple[Work, Block, int], ...]
    device: int

    @property
    def works(self) -> tuple[Work, ...]:
        """The jobs of the nodes, each once."""
        return tuple(dict.fromkeys(work for work, *_ in self.nodes))


class Queue:
    """Ready nodes of all jobs."""

    def __init__(self, devices: int = 1, *, pass_by_pass: bool = False) -> None:
        self.pass_by_pass = pass_by_pass  # a pass begins only when the one before it has ended
        self.works: list[Work] = []
        self.busy = [0] * devices  # device -> batches that it runs or prepares
        self.retired: set[int] = set()  # devices that failed
        self.most: dict[tuple[int, str], int] = {}  # device, component -> nodes that its memory has room for in a call
        self.waiting = 0  # nodes that are ready

    def add(self, work: Work, done: Sequence[Sequence[int]] = ()) -> None:
        """Add a job. Its turns start at the lowest number of any job. `done`: block -> 1 for each tile that is done."""
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
        for block, tiles in zip(graph.blocks, done, strict=False):
            if block.number in work.runs:
                self._skip(work, block, [tile for tile, is_done in enumerate(tiles) if is_done])
        for block in graph.blocks:
            for tile, count in enumerate(work.left[block.number]):
                if not count and not (done and done[block.number][tile]):
                    self._offer(work, block, tile)

    def _skip(self, work: Work, block: Block, tiles: Sequence[int]) -> None:
        """Count nodes as done that ended before an interruption."""
        work.todo[block.number] -= len(tiles)
        for tile in tiles:
            for number, follower in self._followers(work, block, tile):
                work.left[number][follower] -= 1
        if block.private:
            blocks = work.graph.tile_blocks[block.place]
            begun = (block.number == blocks[0]) - (block.number == blocks[-1])
            work.open[block.place] = work.open.get(block.place, 0) + begun * len(tiles)

    def remove(self, work: Work) -> None:
        """Remove a job. Its nodes that are running end."""
        work.stopped = True
        if work in self.works:
            self.works.remove(work)
            self.waiting -= sum(map(len, work.ready.values()))

    def take(self, device: int) -> Batch | None:
        """The nodes that a device runs next, as many as may share a call; none if no node is ready.

        A busy device takes a batch to prepare only if enough nodes are left for the other devices, which may soon
        be idle, and if the batch is full: the call that runs now may make more nodes ready for it.
        """
        if device in self.retired or (self.busy[device] and self.waiting < len(self.busy) - len(self.retired)):
            return None
        for work in sorted((w for w in self.works if w.ready), key=lambda w: w.turns):
            if not (allowed := [key for key in work.ready if self._allowed(work, key)]):
                continue
            key = min(allowed, key=lambda key: work.ready[key][0])
            others = sorted((w for w in self.works if w is not work and key in w.ready), key=lambda w: w.turns)
            sharing = [work, *(w for w in others if self._allowed(w, key))]
            most = self._most(device, work.graph.blocks[work.ready[key][0][2]])
            if self.busy[device] and sum(len(w.ready[key]) for w in sharing) < most:
                return None
            nodes: list[tuple[Work, Block, int]] = []
            for each in sharing:
                while len(nodes) < most and key in each.ready:
                    nodes.append(self._pop(each, key))
            self.busy[device] += 1
            return Batch(tuple(nodes), device)
        return None

    def _most(self, device: int, block: Block) -> int:
        return min([block.batch, *(self.most.get((device, call.run), block.batch) for call in block.calls)])

    def split(self, batch: Batch) -> list[Batch]:
        """Its nodes in a batch for each job, each of which is to be completed or put back."""
        batches = [Batch(tuple(node for node in batch.nodes if node[0] is work), batch.device) for work in batch.works]
        self.busy[batch.device] += len(batches) - 1
        return batches

    def complete(self, batch: Batch) -> None:
        """Count nodes as done, and offer those that waited for them."""
        self.busy[batch.device] -= 1
        for work, block, tile in batch.nodes:
            if work.stopped:
                continue
            work.todo[block.number] -= 1
            self._finish(work, block)
            for number, follower in self._followers(work, block, tile):
                work.left[number][follower] -= 1
                if not work.left[number][follower]:
                    self._offer(work, work.graph.blocks[number], follower)

    def _followers(self, work: Work, block: Block, tile: int) -> Iterator[tuple[int, int]]:
        """The nodes of this round that wait for a node: their blocks and tiles."""
        for number, wait in work.graph.followers[block.number]:
            if number in work.runs:
                for follower in _above(wait.rule, wait.beneath, tile, len(work.left[number])):
                    yield number, follower

    def put_back(self, batch: Batch) -> None:
        """Offer nodes again that did not end."""
        self.busy[batch.device] -= 1
        for work, block, tile in batch.nodes:
            if not work.stopped:
                self._push(work, block, tile)

    def _offer(self, work: Work, block: Block, tile: int) -> None:
        if block.private and block.number == work.graph.tile_blocks[block.place][0]:
            if work.open.get(block.place, 0) >= (4 * len(self.busy) - 2) * block.batch:
                heappush(work.postponed.setdefault(block.place, []), _entry(work, block, tile))
                return
            work.open[block.place] = work.open.get(block.place, 0) + 1
        self._push(work, block, tile)

    def _finish(self, work: Work, block: Block) -> None:
        """Let the next tile of a private pass begin where one has ended."""
        if not block.private or block.number != work.graph.tile_blocks[block.place][-1]:
            return
        work.open[block.place] -= 1
        if postponed := work.postponed.get(block.place):
            _, tile, number = heappop(postponed)
            work.open[block.place] += 1
            self._push(work, work.graph.blocks[number], tile)

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
        work.turns += 1
        return work, work.graph.blocks[number], tile


def _entry(work: Work, block: Block, tile: int) -> Entry:
    rank = work.graph.ranks[block.number]
    return rank if work.depth_first else -rank, tile, block.number


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
