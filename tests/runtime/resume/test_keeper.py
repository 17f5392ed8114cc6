"""Finished parts in a file: a restoration that was stopped goes on from there, and gives the same bytes."""

import asyncio
import random
import re
import time
from collections import Counter
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from support.devices import Over
from support.scenes import CPUS, noise, scene
from tilewright.runtime import load
from tilewright.runtime.engines import ort
from tilewright.runtime.errors import InputError, TilewrightError, UsageError
from tilewright.runtime.resume.checkpoint import read_checkpoint, share_in

IMAGE = scene(60, 90)
FILE = Path("picture.resume")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Parts:
    """Parts of a picture, of which the fifth stops the restoration."""

    def __init__(self, last=5):
        self.parts, self.last = {}, last

    def __call__(self, top, left, pixels):
        if len(self.parts) + 1 == self.last:
            raise EOFError
        self.parts[top, left] = pixels.copy()


def interrupted(restorer, image=IMAGE, last=5, resume=None, **options):
    """Restore until the part number `last`, and keep what is finished; the parts that were handed on."""
    parts = Parts(last)
    ticket = restorer.submit(image, on_part=parts, resume=resume, **options)
    with pytest.raises(EOFError) as stopped, ticket.keeping(FILE):
        ticket.result()
    assert stopped.value.kept.path == FILE and stopped.value.kept.reason == ""
    return parts.parts


@pytest.mark.parametrize("devices", [1, len(CPUS)])
def test_parts_that_were_handed_on_are_not_handed_on_again(bundle, devices):
    with load(bundle, devices=CPUS[:devices], threads=1) as restorer:
        expected = restorer(IMAGE, tile=32)
        told = interrupted(restorer, tile=32)
        more = interrupted(restorer, tile=32, resume=FILE, last=4)
        last = Parts(0)
        ticket = restorer.submit(IMAGE, tile=32, resume=FILE, on_part=last)
        with ticket.keeping(FILE):
            restoration = ticket.result()
        assert ticket.resumed[0] == FILE and 0 < ticket.resumed[1] < 1
    np.testing.assert_array_equal(restoration.image, expected)
    assert restoration.notes == () and not FILE.exists()
    assert (len(told), len(more)) == (4, 3) and len(told | more | last.parts) == 7 + len(last.parts)
    for (top, left), pixels in (told | more | last.parts).items():
        np.testing.assert_array_equal(pixels, expected[top : top + pixels.shape[0], left : left + pixels.shape[1]])
    assert sum(pixels.size for pixels in (told | more | last.parts).values()) == expected.size


def test_without_a_file_it_begins_from_the_beginning(restorer):
    ticket = restorer.submit(IMAGE, resume="nowhere.resume")
    np.testing.assert_array_equal(ticket.result().image, restorer(IMAGE))
    assert ticket.resumed is None


def test_a_coroutine_that_is_cancelled_keeps_what_is_finished(restorer):
    async def cancelled():
        with restorer.executor.changed:  # no part comes before there is a ticket
            ticket = restorer.submit(IMAGE, tile=32, on_part=lambda *part: ticket.cancel())
        with ticket.keeping(FILE):
            await ticket

    with pytest.raises(asyncio.CancelledError) as stopped:
        asyncio.run(cancelled())
    assert stopped.value.kept.path == FILE
    np.testing.assert_array_equal(restorer(IMAGE, tile=32, resume=FILE), restorer(IMAGE, tile=32))


def test_nothing_is_kept_of_a_restoration_that_has_finished_nothing(restorer):
    ticket = restorer.submit(IMAGE, on_part=Parts(0))
    ticket.cancel()
    ticket.sitting.walk.values.done = [bytearray(len(done)) for done in ticket.sitting.walk.values.done]
    with suppress(CancelledError), ticket.keeping(FILE):
        raise CancelledError
    assert not FILE.exists()


def test_a_picture_that_could_not_be_written_is_kept_whole(restorer):
    expected = restorer(IMAGE)
    ticket = restorer.submit(IMAGE)
    with pytest.raises(OSError), ticket.keeping(FILE):
        ticket.result()
        raise OSError("the disk is full")
    parts = Parts(1)
    np.testing.assert_array_equal(restorer(IMAGE, resume=FILE, on_part=parts), expected)
    assert share_in(FILE) == 1 and parts.parts == {}


# What has changed


