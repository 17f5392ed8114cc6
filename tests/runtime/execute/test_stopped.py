"""A call that nobody waits for any more is stopped: by ONNX Runtime, by a device of a test, and for a deadline."""

import threading
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import onnx
import pytest

from support.devices import Stopped
from support.endless import endless_bundle, endless_graph
from support.walked_systems import HITOKSR
from support.walks import RowByRow, canvas, program_of, toys
from tilewright.runtime import load
from tilewright.runtime.engines.ort import open_graph
from tilewright.runtime.errors import DeviceError
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.execute.walk import Job, Walk, run

PROGRAM = program_of("hitoksr").batched(2)
CONSTANTS = {}
JOB = Job(canvas(64, 64))


class Picture:
    """The result of a job on these devices, which is one part."""

    def __init__(self, executor, job):
        self.walk = Walk(PROGRAM, executor, CONSTANTS, replace(job, on_final=self.take))

    def take(self, top, left, part):
        self.pixels = np.array(part)


def walks(executor, *jobs):
    return [Picture(executor, job).walk for job in jobs]


def right():
    return run(PROGRAM, toys(HITOKSR), CONSTANTS, JOB).tobytes()


@pytest.fixture
def device():
    return Stopped(CpuDevice("cpu:0", toys(HITOKSR, RowByRow)))


def cancelled(walk):
    with pytest.raises(CancelledError):
        walk.end()


def test_a_cancelled_job_stops_its_call_and_the_device_runs_the_next_job(device) -> None:
    executor = Executor([device])
    first, second = Picture(executor, JOB), Picture(executor, JOB)
    first.walk.begin({})
    assert device.runs.wait(20)
    first.walk.cancel()
    cancelled(first.walk)
    device.ended.wait(20)
    device.released.set()
    second.walk.run({})
    executor.close()
    assert device.stops >= 1 and not executor.queue.retired and not second.walk.job.notes
    assert second.pixels.tobytes() == right()


def test_a_call_for_two_jobs_is_stopped_only_when_both_are_cancelled(device) -> None:
    executor = Executor([device])
    with executor.changed:  # both are there before the device looks
        one, two = walks(executor, JOB, replace(JOB, image=canvas(64, 64)[::-1]))
        one.begin({})
        two.begin({})
    assert device.runs.wait(20)
    with executor.changed:
        assert len(executor.calls.running[0].batch.works) == 2
    one.cancel()
    cancelled(one)
    assert device.stops == 0 and len(executor.calls.running) == 1
    two.cancel()
    cancelled(two)
    executor.close()
    assert device.stops >= 1 and device.calls == 1


def test_the_other_job_of_a_call_gets_its_picture(device) -> None:
    executor = Executor([device])
    with executor.changed:
        one, two = Picture(executor, replace(JOB, image=canvas(64, 64)[::-1])), Picture(executor, JOB)
        one.walk.begin({})
        two.walk.begin({})
    assert device.runs.wait(20)
    one.walk.cancel()
    device.released.set()
    two.walk.end()
    executor.close()
    assert device.stops == 0 and two.pixels.tobytes() == right()


def test_closing_stops_the_calls(device) -> None:
    executor = Executor([device])
    (walk,) = walks(executor, JOB)
    walk.begin({})
    assert device.runs.wait(20)
    executor.close()
    cancelled(walk)
    assert device.calls == 1 and not any(thread.is_alive() for thread in executor.threads)


def test_a_call_over_its_deadline_is_stopped(device) -> None:
    threads = threading.active_count()
    executor = Executor([device], deadline_s=0.2)
    (walk,) = walks(executor, JOB)
    with pytest.raises(DeviceError, match="has not ended"):
        walk.run({})
    executor.close()
    for thread in executor.threads:
        thread.join(20)
    assert device.stops >= 1 and threading.active_count() == threads


# ONNX Runtime


def test_onnx_runtime_stops_the_call_of_one_thread_and_runs_again(tmp_path) -> None:
    onnx.save(endless_graph(), tmp_path / "endless.onnx")
    engine = open_graph(tmp_path / "endless.onnx", {}, threads=1)
    errors = {}

    def call():
        try:
            engine.run({"image": np.ones((1, 3, 8, 8), np.float32)}, ["sharp"])
        except CancelledError as error:
            errors[threading.get_ident()] = error

    calls = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    for thread in calls:
        thread.start()
    while len(engine.running) < 2:
        pass
    for count, thread in enumerate(calls, 1):
        engine.stop(0)  # no call
        while thread.is_alive():
            engine.stop(thread.ident)
            thread.join(0.01)
        assert len(errors) == count and thread.ident in errors
    assert not engine.running


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_cancelled_restoration_leaves_an_endless_call(tmp_path, memory) -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    with load(endless_bundle(tmp_path / "b"), memory=memory, threads=1) as restorer:
        ticket = restorer.submit(picture, tile=32, overlap=16)
        with restorer.executor.changed:
            while not restorer.executor.calls.running:
                restorer.executor.changed.wait(0.01)
        ticket.cancel()
        with pytest.raises(CancelledError):
            ticket.result()
    assert not any(thread.is_alive() for thread in restorer.executor.threads)
