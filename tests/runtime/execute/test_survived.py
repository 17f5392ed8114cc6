"""Devices that hang or have too little memory: others go on, and the picture has the bytes of a job without faults."""

import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest

from support.devices import Cramped, Hanging, Lost
from support.walked_systems import HITOKSR
from support.walks import Late, Toy, canvas, program_of, toys
from tilewright.runtime.bundle.program import Signature, TensorSpec
from tilewright.runtime.errors import BundleError, DeviceError, ResourceError
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.execute.walk import Job, Walk, run

PROGRAM, ENGINES = program_of("hitoksr"), toys(HITOKSR)


def job_of(pixels, **options):
    def place(top, left, part):
        pixels[:, top : top + part.shape[1], left : left + part.shape[2]] = part

    return Job(canvas(64, 256), tile_px=32, overlap_px=16, on_final=place, **options)


def walk_on(executor, program=PROGRAM):
    pixels = np.full((3, 64, 256), np.nan, np.float32)
    return Walk(program, executor, {}, job_of(pixels)), pixels


def expected(program=PROGRAM):
    return run(program, ENGINES, {}, job_of(np.empty((3, 64, 256), np.float32))).tobytes()


def cpus(count):
    return [CpuDevice(f"cpu:{i}", ENGINES) for i in range(count)]


# Hangs


@pytest.mark.parametrize("at", [1, 2, 9])
def test_a_device_that_hangs_is_not_used_again_and_its_late_result_is_ignored(at):
    hanging = Hanging(cpus(1)[0], at)
    good = CpuDevice("cpu:1", toys(HITOKSR, Late))  # slower, so that the other one is sure to get as many calls
    executor = Executor([hanging, good], deadline_s=1)  # the good one must keep to it on a busy machine too
    walk, pixels = walk_on(executor)
    walk.run({})
    assert pixels.tobytes() == expected()
    assert executor.hung == {0} == executor.queue.retired
    assert any(note.startswith("cpu:0 hangs in ") for note in walk.job.notes)
    calls = hanging.calls
    hanging.released.set()
    assert hanging.late.wait(20)
    walk, pixels = walk_on(executor)
    walk.run({})
    assert pixels.tobytes() == expected()
    assert hanging.calls <= calls + 1  # it may have been between two calls of a node
    executor.close()


def test_the_only_device_hangs_and_every_job_ends_with_an_error_that_says_where():
    hanging = Hanging(cpus(1)[0], 5)
    executor = Executor([hanging], deadline_s=0.3)
    walks = [walk_on(executor)[0] for _ in range(2)]
    for walk in walks:
        walk.begin({})
    for walk in walks:
        with pytest.raises(DeviceError, match=r"^cpu:0: \w+ has not ended after \d+ s; if the call is") as caught:
            walk.end()
        assert caught.value.exit_code == 9
    with pytest.raises(DeviceError, match="no device answers"):
        walk_on(executor)[0].run({})
    executor.close()  # which does not wait for the thread that hangs
    hanging.released.set()


# Lost machines


@pytest.mark.parametrize("at", [1, 4])
def test_a_job_goes_on_with_the_last_device_that_is_not_lost(at):
    first, second, good = cpus(3)
    losing = [Lost(first, at), Lost(second, at)]
    executor = Executor([*losing, CpuDevice(good.name, toys(HITOKSR, Late))])
    for _ in range(2):
        walk, pixels = walk_on(executor)
        walk.run({})
        assert pixels.tobytes() == expected()
    assert executor.gone == {0, 1} == executor.queue.retired
    assert all(device.calls <= at + 1 for device in losing)  # it may have been between two calls of a node
    executor.close()


def test_a_node_whose_devices_are_lost_one_after_another_is_not_at_fault():
    class LostAtTile(Lost):
        def begin(self, rows):
            if any(tile == 5 for _, tile in rows) and len(victims) < 2 and self not in victims:
                victims.append(self)
                self.at = 0

    victims = []
    executor = Executor([LostAtTile(device, 10**6) for device in cpus(3)])
    walk, pixels = walk_on(executor)
    walk.run({})
    assert pixels.tobytes() == expected()
    assert executor.gone == {executor.devices.index(device) for device in victims} and len(victims) == 2
    executor.close()


def test_all_devices_are_lost_and_every_job_ends_with_an_error():
    class LostLater(Lost):
        def begin(self, rows):
            both_run.wait(60)

    both_run = threading.Event()
    executor = Executor([LostLater(device, 3) for device in cpus(2)])
    walks = [walk_on(executor)[0] for _ in range(2)]
    for walk in walks:
        walk.begin({})
    both_run.set()
    for walk in walks:
        with pytest.raises(DeviceError, match=r"^cpu:[01] is lost, and no other device is left; start anew$"):
            walk.end()
    with pytest.raises(DeviceError, match="no device answers"):
        walk_on(executor)[0].run({})
    executor.close()


