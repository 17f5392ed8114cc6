"""Devices at work: transfers, faults, cancelling, many jobs and many threads at once; bytes against one device's."""

import itertools
import random
import re
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest

from support.devices import Apart, Failing
from support.walked_systems import HITOKSR, IN_TOKEN, SYSTEMS
from support.walks import SEED, Late, RowByRow, Toy, canvas, program_of, toys
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.execute.walk import Job, Walk, run


class Picture:
    """The result of a walk, put together from its final parts."""

    def __init__(self, program, executor, constants, job):
        height, width = job.image.shape[1:]
        self.pixels = np.full((program.grids["result"].channels, height, width), np.nan, np.float32)
        self.walk = Walk(program, executor, constants, replace(job, on_final=self.place))

    def place(self, top, left, part):
        self.pixels[:, top : top + part.shape[1], left : left + part.shape[2]] = part


def small(system, height=128, width=192):
    """A job of a dozen tiles and three steps, and what it needs."""
    functions, constants, inputs = SYSTEMS[system]
    overlap = 0 if system == "steered" else 16
    job = Job(canvas(height, width), SEED, tile_px=64, overlap_px=overlap, steps=3, inputs=inputs)
    return program_of(system), toys(functions, RowByRow), constants, job


def cpus(count, engines):
    return [CpuDevice(f"cpu:{i}", engines) for i in range(count)]


# Where values lie


def test_a_sampler_with_one_tile_moves_the_latent_up_once_and_never_down() -> None:
    program, engines, constants, job = small("in-token", 64, 64)
    job.steps = 28
    device = Apart("apart:0", engines)
    executor = Executor([device])
    picture = Picture(program, executor, constants, job)
    picture.walk.run({})
    executor.close()
    latent = (1, 16, 8, 8)
    assert len(engines["step"].feeds) == 28
    assert device.up.count(latent) == 1  # its noise; what each step made stayed where it was
    assert device.down.count(latent) == 0 and device.down.count((1, 3, 64, 64)) == 1  # the picture alone comes back
    assert device.up.count(constants["context"].shape) == 1  # constants go up once
    assert picture.pixels.tobytes() == run(program, toys(IN_TOKEN), constants, job).tobytes()


@pytest.mark.parametrize("system", SYSTEMS)
def test_devices_of_two_kinds_give_the_bytes_of_one(system) -> None:
    program, engines, constants, job = small(system)
    expected = run(program, engines, constants, job)
    executor = Executor([Apart("apart:0", engines), *cpus(1, engines), Apart("apart:1", engines)])
    picture = Picture(program, executor, constants, job)
    picture.walk.run(job.inputs)
    executor.close()
    assert picture.pixels.tobytes() == expected.tobytes()


# Faults


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_a_device_that_fails_once_is_retired_and_the_picture_is_the_same(fault) -> None:
    program, engines, constants, job = small("in-token")
    expected = run(program, engines, constants, job)
    good, bad = cpus(2, engines)
    executor = Executor([Failing(bad, 0, [fault], chance=1), good])
    picture = Picture(program, executor, constants, job)
    picture.walk.run({})
    assert executor.queue.retired == {0}
    executor.close()
    assert picture.pixels.tobytes() == expected.tobytes()


def test_a_node_that_fails_everywhere_ends_its_job_and_keeps_the_devices() -> None:
    def step(**inputs):
        raise RuntimeError("a network that cannot")

    program, engines, constants, job = small("in-token")
    executor = Executor(cpus(3, engines | {"step": Toy(step)}))
    with pytest.raises(RuntimeError, match="a network that cannot"):
        Picture(program, executor, constants, job).walk.run({})
    assert executor.queue.retired == set()
    executor.close()


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(n, marks=pytest.mark.slow) for n in range(20, 60))])
def test_random_faults_end_in_the_right_picture_or_in_an_error(seed) -> None:
    system = list(SYSTEMS)[seed % len(SYSTEMS)]
    program, engines, constants, job = small(system)
    program = program.batched(1 + seed // len(SYSTEMS) % 4)
    expected = run(program, engines, constants, job)
    faults = ["raise", "nan", "memory", "hang"]
    devices = [Failing(d, 10 * seed + i, faults, 0.04, 0.8) for i, d in enumerate(cpus(3, engines))]
    executor = Executor(devices, deadline_s=0.3)
    picture = Picture(program, executor, constants, job)
    try:
        picture.walk.run(job.inputs)
    except Exception as error:
        assert re.search("fell off|not finite|out of memory|has not ended", str(error))
    else:
        assert picture.pixels.tobytes() == expected.tobytes()
    finally:
        executor.close()


# Order


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 10))])
def test_random_orders_of_completion_give_the_same_bytes(seed) -> None:
    random.seed(seed)
    for system in SYSTEMS:
        program, _, constants, job = small(system)
        expected = run(program, toys(SYSTEMS[system][0]), constants, job)
        late = run(program, toys(SYSTEMS[system][0], Late), constants, job, devices=1 + seed % 4)
        assert late.tobytes() == expected.tobytes()


def test_several_images_at_once_give_each_its_own_bytes() -> None:
    jobs = [small(system) for system in ("in-token", "in-token", "in-token")]
    program, engines, constants, _ = jobs[0]
    images = [replace(job, seed=i) for i, (*_, job) in enumerate(jobs)]
    expected = [run(program, engines, constants, job).tobytes() for job in images]
    assert len(set(expected)) == 3
    executor = Executor(cpus(2, engines))
    pictures = [Picture(program, executor, constants, job) for job in images]
    for picture in pictures:
        picture.walk.begin({})
    for picture in pictures:
        picture.walk.end()
    executor.close()
    assert [picture.pixels.tobytes() for picture in pictures] == expected