CHANGES = [
    ({"seed": 1}, {"seed": 2}, "seed=1", "seed=2"),
    ({}, {"tile": 64}, "tile=32", "tile=64"),
    ({}, {"overlap": 16}, "overlap=the default", "overlap=16"),
    ({}, {"scale": 2}, "scale=1", "scale=2"),
    ({"prompt": "dim"}, {"prompt": "red"}, "prompt='dim'", "prompt='red'"),
    (
        {"prompt": f"dim{' ' * 99}red"},
        {"prompt": f"dim{' ' * 99}warm"},
        f"prompt=...{' ' * 30}red'",
        f"prompt=...{' ' * 30}warm'",
    ),
    ({"gain": 2.0}, {"gain": None}, "gain=2.0", "gain=1.0"),
    ({"look": "a.safetensors"}, {"look": "b.safetensors"}, "look='a file, SHA-256 ", "look='a file, SHA-256 "),
    ({"seed": 3}, {"seed": 4, "gain": 2}, "seed=3, gain=1.0", "seed=4, gain=2"),
]


@pytest.mark.parametrize(("before", "now", "was", "is_now"), CHANGES)
def test_another_argument_is_refused_by_name_with_both_values(tinted, before, now, was, is_now):
    for name, value in {"a": 0.5, "b": 0.25}.items():
        save_file({"look.tint": np.float32([[value, 0.25, 1]])}, f"{name}.safetensors")
    with load(tinted) as restorer:
        interrupted(restorer, **{"tile": 32, **before})
        data = FILE.read_bytes()
        with pytest.raises(UsageError) as refused:
            restorer(IMAGE, resume=FILE, **{"tile": 32, **before, **now})
        said = str(refused.value)
        assert re.fullmatch(
            f"picture.resume is of a restoration with {re.escape(was)}.*, and this one has {re.escape(is_now)}.*;"
            " ask for the same as before, or remove the file to begin anew",
            said,
        ), said
        assert FILE.read_bytes() == data
        np.testing.assert_array_equal(
            restorer(IMAGE, resume=FILE, tile=32, **before), restorer(IMAGE, tile=32, **before)
        )


def test_a_file_that_changes_while_it_runs_counts_as_it_was(tinted):
    def write(value):
        save_file({"look.tint": np.float32([[value, 0.25, 1]])}, "a.safetensors")

    def stop(top, left, pixels):
        write(0.75)
        raise EOFError

    write(0.5)
    with load(tinted) as restorer:
        expected = restorer(IMAGE, look="a.safetensors")
        ticket = restorer.submit(IMAGE, look="a.safetensors", on_part=stop)
        with pytest.raises(EOFError), ticket.keeping(FILE):
            ticket.result()
        with pytest.raises(UsageError, match="with look='a file, SHA-256 "):
            restorer(IMAGE, look="a.safetensors", resume=FILE)
        write(0.5)
        np.testing.assert_array_equal(restorer(IMAGE, look="a.safetensors", resume=FILE), expected)


def test_another_image_or_bundle_is_refused(bundle, build, restorer):
    interrupted(restorer, tile=32)
    other = IMAGE.copy()
    other[0, 0, 0] ^= 1
    alpha = np.dstack((IMAGE, IMAGE[..., 0]))
    for image in (other, IMAGE[:, :-1], alpha, IMAGE[..., 0]):
        with pytest.raises(UsageError, match=r"with image '90x60 px, SHA-256 .*', and this one has image '.* px, SHA"):
            restorer(image, resume=FILE, tile=32)
    packed = build("packed", packed=True)
    with load(packed, threads=1) as restorer, pytest.raises(UsageError, match=r"with bundle '.*, and .* bundle '"):
        restorer(IMAGE, resume=FILE, tile=32)


def test_the_same_in_other_words_is_no_change(tinted):
    with load(tinted, devices=CPUS[:1], threads=1) as restorer:
        interrupted(restorer, tile=32, gain=1.0)
    same = {"gain": 1, "prompt": "bright bright bright", "max_pixels": 10**6, "scale": 1}
    with load(tinted, devices=CPUS[-1:], threads=1, memory="low") as restorer:
        parts = Parts(0)
        np.testing.assert_array_equal(
            restorer(IMAGE, tile=32, resume=FILE, on_part=parts, **same), restorer(IMAGE, tile=32)
        )
    assert 0 < sum(part.size for part in parts.parts.values()) < IMAGE.size


