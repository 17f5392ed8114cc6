"""A round that was interrupted goes on from a copy of its finished nodes: its bytes are those without interruption."""

import random
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest

from support.devices import Apart
from support.walked_systems import SYSTEMS
from support.walks import SEED, canvas, in_batches, program_of, toys
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.execute.values import on_host
from tilewright.runtime.execute.walk import Job, Walk, run


def stored(finished):
    """The copy as a file would hold it: arrays of the host, none of which is shared."""
    return replace(finished, values={key: np.array(on_host(value)) for key, value in finished.values.items()})


class Interrupted:
    """A walk in one process after the other, each of which may be interrupted."""

    def __init__(self, system, height, width, tile_px, batch):
        functions, self.constants, self.inputs = SYSTEMS[system]
        self.program, self.functions = in_batches(program_of(system), batch), functions
        overlap = 0 if system == "steered" else 16
        self.job = Job(canvas(height, width), SEED, tile_px=tile_px, overlap_px=overlap, steps=3, on_final=self.place)
        self.pixels = np.full((3, height, width), np.nan, np.float32)
        self.finished = None
        self.interruptions = 0
        self.done = Counter()  # pass -> nodes that have ended, as they were told

    def expected(self):
        job = replace(self.job, on_final=lambda *part: None, inputs=self.inputs)
        return run(self.program, toys(self.functions), self.constants, job)

    def place(self, top, left, part):
        rows, columns = slice(top, top + part.shape[1]), slice(left, left + part.shape[2])
        assert np.isnan(self.pixels[:, rows, columns]).all()  # no part is handed on again
        self.pixels[:, rows, columns] = part

    def go_on(self, devices, until=None):
        """Run until so many nodes of tiles have ended, on any kind of devices. Whether all have."""
        engines = toys(self.functions)
        executor = Executor([Apart("a", engines) if d == "apart" else CpuDevice("c", engines) for d in devices])
        walk = Walk(self.program, executor, self.constants, self.job)
        left = until

        def on_progress(name, done, total):
            nonlocal left
            assert done <= total
            if started:  # before, it tells what an earlier process has finished
                left = None if left is None else left - (done - self.done[name])
                assert done > self.done[name]
                self.done[name] = done
                if left is not None and left <= 0:
                    walk.cancel()
            else:
                assert done == self.done[name]

        started = False
        walk.job = replace(self.job, on_progress=on_progress)
        try:
            with executor.changed:  # no node ends inside
                walk.begin(self.inputs, finished=self.finished)
                started = True
            walk.end()
            return True
        except CancelledError:
            self.interruptions += 1
            self.finished = stored(walk.copy())
            return False
        finally:
            executor.close()


GRIDS = [(128, 192, 64), (64, 64, 64), (128, 320, 128)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_walk_that_is_interrupted_at_random_nodes_gives_the_same_bytes(system, devices, batch) -> None:
    rng = random.Random(f"{system} {devices} {batch}")
    interruptions = 0
    for grid in GRIDS if system != "private" else GRIDS[:2]:  # its toy knows one size of tiles
        expected = Interrupted(system, *grid, batch).expected()
        for _ in range(4):
            walk = Interrupted(system, *grid, batch)
            while not walk.go_on(rng.choices(["cpu", "apart"], k=rng.randint(1, devices)), rng.randint(1, 20)):
                pass
            assert walk.pixels.tobytes() == expected.tobytes()
            interruptions += walk.interruptions
    assert interruptions > 1