def test_a_node_that_hangs_on_two_devices_ends_its_job():
    released = threading.Event()

    def decode(codes):
        released.wait(60)
        return HITOKSR["decode"](codes)

    engines = ENGINES | {"decode": Toy(decode)}
    executor = Executor([CpuDevice(f"cpu:{i}", engines) for i in range(4)], deadline_s=0.3)
    walk, _ = walk_on(executor, PROGRAM)
    with pytest.raises(DeviceError, match="decode has not ended"):
        walk.run({})
    executor.close()
    released.set()


def test_closing_while_a_device_hangs_ends_after_its_deadline():
    hanging = Hanging(cpus(1)[0], 1)
    executor = Executor([hanging], deadline_s=0.3)
    walk, _ = walk_on(executor)
    walk.begin({})
    assert hanging.hangs.wait(20)
    executor.close()
    with pytest.raises(CancelledError):
        walk.end()
    hanging.released.set()


def test_a_deadline_follows_from_the_slowest_call_of_its_kind():
    executor = Executor(cpus(1))
    assert executor.calls._deadline("kind") == 3600
    executor.calls.slowest["kind"] = 0.5
    assert executor.calls._deadline("kind") == 60
    executor.calls.slowest["kind"] = 30
    assert executor.calls._deadline("kind") == 600
    assert Executor(cpus(1), deadline_s=2).calls._deadline("kind") == 2


# Memory


@pytest.mark.parametrize("error", [MemoryError, ResourceError])
def test_too_little_memory_for_a_batch_halves_it_on_that_device_alone(error):
    program = PROGRAM.batched(8)
    cramped = Cramped(cpus(1)[0], 3 * 32 * 32, error)
    executor = Executor([cramped])
    for _ in range(2):
        walk, pixels = walk_on(executor, program)
        walk.run({})
        assert pixels.tobytes() == expected(program)
    refused = [shapes[0][0] for shapes in cramped.refused]
    assert set(refused) == {8, 4} and len(refused) <= 4  # also batches that were taken before the first refusal
    assert executor.queue.most == {(0, "generate"): 2}
    assert executor.queue.retired == set()
    executor.close()


def test_too_little_memory_for_one_tile_leaves_it_to_another_device():
    small, large = cpus(2)
    executor = Executor([Cramped(small, 32 * 32 - 1), large])
    walk, pixels = walk_on(executor)
    walk.run({})
    executor.close()
    assert pixels.tobytes() == expected()
    assert executor.queue.retired == {0} and not walk.task.lacked_memory


def test_too_little_memory_for_one_tile_anywhere_ends_the_job_with_a_smaller_tile_to_try():
    executor = Executor([Cramped(cpu, 32 * 32 - 1) for cpu in cpus(2)])
    walk, _ = walk_on(executor)
    with pytest.raises(MemoryError):
        walk.run({})
    executor.close()
    assert walk.task.lacked_memory and walk.smaller_tile() is None  # the overlap needs tiles of 32
    walk.job.overlap_px = 0
    assert walk.smaller_tile() == 16


# Shapes


def cut(**inputs):
    return {name: array[:, :, :-1] for name, array in HITOKSR["decode"](**inputs).items()}


@pytest.mark.parametrize("side", [32, 64, 256])
def test_an_output_that_does_not_fill_its_tile_is_an_error_and_never_a_picture(side):
    pixels = np.empty((3, 64, 256), np.float32)
    job = job_of(pixels)
    job.tile_px, job.overlap_px = side, 0
    height = min(side, 64)
    with pytest.raises(BundleError, match=rf"^pass 'restore', once: decode.image has shape \[1, 3, {height - 1}, "):
        run(PROGRAM, ENGINES | {"decode": Toy(cut)}, {}, job)


@pytest.mark.parametrize(
    ("dims", "wrong"),
    [
        (("batch", 32, "rows", "columns"), None),
        (("batch", 4, "rows", "columns"), r"\[1, 32, 2, 2\], not \[1, 4, 2, 2\]"),
        (("batch", 32, "columns", "height"), r"\[1, 32, 2, 2\], not \[1, 32, 2, 32\]"),
        (("batch", 32, "rows"), r"\[1, 32, 2, 2\], not \[1, 32, 'rows'\]"),
    ],
)
def test_an_output_has_the_shape_of_its_signature_with_the_sizes_of_its_inputs(dims, wrong):
    image = {"image": TensorSpec("float32", ("batch", 3, "height", "width"))}
    codes = {"codes": TensorSpec("float32", dims)}
    executor = Executor(cpus(1), signatures={"generate": Signature(image, codes)})
    walk, pixels = walk_on(executor)
    if wrong is None:
        walk.run({})
        assert pixels.tobytes() == expected()
    else:
        with pytest.raises(BundleError, match=rf"generate.codes has shape {wrong}"):
            walk.run({})
    executor.close()
