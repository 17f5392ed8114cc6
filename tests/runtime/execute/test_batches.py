"""Tiles in batches give what they give one by one."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from support.walked_systems import (
    IN_TOKEN,
    IN_TOKEN_CONSTANTS,
    PRIVATE_CONSTANTS,
    STEERED,
    STEERED_CONSTANTS,
    VICR,
    VICR_INPUTS,
    private,
)
from support.walks import SEED, Late, canvas, program_of, toys, with_pass
from tilewright.runtime.bundle.program import Tiles
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.execute.walk import Job, Walk, run


def test_batches_hold_as_many_tiles_as_asked_and_the_last_the_rest():
    engines = toys(private(48, 256), Late)
    run(program_of("private"), engines, PRIVATE_CONSTANTS, Job(canvas(48, 2272)))
    assert Counter(len(feed["image"]) for feed in engines["tokenise"].feeds) == {8: 1, 2: 1}
    sizes = Counter(len(feed["tokens"]) for feed in engines["step"].feeds)
    assert max(sizes) == 8 and sum(n * count for n, count in sizes.items()) == 10 * 25


def test_a_call_takes_tiles_of_several_steps():
    engines = toys(private(48, 256), Late)
    result = run(program_of("private"), engines, PRIVATE_CONSTANTS, Job(canvas(48, 2272), SEED))
    mixed = [feed for feed in engines["step"].feeds if len(feed["t"]) > 1]
    assert mixed
    for feed in mixed:
        assert len(set(feed["t"].tolist())) > 1
        assert len(feed["tokens"]) == len(feed["t"]) == len(feed["alpha_next"])
        assert len(feed["pooled"]) == len(feed["guidance"]) == 1  # one row serves all
    alone = with_pass(program_of("private"), "restore", tiles=Tiles(256, 32))
    assert (
        result.tobytes() == run(alone, toys(private(48, 256)), PRIVATE_CONSTANTS, Job(canvas(48, 2272), SEED)).tobytes()
    )


class Picture:
    """The result of a walk, put together from its final parts."""

    def __init__(self, executor, program, constants, job):
        self.pixels = np.full((3, *job.image.shape[1:]), np.nan, np.float32)
        self.walk = Walk(program, executor, constants, replace(job, on_final=self.place))

    def place(self, top, left, part):
        self.pixels[:, top : top + part.shape[1], left : left + part.shape[2]] = part


def restored_together(engines, program, constants, jobs):
    """The pictures of jobs that one device runs at the same time, or the errors in which they end."""
    executor = Executor([CpuDevice("cpu:0", engines)])
    pictures = [Picture(executor, program, constants, job) for job in jobs]
    for picture in pictures:
        picture.walk.begin(picture.walk.job.inputs)
    results = []
    for picture in pictures:
        try:
            picture.walk.end()
            results.append(picture.pixels.tobytes())
        except RuntimeError as error:
            results.append(error)
    executor.close()
    return results


def small_jobs(count):
    """Jobs of three tiles, each with its own seed and guidance."""
    return [Job(canvas(48, 704), seed, inputs={"guidance": 1.0 + seed / 4}) for seed in range(count)]


def test_a_call_takes_tiles_of_several_images():
    program, engines, jobs = program_of("private"), toys(private(48, 256), Late), small_jobs(4)
    results = restored_together(engines, program, PRIVATE_CONSTANTS, jobs)
    assert results == [run(program, toys(private(48, 256)), PRIVATE_CONSTANTS, job).tobytes() for job in jobs]
    assert len(set(results)) == 4
    both = [feed for feed in engines["step"].feeds if len(feed["guidance"]) > 1]
    assert max(len(set(feed["guidance"].tolist())) for feed in both) > 1
    assert all(len(feed["pooled"]) == 1 for feed in both)  # equal words of several images are one row
    assert any(len(set(feed["t"].tolist())) > 1 for feed in both)
    assert len(engines["step"].feeds) < 4 * 25


def test_different_words_of_several_images_are_a_row_for_each_tile():
    program, engines = program_of("private"), toys(private(48, 256), Late)
    jobs = [replace(job, inputs={"ids": (np.arange(77)[None] + job.seed) % 5}) for job in small_jobs(3)]
    results = restored_together(engines, program, PRIVATE_CONSTANTS, jobs)
    assert results == [run(program, toys(private(48, 256)), PRIVATE_CONSTANTS, job).tobytes() for job in jobs]
    assert any(len(feed["pooled"]) == len(feed["tokens"]) > 1 for feed in engines["step"].feeds)


def test_a_fault_in_a_call_of_several_images_ends_only_the_image_that_has_it():
    functions, jobs = private(48, 256), small_jobs(3)
    guilty = 1.25

    def step(**inputs):
        if guilty in inputs["guidance"] and inputs["t"].min() < 500:
            raise RuntimeError("a guidance that cannot be")
        return functions["step"](**inputs)

    engines = toys(functions | {"step": step}, Late)
    one, two, three = restored_together(engines, program_of("private"), PRIVATE_CONSTANTS, jobs)
    assert "a guidance that cannot be" in str(two)
    expected = [run(program_of("private"), toys(functions), PRIVATE_CONSTANTS, jobs[i]).tobytes() for i in (0, 2)]
    assert [one, three] == expected


def test_every_tile_of_a_batch_has_its_own_state():
    program = with_pass(program_of("steered"), "sample", tiles=Tiles(64, 0, batch=4))
    engines = toys(STEERED)
    run(program, engines, STEERED_CONSTANTS, Job(canvas(128, 128), SEED, steps=1))
    assert [feed["preview"].shape for feed in engines["denoise"].feeds] == [(4, 4, 8, 8)]
    np.testing.assert_array_equal(engines["aggregate"].feeds[0]["delta"], np.ones((4, 1), np.float32))


@pytest.mark.parametrize("batch", [3, 8, 50])
def test_a_batch_gives_the_bytes_of_single_tiles(batch):
    results = []
    for size in (1, batch):
        program = with_pass(program_of("private"), "restore", tiles=Tiles(256, 32, batch=size))
        results.append(run(program, toys(private(48, 256)), PRIVATE_CONSTANTS, Job(canvas(48, 2272), SEED)))
    assert results[0].tobytes() == results[1].tobytes()


def test_a_batch_of_tiles_joined_every_step_gives_the_bytes_of_single_tiles():
    results = []
    for size in (1, 4):
        program = program_of("in-token")
        for name in ("see", "sample"):
            program = with_pass(program, name, tiles=Tiles(64, 16, batch=size))
        program = with_pass(program, "modulate", tiles=Tiles(64, 16))
        results.append(run(program, toys(IN_TOKEN), IN_TOKEN_CONSTANTS, Job(canvas(112, 160), SEED, steps=4)))
    assert results[0].tobytes() == results[1].tobytes()


def test_a_row_of_a_tiles_value_is_taken_from_every_tile_of_a_batch():
    results = []
    for size in (1, 2):
        program = program_of("vicr")
        for name in ("condition", "modulate", "sample", "decode"):
            program = with_pass(program, name, tiles=Tiles(64, 16, batch=size))
        results.append(run(program, toys(VICR), {}, Job(canvas(112, 160), SEED, steps=4, inputs=VICR_INPUTS)))
    assert results[0].tobytes() == results[1].tobytes()
