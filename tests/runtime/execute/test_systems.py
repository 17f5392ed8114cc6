"""The systems' programs walked with toy engines, against plain loops over steps and tiles in float64."""

import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from support.walked_systems import (
    HITOKSR,
    IN_TOKEN,
    IN_TOKEN_CONSTANTS,
    PRIVATE_CONSTANTS,
    STEERED,
    STEERED_CONSTANTS,
    SYSTEMS,
    VICR,
    VICR_INPUTS,
    hitoksr_reference,
    in_token_modulate,
    in_token_reference,
    private,
    private_reference,
    steered_reference,
    vicr_reference,
    without_noise,
)
from support.walks import SEED, Late, Toy, canvas, field, flow, grown, program_of, same_arrays, toys, under, with_pass
from tilewright.runtime.bundle.program import Tiles
from tilewright.runtime.execute.walk import Job, run

# HiTokSR: calls in a row on a tile


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"),
    [
        (528, 592, None, None),  # two by two of the program's own tiles, the second ones shifted far inwards
        (512, 512, None, None),  # whole
        (112, 240, 64, 16),  # the last column shifted inwards, the last row not
        (128, 128, 64, 0),  # no overlap, no shift
        (96, 32, 64, 32),  # tiles shrink to the narrower side; half of a tile shared
    ],
)
def test_calls_in_a_row_are_tiles_of_a_plain_loop(height, width, tile, overlap):
    image = canvas(height, width)
    result = run(program_of("hitoksr"), toys(HITOKSR), {}, Job(image, tile_px=tile, overlap_px=overlap))
    given_sizes = {} if tile is None else {"tile": tile, "overlap": overlap}
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, hitoksr_reference(image.astype(np.float64), **given_sizes), atol=1e-5)


# In-Token: joined every step, tiled passes that share their tiles, a schedule's tables and a table all tiles share


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"),
    [
        (48, 2576, None, None),  # a strip too long to be whole: four of the program's own tiles
        (112, 160, 64, 16),  # rows and columns of tiles
        (64, 96, 96, 32),  # one tile
    ],
)
def test_a_pass_joined_every_step_is_a_plain_loop_over_steps_and_tiles(height, width, tile, overlap):
    image = canvas(height, width)
    job = Job(image, SEED, tile_px=tile, overlap_px=overlap)
    result = run(program_of("in-token"), toys(IN_TOKEN), IN_TOKEN_CONSTANTS, job)
    expected = in_token_reference(image.astype(np.float64), tile or 1024, 256 if overlap is None else overlap)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_every_step_reads_its_row_of_the_schedules_tables_and_of_what_all_tiles_share():
    engines = toys(IN_TOKEN)
    run(program_of("in-token"), engines, IN_TOKEN_CONSTANTS, Job(canvas(48, 2576), SEED))
    sigma, sigma_next = flow(28, 48 * 1024 // 256)  # tokens of a tile, not of the image
    rows = in_token_modulate(IN_TOKEN_CONSTANTS["pooled"], np.float32([30]), sigma[None])["modulation"]
    feeds = engines["step"].feeds
    assert len(feeds) == 28 * 4
    assert Counter(feed["sigma"].item() for feed in feeds) == dict.fromkeys(sigma.tolist(), 4)
    for feed in feeds:
        (step,) = np.flatnonzero(sigma == feed["sigma"])
        assert feed["sigma"].dtype == feed["sigma_next"].dtype == np.float32
        assert feed["sigma"].shape == feed["sigma_next"].shape == (1,)
        assert (feed["sigma"], feed["sigma_next"]) == (sigma[step], sigma_next[step])
        np.testing.assert_array_equal(feed["modulation"], rows[:, step])
        assert feed["context"] is IN_TOKEN_CONSTANTS["context"]


# VICR: an untiled pass before a tiled one, private state, a value of the tile read row by row


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"),
    [
        (48, 1808, None, None),  # three of the program's own tiles
        (112, 160, 64, 16),  # rows and columns of tiles
        (48, 64, None, None),  # whole
    ],
)
def test_a_private_state_is_a_plain_loop_over_the_steps_of_every_tile(height, width, tile, overlap):
    image = canvas(height, width)
    job = Job(image, SEED, tile_px=tile, overlap_px=overlap, inputs=VICR_INPUTS)
    result = run(program_of("vicr"), toys(VICR), {}, job)
    expected = vicr_reference(image.astype(np.float64), tile or 1024, 256 if overlap is None else overlap)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_an_untiled_pass_runs_once_and_every_tile_reads_what_it_made():
    engines = toys(VICR)
    run(program_of("vicr"), engines, {}, Job(canvas(48, 1808), inputs=VICR_INPUTS))
    assert (len(engines["t5"].feeds), len(engines["clip"].feeds)) == (1, 1)
    contexts = {id(feed["context"]) for feed in engines["step"].feeds}
    assert len(contexts) == 1
    np.testing.assert_array_equal(engines["step"].feeds[0]["context"][0, :, 0], np.float32(range(512)) / 100)