def test_another_number_of_threads_is_a_note(bundle):
    with load(bundle, threads=1) as restorer:
        interrupted(restorer, tile=32)
    with load(bundle, threads=2) as restorer:
        (note,) = restorer.restore(IMAGE, tile=32, resume=FILE).notes
    assert note == "each device has 2 thread(s) and had 1: values may differ by one level of 255"


# Files


def test_a_damaged_file_is_one_line_and_stays(restorer):
    interrupted(restorer, tile=32)
    data, rng = FILE.read_bytes(), random.Random(1)
    damaged = [data[:end] for end in (0, 7, 8, 100, len(data) // 2, len(data) - 1)]
    damaged += [b"", b"PNG" * 1000, data + b"\0", data[:40] + data]
    for at in [0, 8, 9, len(data) - 1, *rng.choices(range(len(data)), k=60)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        FILE.write_bytes(content)
        with pytest.raises(InputError, match=r"^picture.resume is damaged or no file of finished parts; remove it to"):
            restorer(IMAGE, tile=32, resume=FILE)
        assert FILE.read_bytes() == content
    FILE.unlink()
    FILE.mkdir()
    with pytest.raises(InputError, match=r"^picture.resume cannot be read \(Is a directory\); check the path$"):
        restorer(IMAGE, tile=32, resume=FILE)


def test_a_file_is_safetensors_for_other_tools(restorer):
    interrupted(restorer, tile=32)
    with safe_open(FILE, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert 0 < float(file.metadata()["share"]) < 1
    finished = read_checkpoint(FILE).finished
    assert tensors['["done", 0]'].tobytes() == finished.done[0]
    assert len(tensors) == len(finished.done) + len(finished.values) + 4 + 1


def test_a_file_that_holds_more_of_another_restoration_stays(restorer):
    interrupted(restorer, tile=32, last=7)
    data = FILE.read_bytes()
    ticket = restorer.submit(IMAGE, tile=32, seed=1, on_part=Parts(2))
    with pytest.raises(EOFError) as stopped, ticket.keeping(FILE):
        ticket.result()
    kept = stopped.value.kept
    assert (kept.path, kept.reason) == (None, "picture.resume holds more of an earlier restoration")
    assert FILE.read_bytes() == data
    ticket = restorer.submit(IMAGE, tile=32, seed=1, on_part=Parts(9))
    with pytest.raises(EOFError) as stopped, ticket.keeping(FILE):
        ticket.result()
    assert stopped.value.kept.path == FILE and FILE.read_bytes() != data


def test_a_place_that_cannot_be_written_is_a_reason_and_a_note(restorer):
    FILE.mkdir()
    ticket = restorer.submit(IMAGE, tile=32, on_part=lambda *part: time.sleep(0.02))
    with pytest.raises(EOFError) as stopped, ticket.keeping(FILE, every_s=0.01):
        assert any(note.startswith("finished parts could not be kept: ") for note in ticket.result().notes)
        raise EOFError
    assert stopped.value.kept.path is None and "irectory" in stopped.value.kept.reason
    assert [path for path in Path().iterdir() if path.suffix == ".part"] == []


@pytest.mark.slow
def test_what_is_written_every_so_often_can_be_gone_on_from_at_any_time(restorer):
    expected = restorer(IMAGE, tile=32)
    copies = []

    def copy(*part):
        time.sleep(0.01)
        if FILE.exists() and (data := FILE.read_bytes()) not in copies:
            copies.append(data)

    ticket = restorer.submit(IMAGE, tile=32, on_part=copy)
    with ticket.keeping(FILE, every_s=0.005):
        np.testing.assert_array_equal(ticket.result().image, expected)
    assert len(copies) > 2 and not FILE.exists()
    for data in copies:
        FILE.write_bytes(data)
        np.testing.assert_array_equal(restorer(IMAGE, tile=32, resume=FILE), expected)


def test_a_callback_may_keep_what_is_finished(restorer):
    expected, shares = restorer(IMAGE, tile=32), []

    def keep(name, done, total):
        tickets[0].keep(FILE)
        shares.append((share_in(FILE), done / total))

    tickets = []
    with restorer.executor.changed:
        tickets.append(restorer.submit(IMAGE, tile=32, on_progress=keep))
    np.testing.assert_array_equal(tickets[0].result().image, expected)
    assert all(share == done for share, done in shares)
    FILE.unlink()
    tickets[0].keep(FILE)
    assert share_in(FILE) == 1


# Memory that does not suffice


class Shrinking(Over):
    """Has memory for so many calls, and then for none."""

    def __init__(self, device, calls):
        super().__init__(device)
        self.calls = calls

    def run(self, component, inputs, wanted):
        self.calls -= 1
        if self.calls < 0:
            raise MemoryError("no room")
        return self.device.run(component, inputs, wanted)


def test_memory_that_runs_out_for_good_loses_nothing(bundle):
    with load(bundle, threads=1) as restorer:
        expected = restorer(IMAGE, tile=64)
        restorer.executor.devices[:] = [Shrinking(restorer.executor.devices[0], 6)]
        ticket = restorer.submit(IMAGE, tile=64)
        with pytest.raises(MemoryError) as stopped, ticket.keeping(FILE):
            ticket.result()
        assert stopped.value.kept.path == FILE
    with load(bundle, threads=1) as restorer:
        parts = Parts(0)
        np.testing.assert_array_equal(restorer(IMAGE, tile=64, resume=FILE, on_part=parts), expected)
        assert sum(part.size for part in parts.parts.values()) < expected.size


def test_an_image_that_began_anew_with_smaller_tiles_goes_on_with_these(bundle):
    with load(bundle, threads=1) as restorer:
        expected = restorer(IMAGE, tile=32)
        cramped = restorer.executor.devices[0]
        restorer.executor.devices[:] = [Shrinking(cramped, 0)]

        def stop(top, left, pixels):
            raise EOFError

        run = cramped.run
        restorer.executor.devices[0].run = lambda component, inputs, wanted: (
            run(component, inputs, wanted)
            if inputs["image"].shape[2] <= 32
            else Shrinking.run(restorer.executor.devices[0], component, inputs, wanted)
        )
        ticket = restorer.submit(IMAGE, on_part=stop)
        with pytest.raises(EOFError) as stopped, ticket.keeping(FILE):
            ticket.result()
        assert stopped.value.kept.path == FILE
    with load(bundle, threads=1) as restorer:
        restoration = restorer.restore(IMAGE, resume=FILE)
    np.testing.assert_array_equal(restoration.image, expected)
    assert restoration.notes == ("too little memory: the image began anew with --tile 32",)


# Rounds


def test_a_round_goes_on_and_the_next_reuses_what_it_kept(tinted, monkeypatch):
    calls, run = Counter(), ort.OrtEngine.run

    def count(engine, inputs, wanted):
        calls[engine.graph.stem] += 1
        return run(engine, inputs, wanted)

    monkeypatch.setattr(ort.OrtEngine, "run", count)
    with load(tinted, threads=1) as restorer:
        expected = {gain: restorer(IMAGE, gain=gain) for gain in (1.0, 2.0, 0.5)}
        sitting = restorer.sitting(IMAGE)
        np.testing.assert_array_equal(sitting(), expected[1.0])
        sitting.on_part = Parts(4)
        ticket = sitting.begin({"gain": 2.0}, keep=True)
        with pytest.raises(EOFError), ticket.keeping(FILE):
            ticket.result()
    with load(tinted, threads=1) as restorer:
        sitting = restorer.sitting(IMAGE, resume=FILE)
        with pytest.raises(UsageError, match=r"gain=2.0, and this one has gain=1.0"):
            sitting()
        calls.clear()
        np.testing.assert_array_equal(sitting(gain=2.0), expected[2.0])
        assert set(calls) == {"paint"} and calls["paint"] < 12
        calls.clear()
        np.testing.assert_array_equal(sitting(gain=0.5), expected[0.5])
        assert calls == {"paint": 12}


def test_a_ticket_of_an_earlier_round_keeps_nothing(tinted):
    with load(tinted, threads=1) as restorer:
        sitting = restorer.sitting(IMAGE)
        first = sitting.begin({}, keep=True)
        first.result()
        sitting(gain=2)
        with pytest.raises(RuntimeError, match="another round has begun"):
            first.keep(FILE)


def test_an_error_before_any_work_says_nothing_of_kept_parts(restorer):
    with pytest.raises(TilewrightError) as refused:
        restorer(noise(8, 8, 3), tile=7)
    assert refused.value.kept is None
