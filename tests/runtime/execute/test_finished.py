"""A round that was interrupted goes on from a copy of its finished nodes: its bytes are those without interruption."""

import random
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from threading import Event

import numpy as np
import pytest

from support.devices import Apart, Failing
from support.walked_systems import SYSTEMS
from support.walks import SEED, RowByRow, canvas, program_of, toys
from tilewright.runtime.errors import DeviceError
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.execute.values import on_host
from tilewright.runtime.execute.walk import Job, Walk, run


def told_by(walk):
    """Pass -> how many of its nodes with tiles are done, in a copy."""
    graph = walk.walk.graph
    return {
        p.name: sum(walk.finished.done[n].count(1) for n in numbers)
        for p, numbers in zip(walk.program.passes, graph.tile_blocks, strict=True)
    }


def stored(finished):
    """The copy as a file would hold it: arrays of the host, none of which is shared."""
    return replace(finished, values={key: np.array(on_host(value)) for key, value in finished.values.items()})


class Interrupted:
    """A walk in one process after the other, each of which may be interrupted."""

    def __init__(self, system, height, width, tile_px, batch):
        functions, self.constants, self.inputs = SYSTEMS[system]
        self.program, self.functions = program_of(system).batched(batch), functions
        overlap = 0 if system == "steered" else 16
        self.job = Job(canvas(height, width), SEED, tile_px=tile_px, overlap_px=overlap, steps=3, on_final=self.place)
        self.pixels = np.full((3, height, width), np.nan, np.float32)
        self.finished = None
        self.interruptions = 0
        self.done = Counter()  # pass -> nodes that have ended, as they were told

    def expected(self):
        job = replace(self.job, on_final=lambda *part: None, inputs=self.inputs)
        return run(self.program, toys(self.functions, RowByRow), self.constants, job)

    def place(self, top, left, part):
        rows, columns = slice(top, top + part.shape[1]), slice(left, left + part.shape[2])
        assert np.isnan(self.pixels[:, rows, columns]).all()  # no part is handed on again
        self.pixels[:, rows, columns] = part

    def go_on(self, devices, until=None):
        """Run until so many nodes of tiles have ended, on any kind of devices. Whether all have."""
        engines = toys(self.functions, RowByRow)
        executor = Executor([Apart("a", engines) if d == "apart" else CpuDevice("c", engines) for d in devices])
        walk = self.walk = Walk(self.program, executor, self.constants, self.job)
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


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("devices", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
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


# Whatever stops it


@pytest.mark.slow
def test_devices_that_fail_for_good_lose_only_the_nodes_that_ran() -> None:
    stops = Counter()
    expected = {system: Interrupted(system, 128, 192, 64, 1).expected() for system in ("in-token", "steered", "vicr")}
    for seed in range(45):
        system = list(expected)[seed % 3]
        walk = Interrupted(system, 128, 192, 64, 1)
        for turn in range(40):
            engines = toys(walk.functions, RowByRow)
            devices = [CpuDevice("c", engines), Apart("a", engines)][: 1 + seed % 2]
            kinds = ("raise", "nan", "memory") if seed % 5 else ("hang",)
            failing = [Failing(d, f"{seed} {turn} {i}", kinds, 0.1, 0.4) for i, d in enumerate(devices)]
            executor = Executor(failing, deadline_s=0.15)
            now = Walk(walk.program, executor, walk.constants, walk.job)
            try:
                now.begin(walk.inputs, finished=walk.finished)
                now.end()
                break
            except Exception as error:
                stops[type(error).__name__] += 1
                walk.finished = stored(now.copy())
            finally:
                executor.close()
        assert walk.pixels.tobytes() == expected[system].tobytes()
    assert stops.keys() >= {"RuntimeError", "AccuracyError", "ResourceError", "DeviceError"} and stops.total() > 45


@pytest.mark.parametrize("last", [1, 2, 5])
def test_a_part_whose_callback_failed_is_handed_on_again(last) -> None:
    walk = Interrupted("in-token", 128, 192, 64, 1)
    expected, place, left = walk.expected(), walk.place, [last]

    def fails(top, left_, part):
        left[0] -= 1
        if not left[0]:
            raise EOFError
        place(top, left_, part)

    walk.job = replace(walk.job, on_final=fails)
    with pytest.raises(EOFError):
        walk.go_on(["cpu", "cpu"])
    walk.finished = stored(walk.walk.copy())
    walk.job = replace(walk.job, on_final=place)
    walk.done = Counter({p: done for p, done in told_by(walk).items() if done})
    assert walk.go_on(["apart"])
    assert walk.pixels.tobytes() == expected.tobytes()


def test_values_on_a_device_that_hangs_cannot_be_kept() -> None:
    walk = Interrupted("in-token", 64, 64, 64, 1)
    released = Event()

    class Silent(Apart):
        def run(self, component, inputs, wanted):
            return released.wait(60) if len(self.up) > 8 else super().run(component, inputs, wanted)

        def get(self, buffer):
            return released.wait(60) if len(self.up) > 8 else super().get(buffer)

    executor = Executor([Silent("apart:0", toys(walk.functions, RowByRow))], deadline_s=0.2)
    now = Walk(walk.program, executor, walk.constants, walk.job)
    now.begin(walk.inputs)
    with pytest.raises(DeviceError, match="has not ended after"):
        now.end()
    with pytest.raises(DeviceError, match=r"^apart:0 holds values and does not answer; begin anew$"):
        now.copy()
    released.set()
    executor.close()