def test_outside_each_a_table_comes_whole():
    engines = toys(VICR)
    run(program_of("vicr"), engines, {}, Job(canvas(48, 1808), inputs=VICR_INPUTS))
    assert len(engines["modulate"].feeds) == 3
    for feed in engines["modulate"].feeds:
        np.testing.assert_array_equal(feed["sigmas"][0], flow(30, 48 * 1024 // 128)[0])


# The steered program: a start from noise, joined latents beside private values, three calls a step, fresh noise, inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap", "inputs"),
    [
        (64, 1856, None, None, {}),  # three of the program's own tiles
        (192, 320, 128, 64, {"guidance": 3.0, "adares": "paper", "sampler": "ddpm"}),  # rows and columns of tiles
        (64, 128, None, None, {"adares": 2}),  # whole
    ],
)
def test_private_values_beside_a_joined_latent_are_a_plain_loop(height, width, tile, overlap, inputs):
    image = canvas(height, width)
    job = Job(image, SEED, tile_px=tile, overlap_px=overlap, inputs=inputs)
    result = run(program_of("steered"), toys(STEERED), STEERED_CONSTANTS, job)
    numbers = {"paper": 1, "ddpm": 1}
    expected = steered_reference(
        image.astype(np.float64),
        tile or 1024,
        256 if overlap is None else overlap,
        **{name: numbers.get(value, value) for name, value in inputs.items()},
    )
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_grids_noise_is_one_field_under_all_tiles_and_another_every_step():
    engines = toys(STEERED)
    run(program_of("steered"), engines, STEERED_CONSTANTS, Job(canvas(64, 1856), SEED, steps=3))
    noises = [feed["noise"] for feed in engines["denoise"].feeds]
    assert len(noises) == 3 * 3
    fields = [field(0, stream, 4, 8, 232) for stream in range(4)]
    assert not np.any(fields[1] == fields[2])
    for step in range(3):
        expected = [under(fields[1 + step], (0, left, 64, 1024), 8) for left in (0, 768, 832)]
        assert same_arrays(noises[3 * step : 3 * step + 3], expected)
    expected = [under(fields[0], (0, left, 64, 1024), 8) for left in (0, 832)]
    assert same_arrays([feed["noise"] for feed in engines["start"].feeds], expected)


# The private program: batches of tiles, private noise


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"),
    [
        (48, 2272, None, None),  # ten of the program's own tiles: a batch of eight and one of two
        (112, 160, 64, 16),  # rows and columns of tiles
    ],
)
def test_batches_of_tiles_with_private_tokens_are_a_plain_loop(height, width, tile, overlap):
    image = canvas(height, width)
    engines = toys(private(min(height, tile or 256), min(width, tile or 256)))
    job = Job(image, SEED, tile_px=tile, overlap_px=overlap, inputs={"guidance": 1.5})
    result = run(program_of("private"), engines, PRIVATE_CONSTANTS, job)
    expected = private_reference(image.astype(np.float64), tile or 256, 32 if overlap is None else overlap, 1.5)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_states_noise_is_each_tiles_own_and_another_in_every_section():
    (text, restore) = program_of("private").passes
    calls = [replace(c, inputs=c.inputs | {"noise": "~tokens"}) for c in (*restore.once, *restore.each, *restore.last)]
    stepped = replace(restore, once=calls[:1], each=calls[1:2], last=calls[2:])
    engines = {name: Toy(without_noise(function)) for name, function in private(48, 256).items()}
    program = replace(program_of("private"), passes=(text, stepped))
    run(program, engines, PRIVATE_CONSTANTS, Job(canvas(48, 256 + 15 * 224), SEED, steps=4))
    feeds = [feed for name in ("tokenise", "step", "detokenise") for feed in engines[name].feeds]
    batches = (range(8), range(8, 16))  # the second goes on counting
    fields = [  # 0 before the first step, 1 + step after
        [np.stack([field(1 + tile, stream, 16, 1, 32) for tile in tiles]) for stream in range(1 + 4 + 1)]
        for tiles in batches
    ]
    assert same_arrays([feed["noise"] for feed in feeds], [noise for streams in fields for noise in streams])
    for streams in fields:
        (first,) = (feed for feed in feeds if np.array_equal(feed["noise"], streams[1]))
        np.testing.assert_array_equal(first["tokens"], streams[0])  # the state's own start


# Who finishes first does not matter


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("system", SYSTEMS)
def test_any_order_of_completion_gives_the_same_bytes(system, workers):
    functions, constants, inputs = SYSTEMS[system]
    program = program_of(system)
    if system == "private":
        program = with_pass(program, "restore", tiles=Tiles(64, 0, batch=2))
    job = Job(canvas(128, 192), SEED, tile_px=64, overlap_px=0 if system == "steered" else 16, steps=3, inputs=inputs)
    prompt = run(program, toys(functions), constants, job)
    late = run(program, toys(functions, Late), constants, job, devices=workers)
    assert prompt.tobytes() == late.tobytes()


def test_workers_run_at_the_same_time():
    meeting = threading.Barrier(3, timeout=10)

    def decode(codes):
        meeting.wait()
        return {"image": grown(codes, 16)}

    job = Job(canvas(64, 192), tile_px=64, overlap_px=0)
    run(program_of("hitoksr"), toys(HITOKSR | {"decode": decode}), {}, job, devices=3)


@pytest.mark.parametrize("workers", [1, 2])
def test_engines_run_on_no_more_threads_than_there_are_workers(workers):
    now, most, lock = 0, 0, threading.Lock()

    def counted(function):
        def count(**inputs):
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.002)
            with lock:
                now -= 1
            return function(**inputs)

        return count

    engines = toys({name: counted(function) for name, function in HITOKSR.items()})
    run(program_of("hitoksr"), engines, {}, Job(canvas(64, 512), tile_px=64, overlap_px=0), devices=workers)
    assert most == workers


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_image_taken_whole_gives_the_bytes_of_a_tile_that_is_larger(system):
    functions, constants, inputs = SYSTEMS[system]
    job = Job(canvas(64, 64), SEED, steps=3, inputs=inputs)
    whole = run(program_of(system), toys(functions), constants, job)
    for tile, overlap in ((64, None), (1024, 128), (2048, 0)):
        tiled = run(program_of(system), toys(functions), constants, replace(job, tile_px=tile, overlap_px=overlap))
        assert whole.tobytes() == tiled.tobytes()