def test_a_small_image_does_not_wait_for_a_large_one() -> None:
    done = []
    slow = HITOKSR | {"decode": lambda codes: time.sleep(0.002) or HITOKSR["decode"](codes)}
    executor = Executor(cpus(1, toys(slow)))
    large = Job(canvas(64, 4096), tile_px=64, overlap_px=0)
    tiny = Job(canvas(64, 128), tile_px=64, overlap_px=0)
    pictures = {"large": Picture(program_of("hitoksr"), executor, {}, large)}
    pictures["small"] = Picture(program_of("hitoksr"), executor, {}, tiny)
    threads = []
    for name, picture in pictures.items():
        picture.walk.begin({})
        threads.append(threading.Thread(target=lambda n=name, p=picture: (p.walk.end(), done.append(n))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    executor.close()
    assert done == ["small", "large"]


# Cancelling and ending


def test_a_cancelled_job_stops_within_one_call_and_others_go_on() -> None:
    program, engines, constants, job = small("in-token")
    started = threading.Event()

    def step(**inputs):
        started.set()
        time.sleep(0.01)
        return IN_TOKEN["step"](**inputs)

    slow = engines | {"step": Toy(step)}
    executor = Executor(cpus(1, slow))
    first, second = (Picture(program, executor, constants, replace(job, seed=i, steps=20)) for i in range(2))
    first.walk.begin({})
    second.walk.begin({})
    assert started.wait(20)
    first.walk.cancel()
    with pytest.raises(CancelledError):
        first.walk.end()
    before = len(slow["step"].feeds)
    second.walk.end()
    executor.close()
    assert len(slow["step"].feeds) - before <= 12 * 20 + 2  # the second's tiles, and what ran
    assert second.pixels.tobytes() == run(program, engines, constants, replace(job, seed=1, steps=20)).tobytes()


def test_what_a_listener_raises_ends_the_job_alone() -> None:
    program, engines, constants, job = small("in-token")

    def listen(name, done, total):
        if name == "sample":
            raise KeyError("enough")

    executor = Executor(cpus(2, engines))
    with pytest.raises(KeyError, match="enough"):
        Picture(program, executor, constants, replace(job, on_progress=listen)).walk.run({})
    after = Picture(program, executor, constants, job)
    after.walk.run({})
    executor.close()
    assert after.pixels.tobytes() == run(program, engines, constants, job).tobytes()


def test_closing_cancels_what_runs_and_ends_all_threads() -> None:
    threads = threading.active_count()
    program, _, constants, job = small("in-token")
    executor = Executor(cpus(2, toys(SYSTEMS["in-token"][0], Late)))
    picture = Picture(program, executor, constants, replace(job, steps=200))
    picture.walk.begin({})
    executor.close()
    with pytest.raises(CancelledError):
        picture.walk.end()
    assert threading.active_count() == threads


@pytest.mark.parametrize("started", range(5))  # two for each device, and the one that watches
@pytest.mark.parametrize("again", [True, False])
def test_an_interrupt_between_two_threads_that_begin_harms_neither_what_follows_nor_closing(
    started, again, monkeypatch
) -> None:
    threads, left = threading.active_count(), [started]

    class Interrupted(threading.Thread):
        def start(self) -> None:
            if left[0] == 0:
                left[0] = -1
                raise KeyboardInterrupt
            left[0] -= 1
            super().start()

    monkeypatch.setattr("tilewright.runtime.execute.executor.Thread", Interrupted)
    program, engines, constants, job = small("in-token")
    executor = Executor(cpus(2, engines))
    with pytest.raises(KeyboardInterrupt):
        Picture(program, executor, constants, job).walk.begin({})
    if again:
        picture = Picture(program, executor, constants, job)
        picture.walk.run({})
        assert picture.pixels.tobytes() == run(program, engines, constants, job).tobytes()
    closing = threading.Thread(target=executor.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive() and threading.active_count() == threads


@pytest.mark.slow
def test_many_threads_submit_and_cancel_at_random_without_a_deadlock_or_a_value_left() -> None:
    program, engines, constants, _ = small("hitoksr")
    executor = Executor(cpus(3, engines))
    jobs = [Job(canvas(64, 64 + 32 * i), tile_px=32, overlap_px=16) for i in range(4)]
    expected = [run(program, engines, constants, job).tobytes() for job in jobs]
    numbers, wrong, pictures = itertools.count(), [], []

    def submit(seed):
        chance = random.Random(seed)
        while (number := next(numbers)) < 300:
            picture = Picture(program, executor, constants, jobs[number % 4])
            pictures.append(picture)
            picture.walk.begin({})
            if chance.random() < 0.3:
                picture.walk.cancel()
            try:
                picture.walk.end()
            except CancelledError:
                continue
            if picture.pixels.tobytes() != expected[number % 4]:
                wrong.append(number)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    executor.close()
    assert not wrong and not executor.tasks and not executor.queue.works
    ended = [p.walk for p in pictures if not p.walk.task.future.exception()]
    assert len(ended) > 100
    for walk in ended:
        assert not any(walk.values.parts.values()) and not any(walk.values.tiles.values())
