"""The systems' programs walked with toy engines, against plain loops over steps and tiles in float64."""

import itertools
import math
import random
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime.bundle.program import Call, Grid, Input, Pass, Program, State, Steps, Tiles
from tilewright.runtime.bundle.strict import from_json, to_json
from tilewright.runtime.errors import AccuracyError, UsageError
from tilewright.runtime.plan.noise import normal
from tilewright.runtime.plan.passes import least_px, plan_of
from tilewright.runtime.scheduler import Job, _require_finite, in_order, run

PROGRAMS = Path(__file__).parents[1] / "programs"
SEED = 2026
DDPM = {"betas": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "spacing_offset": 0, "final_alpha": "one"}


def program_of(system):
    return from_json(Program, (PROGRAMS / f"{system}.json").read_bytes(), system)


def with_pass(program, name, **changes):
    return replace(program, passes=tuple(replace(p, **changes) if p.name == name else p for p in program.passes))


class Canvas(np.ndarray):
    """Planes that a job reads by crops."""

    def crop(self, top, left, height, width):
        return np.asarray(self)[:, top : top + height, left : left + width]


def canvas(height, width):
    return np.random.default_rng(0).random((3, height, width), np.float32).view(Canvas)


# The reference: tiles, ramps, joins, noise and schedules from their formulas, in float64


def starts(length, tile, overlap):
    found = [0]
    while found[-1] + tile < length:
        found.append(min(found[-1] + tile - overlap, length - tile))
    return found


def boxes(height, width, tile, overlap):
    """(top, left, height, width) of every tile, row by row."""
    return [
        (top, left, min(tile, height), min(tile, width))
        for top in starts(height, tile, overlap)
        for left in starts(width, tile, overlap)
    ]


def under(grid, box, px=1):
    """A grid's crop under a tile, as a batch of one."""
    top, left, height, width = (side // px for side in box)
    return grid[None, :, top : top + height, left : left + width]


def ramps(start, size, length, overlap):
    """Rising where a neighbour comes before, falling where one comes after."""
    weights = np.ones(size)
    for i in range(overlap):
        weight = 0.5 - 0.5 * math.cos(math.pi * (i + 0.5) / overlap)
        if start > 0:
            weights[i] = weight
        if start + size < length:
            weights[size - 1 - i] = weight
    return weights


def joined(parts, tiles, overlap, height, width, px=1):
    """The weighted mean of all tiles at every cell."""
    cells = (height // px, width // px)
    total, weight = np.zeros((parts[0].shape[1], *cells)), np.zeros(cells)
    for part, box in zip(parts, tiles, strict=True):
        top, left, h, w = (side // px for side in box)
        window = np.outer(ramps(top, h, cells[0], overlap // px), ramps(left, w, cells[1], overlap // px))
        total[:, top : top + h, left : left + w] += part[0] * window
        weight[top : top + h, left : left + w] += window
    return total / weight


def field(region, stream, channels, rows, columns):
    return normal(SEED, region=region, stream=stream, channels=channels, top=0, left=0, height=rows, width=columns)


def flow(count, tokens):
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    sigma = [math.exp(mu) / (math.exp(mu) + (1 / (1 - i / count) - 1)) for i in range(count)]
    return np.float32(sigma), np.float32([*sigma[1:], 0])


def diffusion(count, power, first, last, offset, final):
    """The rows (t, alpha, beta, alpha_next, beta_next) of DDIM's steps."""
    rise = np.linspace(first ** (1 / power), last ** (1 / power), 1000) ** power
    bar = np.cumprod(1 - rise)
    stride = 1000 // count
    times = [i * stride + offset for i in reversed(range(count))]
    following = [bar[t - stride] if t >= stride else (1.0 if final == "one" else bar[0]) for t in times]
    rows = [
        (t, bar[t] ** 0.5, (1 - bar[t]) ** 0.5, n**0.5, (1 - n) ** 0.5) for t, n in zip(times, following, strict=True)
    ]
    return np.float32(rows)


# Toy networks. None is the same on a tile as on the whole: the blur wraps around the tile, `mean_of` sees all of it.


class Toy:
    """An engine made of a function; it keeps what it is fed, tile by tile of a phase in any order."""

    def __init__(self, function):
        self.function, self.feeds = function, []

    def run(self, inputs, wanted):
        self.feeds.append(dict(inputs))
        outputs = self.function(**inputs)
        return {name: outputs[name] for name in wanted}

    def close(self):
        pass


class Late(Toy):
    """A toy that takes its time, each time another."""

    def run(self, inputs, wanted):
        outputs = super().run(inputs, wanted)
        time.sleep(random.uniform(0, 0.003))
        return outputs


def toys(functions, kind=Toy):
    return {name: kind(function) for name, function in functions.items()}


def shrunk(image, px, channels):
    batch, colours, height, width = image.shape
    means = image.reshape(batch, colours, height // px, px, width // px, px).mean((3, 5))
    gains = np.linspace(0.5, 1.5, channels, dtype=image.dtype)[:, None, None]
    return means[:, np.arange(channels) % colours] * gains


def grown(latent, px):
    return latent[:, :3].repeat(px, 2).repeat(px, 3)


def blurred(x):
    return (x + np.roll(x, 1, 2) + np.roll(x, -1, 2) + np.roll(x, 1, 3) + np.roll(x, -1, 3)) / 5


def mean_of(image):
    return image.mean((1, 2, 3))[:, None, None, None]


# HiTokSR: calls in a row on a tile

HITOKSR = {
    "generate": lambda image: {"codes": blurred(shrunk(image, 16, 32)), "indices": None},
    "decode": lambda codes: {"image": grown(codes, 16)},
}


def hitoksr_reference(image, tile=512, overlap=64):
    height, width = image.shape[1:]
    tiles = boxes(height, width, tile, overlap)
    parts = [grown(blurred(shrunk(under(image, box), 16, 32)), 16) for box in tiles]
    return joined(parts, tiles, overlap, height, width)


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


def in_token_modulate(pooled, guidance, sigmas):
    return {"modulation": sigmas[:, None] * np.stack([pooled.sum() / guidance, pooled.mean()])}


def in_token_step(z, y, context, seen, modulation, sigma, sigma_next):
    velocity = 0.6 * blurred(z) + 0.3 * y + seen + context.sum() + modulation[0] - modulation[1]
    return {"z_next": z + (sigma_next - sigma) * velocity}


IN_TOKEN_CONSTANTS = {"context": np.float32([[0.1, -0.2]]), "pooled": np.float32([[0.3, 0.4, -0.1]])}
IN_TOKEN = {
    "modulate": in_token_modulate,
    "encode": lambda image: {"latent": blurred(shrunk(image, 8, 16))},
    "see": lambda image: {"features": mean_of(image)},
    "redux": lambda features: {"tokens": 2 * features},
    "step": in_token_step,
    "decode": lambda latent: {"image": grown(blurred(latent), 8)},
}
FIXED = {name: function for name, function in IN_TOKEN.items() if name != "modulate"}
FIXED_TABLES = {  # of tiles of 1024 and of 512 px, as a build makes them
    f"modulation.{tokens}": np.random.default_rng(tokens).normal(0, 0.1, (28, 2)).astype(np.float32)
    for tokens in (64 * 64, 32 * 32)
}


def first_rows(steps):
    """The constants as a build for fewer steps and fixed tiles would hold them."""
    return IN_TOKEN_CONSTANTS | {name: table[:steps] for name, table in FIXED_TABLES.items()}


def in_token_reference(image, tile, overlap, steps=28, guidance=30.0, table=None):
    height, width = image.shape[1:]
    tiles = boxes(height, width, tile, overlap)
    y = joined([blurred(shrunk(under(image, box), 8, 16)) for box in tiles], tiles, overlap, height, width, 8)
    z = field(0, 0, 16, height // 8, width // 8).astype(np.float64)
    seen = [2 * mean_of(under(image, box)) for box in tiles]
    context, pooled = (IN_TOKEN_CONSTANTS[name].astype(np.float64) for name in ("context", "pooled"))
    sigma, sigma_next = flow(steps, min(tile, height) * min(tile, width) // 256)
    if table is None:
        table = in_token_modulate(pooled, guidance, sigma.astype(np.float64))["modulation"]
    for i in range(steps):
        moved = []
        for box, e in zip(tiles, seen, strict=True):
            scalars = table[i], float(sigma[i]), float(sigma_next[i])
            moved.append(in_token_step(under(z, box, 8), under(y, box, 8), context, e, *scalars)["z_next"])
        z = joined(moved, tiles, overlap, height, width, 8)
    return joined([grown(blurred(under(z, box, 8)), 8) for box in tiles], tiles, overlap, height, width)


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
    rows = in_token_modulate(IN_TOKEN_CONSTANTS["pooled"], np.float32(30), sigma)["modulation"]
    feeds = engines["step"].feeds
    assert len(feeds) == 28 * 4
    for i, feed in enumerate(feeds):
        step = i // 4
        assert feed["sigma"].dtype == feed["sigma_next"].dtype == np.float32
        assert feed["sigma"].shape == feed["sigma_next"].shape == ()
        assert (feed["sigma"], feed["sigma_next"]) == (sigma[step], sigma_next[step])
        np.testing.assert_array_equal(feed["modulation"], rows[step])
        assert feed["context"] is IN_TOKEN_CONSTANTS["context"]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_call_that_reads_nothing_of_a_tile_is_made_once_whatever_the_number_of_tiles(workers):
    for width, tiles in ((64, 1), (2576, 4)):
        engines = toys(IN_TOKEN)
        run(program_of("in-token"), engines, IN_TOKEN_CONSTANTS, Job(canvas(48, width), SEED, workers=workers))
        assert len(engines["see"].feeds) == len(engines["redux"].feeds) == tiles
        (feed,) = engines["modulate"].feeds
        assert feed["guidance"] == 30.0
        np.testing.assert_array_equal(feed["sigmas"], flow(28, 48 * min(width, 1024) // 256)[0])  # the whole table


def test_what_an_earlier_pass_with_the_same_tiles_made_is_made_once_a_tile():
    engines = toys(IN_TOKEN)
    run(program_of("in-token"), engines, IN_TOKEN_CONSTANTS, Job(canvas(48, 2576), SEED))
    made = Counter(mean_of(feed["image"]).item() for feed in engines["see"].feeds)
    assert (len(made), made.total()) == (4, 4)
    seen = Counter(feed["seen"].item() for feed in engines["step"].feeds)
    assert seen == {2 * mean: 28 for mean in made}  # every tile's own, in all of its steps


def test_a_caller_chooses_what_the_shared_call_reads():
    image = canvas(112, 160)
    job = Job(image, SEED, tile_px=64, overlap_px=16, steps=5, inputs={"guidance": 0.5})
    result = run(program_of("in-token"), toys(IN_TOKEN), IN_TOKEN_CONSTANTS, job)
    expected = in_token_reference(image.astype(np.float64), 64, 16, 5, guidance=0.5)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_passes_of_one_program_have_their_own_tiles():
    program = with_pass(program_of("in-token"), "encode", tiles=Tiles(32, 0))
    for name in ("modulate", "see", "sample"):
        program = with_pass(program, name, tiles=Tiles(64, 16))
    program = with_pass(program, "decode", tiles=Tiles(128, 64, (160, 112)))
    engines = toys(IN_TOKEN)
    run(program, engines, IN_TOKEN_CONSTANTS, Job(canvas(112, 160), SEED, steps=3))
    fed = {name: next(iter(engines[name].feeds[0].values())) for name in ("encode", "see", "step", "decode")}
    sizes = {name: array.shape[2:] for name, array in fed.items()}
    assert sizes == {"encode": (32, 32), "see": (64, 64), "step": (8, 8), "decode": (14, 20)}
    assert {name: len(engine.feeds) for name, engine in engines.items()} == {
        "modulate": 1,
        "encode": 4 * 5,
        "see": 2 * 3,
        "redux": 2 * 3,
        "step": 2 * 3 * 3,
        "decode": 1,
    }


# What is shared and what is a tile's

PAINT = Pass("paint", Tiles(16, 0), once=(Call("paint", {"image": "image"}, {"image": "result"}),))
PAINTING = Program(1, 8, {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}, (PAINT,))
SHARING = {
    "base": lambda level: {"value": np.full((1, 3, 1, 1), level, np.float32)},
    "more": lambda value: {"value": value + 1},
    "paint": lambda value, image: {"image": image * value},
}


def shared_calls(*once, **changes):
    """How often each engine is called, and the picture, of a pass of six tiles."""
    engines = toys(SHARING)
    inputs = {"level": Input("float32", default=0.5)}
    program = replace(PAINTING, inputs=inputs, passes=(replace(PAINT, once=once, **changes),))
    result = run(program, engines, {"half": np.float32(0.5)}, Job(canvas(32, 48)))
    return {name: len(engine.feeds) for name, engine in engines.items()}, result / np.asarray(canvas(32, 48))


PAINT_VALUE = Call("paint", {"value": "v", "image": "image"}, {"image": "result"})


@pytest.mark.parametrize("source", ["$level", "#half"])
def test_calls_that_build_on_shared_values_are_shared_too(source):
    base, more = Call("base", {"level": source}, {"value": "u"}), Call("more", {"value": "u"}, {"value": "v"})
    counts, gain = shared_calls(base, more, PAINT_VALUE)
    assert counts == {"base": 1, "more": 1, "paint": 6}
    np.testing.assert_allclose(gain, 1.5, rtol=1e-6)


def test_a_call_that_builds_on_a_tiles_value_is_made_for_every_tile():
    of_tile = Call("more", {"value": "image"}, {"value": "u"})
    counts, gain = shared_calls(of_tile, Call("more", {"value": "u"}, {"value": "v"}), PAINT_VALUE)
    assert counts == {"base": 0, "more": 12, "paint": 6}
    np.testing.assert_allclose(gain, np.asarray(canvas(32, 48)) + 2, rtol=1e-5)


def test_a_call_that_reads_fresh_noise_is_made_for_every_tile():
    counts, _ = shared_calls(Call("more", {"value": "~result"}, {"value": "v"}), PAINT_VALUE)
    assert counts == {"base": 0, "more": 6, "paint": 6}


def test_a_call_that_writes_a_grid_is_made_for_every_tile_whatever_it_reads():
    flat = Call("base", {"level": "$level"}, {"value": "result"})
    engines = {"base": Toy(lambda level: {"value": np.full((1, 3, 16, 16), level, np.float32)})}
    program = replace(
        PAINTING, inputs={"level": Input("float32", default=0.25)}, passes=(replace(PAINT, once=(flat,)),)
    )
    result = run(program, engines, {}, Job(canvas(32, 48)))
    assert len(engines["base"].feeds) == 6
    np.testing.assert_array_equal(result, np.full((3, 32, 48), 0.25, np.float32))


def test_a_call_that_writes_a_state_is_made_for_every_tile_whatever_it_reads():
    counts, gain = shared_calls(
        Call("base", {"level": "$level"}, {"value": "v"}),
        steps=Steps("flow_shift", 2),
        state={"v": State((3, 1, 1), "ones")},
        each=(Call("more", {"value": "v"}, {"value": "v"}),),
        last=(PAINT_VALUE,),
    )
    assert counts == {"base": 6, "more": 12, "paint": 6}
    np.testing.assert_allclose(gain, 0.5 + 2, rtol=1e-6)


def test_passes_with_other_tiles_read_what_was_shared():
    base = Pass("base", Tiles(8, 0), once=(Call("base", {"level": "$level"}, {"value": "v"}),))
    program = replace(PAINTING, inputs={"level": Input("float32", default=0.5)})
    program = replace(program, passes=(base, replace(PAINT, once=(PAINT_VALUE,))))
    engines = toys(SHARING)
    result = run(program, engines, {}, Job(canvas(32, 48)))
    assert len(engines["base"].feeds) == 1
    np.testing.assert_array_equal(result, np.asarray(canvas(32, 48)) * np.float32(0.5))


# In-Token for fixed sizes of tiles: what the modulation would be is a table for each


@pytest.mark.parametrize(("tile", "tokens"), [(None, 4096), (1024, 4096), (512, 1024)])
def test_a_table_is_that_of_the_tiles_token_count(tile, tokens):
    image = canvas(1024, 1040)
    engines = toys(FIXED)
    job = Job(image, SEED, tile_px=tile, steps=2)
    result = run(program_of("in-token-fixed"), engines, first_rows(2), job)
    rows = {feed["modulation"].tobytes() for feed in engines["step"].feeds}
    table = first_rows(2)[f"modulation.{tokens}"]
    assert rows == {row.tobytes() for row in table}
    expected = in_token_reference(image.astype(np.float64), tile or 1024, 256, 2, table=table.astype(np.float64))
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_table_of_no_size_serves_all_tiles_and_one_of_their_size_comes_before_it():
    program = with_pass(program_of("in-token"), "sample", tiles=Tiles(64, 0))
    program = replace(program, passes=program.passes[1:])  # without the call that makes it
    program = with_pass(with_pass(program, "see", tiles=Tiles(64, 0)), "encode", tiles=Tiles(64, 0))
    whole, fitting, other = (np.random.default_rng(i).random((3, 2), np.float32) for i in range(3))
    for tables, read in (
        ({"modulation": whole}, whole),
        ({"modulation": whole, "modulation.17": other, "modulation.1": other, "modulation.x16": other}, whole),
        ({"modulation": whole, "modulation.16": fitting}, fitting),
        ({"modulation.16": fitting, "modulation.17": other}, fitting),
    ):
        engines = toys(IN_TOKEN)
        run(program, engines, IN_TOKEN_CONSTANTS | tables, Job(canvas(64, 128), SEED, steps=3))
        np.testing.assert_array_equal([f["modulation"] for f in engines["step"].feeds], read.repeat(2, axis=0))


@pytest.mark.parametrize(
    ("height", "width", "tile", "expected"),
    [
        (1024, 1024, None, (1024, 1024, 256, 1)),
        (1024, 1792, None, (1024, 1024, 256, 2)),
        (2560, 1440, None, (1024, 1024, 256, 6)),  # nothing is taken whole
        (1024, 1024, 512, (512, 512, 256, 9)),
        (512, 528, 512, (512, 512, 256, 2)),
    ],
)
def test_tiles_of_fixed_sides_are_never_cut_to_the_image(height, width, tile, expected):
    assert plan_sizes(program_of("in-token-fixed"), "sample", height, width, tile) == expected


@pytest.mark.parametrize("tile", [16, 496, 528, 768, 2048])
def test_a_tile_of_another_side_than_the_fixed_ones_is_refused(tile):
    with pytest.raises(UsageError, match=rf"^tile={tile} is not one of the sizes this bundle is made for: \[1024, 512"):
        run(program_of("in-token-fixed"), {}, first_rows(2), Job(canvas(2048, 2048), tile_px=tile))


def test_an_image_is_padded_up_to_a_tile_of_fixed_sides():
    fixed, free = program_of("in-token-fixed"), program_of("in-token")
    assert [least_px(fixed, tile) for tile in (None, 1024, 512)] == [1024, 1024, 512]
    assert [least_px(free, tile) for tile in (None, 1024, 512)] == [1, 1, 1]
    mixed = with_pass(with_pass(free, "encode", tiles=Tiles(512, 0, fixed_px=(512,))), "see", tiles=None)
    assert least_px(mixed, None) == 512


# VICR: an untiled pass before a tiled one, private state, a value of the tile read row by row


def vicr_modulate(pooled, guidance, bridge, sigmas):
    return {"modulation": sigmas[None, :, None] * (pooled * guidance / 30 + bridge)[:, None]}


def vicr_step(z, y, context, modulation, sigma, sigma_next):
    velocity = 0.6 * blurred(z) + 0.3 * y + context.mean() + modulation.sum(1)[:, None, None, None]
    return {"z_next": z + (sigma_next - sigma) * velocity}


VICR = {
    "t5": lambda ids: {"context": ids.astype(np.float32)[:, :, None] / 100},
    "clip": lambda ids: {"pooled": ids[:, :3].astype(np.float32) / 100},
    "encode": lambda image: {"latent": np.concatenate([shrunk(image, 8, 16), shrunk(image, 8, 16) * 0], 3)},
    "see": lambda image: {"embeds": image.mean((2, 3))},
    "bridge": lambda embeds: {"bridge": embeds[:, ::-1] * 2},
    "modulate": vicr_modulate,
    "step": vicr_step,
    "decode": lambda latent: {"image": grown(latent[..., latent.shape[3] // 2 :], 8)},
}
VICR_INPUTS = {"t5_ids": np.arange(512)[None], "clip_ids": np.arange(77)[None]}


def vicr_reference(image, tile, overlap, steps=30):
    height, width = image.shape[1:]
    tiles = boxes(height, width, tile, overlap)
    h, w = min(tile, height) // 8, min(tile, width) // 8
    context, pooled = VICR_INPUTS["t5_ids"][:, :, None] / 100, VICR_INPUTS["clip_ids"][:, :3] / 100
    sigma, sigma_next = flow(steps, h * w * 64 // 128)
    parts = []
    for index, box in enumerate(tiles):
        z = field(1 + index, 0, 16, h, 2 * w).astype(np.float64)[None]
        crop = under(image, box)
        y, bridge = VICR["encode"](crop)["latent"], crop.mean((2, 3))[:, ::-1] * 2
        modulation = vicr_modulate(pooled, 30.0, bridge, sigma.astype(np.float64))["modulation"]
        for i in range(steps):
            z = vicr_step(z, y, context, modulation[:, i], float(sigma[i]), float(sigma_next[i]))["z_next"]
        parts.append(grown(z[..., w:], 8))
    return joined(parts, tiles, overlap, height, width)


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
        np.testing.assert_array_equal(feed["sigmas"], flow(30, 48 * 1024 // 128)[0])


# The steered program: a start from noise, joined latents beside private values, three calls a step, fresh noise, inputs

STEERED_CONSTANTS = {
    "clip_ids": np.arange(154).reshape(2, 77),
    "bigg_ids": np.arange(154).reshape(2, 77) % 7,
    "start_alpha": np.float32(0.086803),
    "start_beta": np.float32(0.996226),
}
RESIDUALS = [*(f"r{i}" for i in range(9)), "mid"]


def steered_aggregate(y, previews, pooled, t, delta, adares, control_scale):
    difference = (y - previews[:, 1]) * delta[:, :, None, None] * control_scale * (1 + adares) + pooled.mean() + t / 1e4
    return {name: difference * (i + 1) / 200 for i, name in enumerate(RESIDUALS)}


def steered_denoise(z, tokens, context, pooled, previews, preview, guidance, sampler, noise, t, **rest):
    residual = sum(rest[name] for name in RESIDUALS)
    x0 = 0.3 * blurred(z) + tokens + context.mean() + pooled.mean() / guidance + residual + t / 1e4
    eps = (z - rest["alpha"] * x0) / rest["beta"]
    moved = rest["alpha_next"] * x0 + rest["beta_next"] * eps + (0.01 + 0.02 * sampler) * noise
    change, whole = np.abs(previews[:, 1] - x0).mean((1, 2, 3)), np.abs(previews[:, 1] - preview).mean((1, 2, 3))
    return {"z": moved, "preview": previews[:, 1], "delta": (change / (change + whole))[:, None]}


STEERED = {
    "text": lambda clip_ids, bigg_ids: {"context": np.float32(clip_ids.mean() / 100), "pooled": np.float32(bigg_ids)},
    "encode": lambda image: {"latent": shrunk(image, 8, 4)},
    "start": lambda latent, noise, alpha, beta: {"z": alpha * latent + beta * noise},
    "see": lambda image: {"tokens": mean_of(image), "preview_tokens": mean_of(image) * 2},
    "preview": lambda z, tokens, context, pooled, t, alpha, beta: {
        "previews": np.stack([z, blurred(z) * alpha + tokens * beta - t / 1e4 + context - pooled.mean()], 1)
    },
    "aggregate": steered_aggregate,
    "denoise": steered_denoise,
    "decode": lambda latent: {"image": grown(latent, 8)},
}


def steered_reference(image, tile_px, overlap, guidance=7.0, adares=0, sampler=0, steps=30):
    height, width = image.shape[1:]
    tiles = boxes(height, width, tile_px, overlap)
    h, w = height // 8, width // 8
    context = np.float64(np.float32(STEERED_CONSTANTS["clip_ids"].mean() / 100))
    pooled = STEERED_CONSTANTS["bigg_ids"].astype(np.float64)
    y = shrunk(image[None], 8, 4)[0]
    z = 0.086803 * y + 0.996226 * field(0, 0, 4, h, w).astype(np.float64)
    seen = [mean_of(under(image, box)) for box in tiles]
    before = [np.zeros_like(under(y, box, 8)) for box in tiles]
    deltas = [np.ones((1, 1)) for _ in tiles]
    for i, row in enumerate(diffusion(steps, 2, 0.00085, 0.012, 1, "first").astype(np.float64)):
        t, alpha, beta, alpha_next, beta_next = row
        noise = field(0, 1 + i, 4, h, w).astype(np.float64)
        moved = []
        for k, box in enumerate(tiles):
            crop = under(z, box, 8)
            previews = STEERED["preview"](crop, seen[k] * 2, context, pooled, t, alpha, beta)["previews"]
            residuals = steered_aggregate(under(y, box, 8), previews, pooled, t, deltas[k], adares, 1.0)
            levels = {"alpha": alpha, "beta": beta, "alpha_next": alpha_next, "beta_next": beta_next}
            asked = {"guidance": guidance, "sampler": sampler, "noise": under(noise, box, 8)}
            job = {"context": context, "pooled": pooled, "t": t}
            tile = {"z": crop, "tokens": seen[k], "previews": previews, "preview": before[k]}
            after = steered_denoise(**tile, **job, **asked, **levels, **residuals)
            moved.append(after["z"])
            before[k], deltas[k] = after["preview"], after["delta"]
        z = joined(moved, tiles, overlap, height, width, 8)
    return grown(z[None], 8)[0]


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


def same_arrays(found, expected):
    """Whether these are the same arrays, in any order."""
    return Counter((a.shape, a.tobytes()) for a in found) == Counter((a.shape, a.tobytes()) for a in expected)


# The private program: batches of tiles, private noise


def private(height, width):
    """Engines for tiles of that size: tokens say nothing of it."""

    def detokenise(tokens, words):
        rows, columns = np.arange(height)[:, None] % 16, np.arange(width) % 32
        return {"image": np.stack([tokens[:, rows, 0, columns] * (c + 1) + words.mean() for c in range(3)], 1)}

    return {
        "text": lambda ids: {"words": ids.astype(np.float32) / 10, "pooled": ids[:, :2].astype(np.float32) / 10},
        "tokenise": lambda image, words: {
            "tokens": np.broadcast_to(image[:, :1, :1, :32], (len(image), 16, 1, 32)) * words[0, 1]
        },
        "step": private_step,
        "detokenise": detokenise,
    }


def private_step(tokens, condition, pooled, guidance, t, alpha, beta, alpha_next, beta_next):
    x0 = 0.4 * tokens + 0.3 * condition * guidance + pooled.max() + t / 1e4
    return {"tokens": alpha_next * x0 + beta_next * (tokens - alpha * x0) / beta}


PRIVATE_CONSTANTS = {"empty_ids": np.arange(77)[None] % 5}


def private_reference(image, tile, overlap, guidance=1.0, steps=25):
    height, width = image.shape[1:]
    tiles = boxes(height, width, tile, overlap)
    engines = private(*tiles[0][2:])
    ids = PRIVATE_CONSTANTS["empty_ids"].astype(np.float64)
    words, pooled = ids / 10, ids[:, :2] / 10
    parts = []
    for index, box in enumerate(tiles):
        tokens = field(1 + index, 0, 16, 1, 32).astype(np.float64)[None]
        condition = engines["tokenise"](under(image, box), words)["tokens"]
        for row in diffusion(steps, 1, 1e-4, 2e-2, 0, "one").astype(np.float64):
            tokens = private_step(tokens, condition, pooled, guidance, *row)["tokens"]
        parts.append(engines["detokenise"](tokens, words)["image"])
    return joined(parts, tiles, overlap, height, width)


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


def test_batches_hold_as_many_tiles_as_asked_and_the_last_the_rest():
    engines = toys(private(48, 256))
    run(program_of("private"), engines, PRIVATE_CONSTANTS, Job(canvas(48, 2272)))
    assert Counter(len(feed["image"]) for feed in engines["tokenise"].feeds) == {8: 1, 2: 1}
    assert Counter(len(feed["tokens"]) for feed in engines["step"].feeds) == {8: 25, 2: 25}
    assert Counter(len(feed["tokens"]) for feed in engines["detokenise"].feeds) == {8: 1, 2: 1}


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


def test_a_states_noise_is_each_tiles_own_and_another_in_every_section():
    (text, restore) = program_of("private").passes
    calls = [replace(c, inputs=c.inputs | {"noise": "~tokens"}) for c in (*restore.once, *restore.each, *restore.last)]
    stepped = replace(restore, once=calls[:1], each=calls[1:2], last=calls[2:])
    engines = {name: Toy(without_noise(function)) for name, function in private(48, 256).items()}
    program = replace(program_of("private"), passes=(text, stepped))
    run(program, engines, PRIVATE_CONSTANTS, Job(canvas(48, 2272), SEED, steps=4))
    feeds = [feed for name in ("tokenise", "step", "detokenise") for feed in engines[name].feeds]
    for tiles in (range(8), range(8, 10)):  # the second batch goes on counting
        batch = [feed for feed in feeds if len(feed["noise"]) == len(tiles)]
        for stream, feed in enumerate(batch):  # 0 before the first step, 1 + step after
            np.testing.assert_array_equal(feed["noise"], [field(1 + tile, stream, 16, 1, 32) for tile in tiles])
        assert len(batch) == 1 + 4 + 1
        np.testing.assert_array_equal(batch[1]["tokens"], batch[0]["noise"])  # the state's own start


def without_noise(function):
    return lambda noise=None, **inputs: function(**inputs)


# Who finishes first does not matter

SYSTEMS = {
    "hitoksr": (HITOKSR, {}, {}),
    "in-token": (IN_TOKEN, IN_TOKEN_CONSTANTS, {}),
    "steered": (STEERED, STEERED_CONSTANTS, {}),
    "private": (private(64, 64), PRIVATE_CONSTANTS, {}),
    "vicr": (VICR, {}, VICR_INPUTS),
}


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("system", SYSTEMS)
def test_any_order_of_completion_gives_the_same_bytes(system, workers):
    functions, constants, inputs = SYSTEMS[system]
    program = program_of(system)
    if system == "private":
        program = with_pass(program, "restore", tiles=Tiles(64, 0, batch=2))
    job = Job(canvas(128, 192), SEED, tile_px=64, overlap_px=0 if system == "steered" else 16, steps=3, inputs=inputs)
    prompt = run(program, toys(functions), constants, job)
    late = run(program, toys(functions, Late), constants, replace(job, workers=workers))
    assert prompt.tobytes() == late.tobytes()


def test_workers_run_at_the_same_time():
    meeting = threading.Barrier(3, timeout=10)

    def decode(codes):
        meeting.wait()
        return {"image": grown(codes, 16)}

    job = Job(canvas(64, 192), tile_px=64, overlap_px=0, workers=3)
    run(program_of("hitoksr"), toys(HITOKSR | {"decode": decode}), {}, job)


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
    run(program_of("hitoksr"), engines, {}, Job(canvas(64, 512), tile_px=64, overlap_px=0, workers=workers))
    assert most == workers


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_image_taken_whole_gives_the_bytes_of_a_tile_that_is_larger(system):
    functions, constants, inputs = SYSTEMS[system]
    job = Job(canvas(64, 64), SEED, steps=3, inputs=inputs)
    whole = run(program_of(system), toys(functions), constants, job)
    for tile, overlap in ((64, None), (1024, 128), (2048, 0)):
        tiled = run(program_of(system), toys(functions), constants, replace(job, tile_px=tile, overlap_px=overlap))
        assert whole.tobytes() == tiled.tobytes()


# Tile plans


def plan_sizes(program, name, height, width, tile=None, overlap=None):
    (p,) = (p for p in program.passes if p.name == name)
    plan = plan_of(program, p, height, width, tile, overlap)
    return plan.tile_height, plan.tile_width, plan.overlap, len(plan.tiles)


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap", "expected"),
    [
        (1440, 2560, None, None, (1440, 2560, 0, 1)),
        (2560, 1440, None, None, (2560, 1440, 0, 1)),  # whole either way round
        (2560, 1456, None, None, (1024, 1024, 256, 6)),
        (1440, 2576, None, None, (1024, 1024, 256, 8)),
        (1456, 1456, None, None, (1024, 1024, 256, 4)),
        (1440, 2560, 1024, None, (1024, 1024, 256, 6)),  # a tile that is asked for wins over whole
        (1440, 2560, 1024, 64, (1024, 1024, 64, 6)),
        (1440, 2560, 1024, 0, (1024, 1024, 0, 6)),
        (64, 96, 32, None, (32, 32, 16, 15)),  # no more than half of the tile
        (96, 96, 48, None, (48, 48, 16, 9)),  # and a multiple
    ],
)
def test_a_plan_follows_the_program_unless_the_job_asks(height, width, tile, overlap, expected):
    assert plan_sizes(program_of("in-token"), "sample", height, width, tile, overlap) == expected


def test_a_pass_without_tiles_has_one_whatever_the_job_asks():
    assert plan_sizes(program_of("vicr"), "text", 4096, 4096, 64, 16) == (4096, 4096, 0, 1)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (40, None, "tile=40 is not a positive multiple of 16; use 48"),
        (0, None, "tile=0 is not a positive multiple of 16; use 16"),
        (-16, None, "tile=-16 is not a positive multiple of 16; use 16"),
        (64, 48, "overlap=48 does not fit tile=64; use a multiple of 16 from 0 to 32"),
        (64, -16, "overlap=-16 does not fit tile=64"),
    ],
)
def test_tiles_that_cannot_be_meant_are_refused(tile, overlap, message):
    with pytest.raises(UsageError, match=message):
        run(program_of("hitoksr"), toys(HITOKSR), {}, Job(canvas(64, 64), tile_px=tile, overlap_px=overlap))


# Joins


@st.composite
def layouts(draw):
    """Padded images of up to 300 pixels a side, a multiple, and the tiles of two passes."""
    multiple = draw(st.sampled_from([1, 2, 8, 16]))
    height, width = (-(-draw(st.integers(1, 300 - multiple)) // multiple) * multiple for _ in range(2))
    tiles = []
    for _ in range(2):
        cells = draw(st.integers(max(1, 24 // multiple), 320 // multiple))
        whole = draw(st.none() | st.tuples(st.integers(1, 300), st.integers(1, 300)))
        overlap = draw(st.integers(0, cells // 2)) * multiple
        tiles.append(Tiles(cells * multiple, overlap, whole, draw(st.integers(1, 5))))
    return height, width, multiple, tiles


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(1, 3))
def test_a_program_that_changes_nothing_gives_its_canvas_back(layout, workers):
    height, width, multiple, (there, back) = layout
    px = math.gcd(multiple, 8)
    same = (
        Pass("there", there, once=(Call("fold", {"image": "image"}, {"cells": "cells"}),)),
        Pass("back", back, once=(Call("unfold", {"cells": "cells"}, {"image": "result"}),)),
    )
    grids = {"image": Grid(1, 3, "input"), "cells": Grid(px, 3 * px * px), "result": Grid(1, 3)}

    def fold(image):
        batch, _, h, w = image.shape
        blocks = image.reshape(batch, 3, h // px, px, w // px, px).transpose(0, 1, 3, 5, 2, 4)
        return {"cells": blocks.reshape(batch, -1, h // px, w // px)}

    def unfold(cells):
        batch, _, h, w = cells.shape
        blocks = cells.reshape(batch, 3, px, px, h, w).transpose(0, 1, 4, 2, 5, 3)
        return {"image": blocks.reshape(batch, 3, h * px, w * px)}

    image = canvas(height, width)
    engines = toys({"fold": fold, "unfold": unfold})
    result = run(Program(1, multiple, grids, same), engines, {}, Job(image, workers=workers))
    np.testing.assert_allclose(result, image, atol=1e-6)


def painted(height, width, **options):
    """Every tile painted in the column it starts at, and a hundred times its row."""
    places = 100 * np.arange(height)[:, None] + np.arange(width)
    places = np.stack([places] * 3).astype(np.float32).view(Canvas)
    brush = Toy(lambda image: {"image": np.broadcast_to(image[:, :, :1, :1], image.shape)})
    return run(PAINTING, {"paint": brush}, {}, Job(places, **options))


def test_without_overlap_tiles_stand_side_by_side():
    expected = np.kron([[0, 16, 32], [1600, 1616, 1632]], np.ones((16, 16)))
    np.testing.assert_array_equal(painted(32, 48), [expected] * 3)


def test_without_overlap_a_shifted_tile_shares_its_cells_evenly():
    np.testing.assert_array_equal(painted(16, 40)[0, 0], [0] * 16 + [16] * 8 + [20] * 8 + [24] * 8)


def test_an_overlap_is_crossed_by_a_raised_cosine():
    rise = [0.5 - 0.5 * math.cos(math.pi * (i + 0.5) / 8) for i in range(8)]
    across, down = painted(16, 24, overlap_px=8)[0, 0], painted(24, 16, overlap_px=8)[0, :, 0]
    np.testing.assert_allclose(across / 8, [*[0] * 8, *rise, *[1] * 8], atol=1e-6)
    np.testing.assert_allclose(down / 800, [*[0] * 8, *rise, *[1] * 8], atol=1e-6)


def test_grids_start_as_zeros_or_as_the_seeds_noise():
    grids = PAINTING.grids | {"n": Grid(1, 3, "noise"), "o": Grid(8, 2, "zeros")}
    once = (Call("paint", {"noise": "n", "zeros": "o"}, {"image": "result"}),)
    program = replace(PAINTING, grids=grids, passes=(replace(PAINT, once=once),))
    engine = Toy(lambda noise, zeros: {"image": noise})
    result = run(program, {"paint": engine}, {}, Job(canvas(32, 48), SEED))
    np.testing.assert_array_equal(result, field(0, 0, 3, 32, 48))
    assert all(feed["zeros"].shape == (1, 2, 2, 2) and not feed["zeros"].any() for feed in engine.feeds)


def test_a_step_reads_the_grids_as_they_were_before_it():
    """Two calls of a step write two grids; neither sees what the other wrote until the next step."""
    each = (
        Call("one", {"a": "a", "b": "b"}, {"sum": "a"}),
        Call("one", {"a": "a", "b": "b"}, {"sum": "b"}),
    )
    show = Pass("show", once=(Call("show", {"a": "a", "b": "b"}, {"image": "result"}),))
    program = Program(
        1,
        8,
        PAINTING.grids | {"a": Grid(1, 3, "noise"), "b": Grid(1, 3, "zeros")},
        (Pass("walk", Tiles(16, 8), Steps("flow_shift", 5), each=each), show),
    )
    engines = toys({"one": lambda a, b: {"sum": 0.5 * a + b}, "show": lambda a, b: {"image": a - 3 * b}})
    result = run(program, engines, {}, Job(canvas(16, 40), SEED))
    a, b = field(0, 0, 3, 16, 40).astype(np.float64), np.zeros((3, 16, 40))
    for _ in range(5):
        a, b = 0.5 * a + b, 0.5 * a + b
    np.testing.assert_allclose(result, a - 3 * b, atol=1e-5)


def test_once_of_a_joined_pass_may_prepare_the_grid_that_its_steps_walk():
    walk = Pass(
        "walk",
        Tiles(16, 8),
        Steps("flow_shift", 2),
        {"kept": State((3, "h/1", "w/1"), "ones")},
        once=(Call("start", {"image": "image"}, {"image": "z"}),),
        each=(Call("add", {"z": "z", "kept": "kept"}, {"z": "z", "kept": "kept"}),),
        last=(Call("end", {"kept": "kept"}, {"image": "result"}),),
    )
    program = Program(1, 8, PAINTING.grids | {"z": Grid(1, 3, "zeros")}, (walk,))
    functions = {
        "start": lambda image: {"image": image},
        "add": lambda z, kept: {"z": 2 * z, "kept": kept + z},
        "end": lambda kept: {"image": kept},
    }
    image = canvas(24, 40)
    np.testing.assert_allclose(run(program, toys(functions), {}, Job(image)), 1 + image + 2 * image, atol=1e-5)


# Steps


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_a_job_may_ask_for_other_steps_than_the_program(steps):
    image = canvas(112, 160)
    engines = toys(VICR)
    job = Job(image, SEED, tile_px=64, overlap_px=16, steps=steps, inputs=VICR_INPUTS)
    result = run(program_of("vicr"), engines, {}, job)
    assert len(engines["step"].feeds) == steps * 6
    np.testing.assert_allclose(result, vicr_reference(image.astype(np.float64), 64, 16, steps), atol=1e-5)


@pytest.mark.parametrize("steps", [27, 29])
def test_other_steps_than_a_constants_table_has_rows_are_refused(steps):
    with pytest.raises(UsageError, match=f"table 'modulation.4096' has 28 rows for {steps} steps; use --steps 28"):
        run(program_of("in-token-fixed"), toys(FIXED), first_rows(28), Job(canvas(1024, 1024), steps=steps))


def test_more_steps_than_a_tiles_table_has_rows_are_refused():
    short = VICR | {"modulate": lambda **inputs: {"modulation": vicr_modulate(**inputs)["modulation"][:, :30]}}
    with pytest.raises(UsageError, match="table 'modulation' has 30 rows for 31 steps; use --steps 30"):
        run(program_of("vicr"), toys(short), {}, Job(canvas(64, 64), steps=31, inputs=VICR_INPUTS))


def test_a_jobs_value_is_read_row_by_row():
    text, restore = program_of("private").passes
    calls = [replace(restore.each[0], inputs=restore.each[0].inputs | {"pooled": "@pooled"})]
    program = replace(program_of("private"), passes=(text, replace(restore, each=calls)))
    rows = np.random.default_rng(0).random((25, 2), np.float32)
    functions = private(48, 64) | {"text": lambda ids: {"words": np.ones((1, 77), np.float32), "pooled": rows}}
    engines = toys(functions)
    run(program, engines, PRIVATE_CONSTANTS, Job(canvas(48, 64)))
    np.testing.assert_array_equal([feed["pooled"] for feed in engines["step"].feeds], rows)


@pytest.mark.parametrize(
    ("system", "steps", "message"),
    [
        ("in-token", 0, "count=0 is no number of steps; use 1 or more"),
        ("in-token", -1, "count=-1 is no number of steps"),
        ("private", 1001, "count=1001 is no number of steps; use 1 to 1000"),
        ("steered", 1000, "spacing_offset=1 with 1000 steps leaves the schedule"),
    ],
)
def test_steps_that_cannot_be_meant_are_refused(system, steps, message):
    functions, constants, inputs = SYSTEMS[system]
    with pytest.raises(UsageError, match=message):
        run(program_of(system), toys(functions), constants, Job(canvas(64, 64), steps=steps, inputs=inputs))


@pytest.mark.parametrize(
    "steps",
    [
        Steps("ddim", 25, options=DDPM | {"beta_start": 1e-4}),
        Steps("ddpm", 25, options=DDPM),
        Steps("flow_shift", 25, options={"max_mu": 1}),
    ],
)
def test_a_programs_options_reach_its_schedule_as_they_were_read(steps):
    each = (Call("note", {"image": "image"}, {"image": "result"}),)
    program = replace(PAINTING, passes=(replace(PAINT, once=(), steps=steps, each=each),))
    read_again = from_json(Program, to_json(program), "program.json")
    engine = Toy(lambda image: {"image": image})
    run(read_again, {"note": engine}, {}, Job(canvas(16, 16)))
    assert len(engine.feeds) == 25


# Inputs

ASKING = replace(
    PAINTING,
    inputs={
        "gain": Input("float32", default=2.0),
        "mode": Input("int64", default=0, choices={"off": 0, "on": 1}),
        "ids": Input("int64", (2,), "#ids"),
        "level": Input("float32"),
    },
    passes=(
        replace(
            PAINT,
            once=(
                Call(
                    "paint", {"gain": "$gain", "mode": "$mode", "ids": "$ids", "level": "$level"}, {"image": "result"}
                ),
            ),
        ),
    ),
)


def fed_by(inputs):
    """What an engine sees of a caller's inputs."""
    engine = Toy(lambda **inputs: {"image": np.zeros((1, 3, 8, 8), np.float32)})
    run(ASKING, {"paint": engine}, {"ids": np.array([7, 8])}, Job(canvas(8, 8), inputs=inputs))
    return engine.feeds[0]


def test_inputs_are_the_callers_or_the_programs_defaults():
    feed = fed_by({"level": 0.25})
    assert {name: (str(value.dtype), value.shape, value.tolist()) for name, value in feed.items()} == {
        "gain": ("float32", (), 2.0),
        "mode": ("int64", (), 0),
        "ids": ("int64", (2,), [7, 8]),
        "level": ("float32", (), 0.25),
    }
    feed = fed_by({"level": 1, "gain": np.float64(3), "mode": "on", "ids": (1, 2)})
    assert {name: (str(value.dtype), value.shape, value.tolist()) for name, value in feed.items()} == {
        "gain": ("float32", (), 3.0),
        "mode": ("int64", (), 1),
        "ids": ("int64", (2,), [1, 2]),
        "level": ("float32", (), 1.0),
    }
    assert fed_by({"level": 1, "mode": 1})["mode"] == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'level' has no default; give it a value"),
        ({"level": None}, "input 'level' has no default; give it a value"),
        ({"level": 1, "gian": 2}, "input 'gian' is not one of gain, mode, ids, level"),
        ({"level": 1, "mode": "auto"}, "input 'mode': 'auto' is not one of off, on"),
        ({"level": 1, "mode": 2}, "input 'mode': 2 is not one of {'off': 0, 'on': 1}"),
        ({"level": "high"}, "input 'level': 'high' is not one of none"),
        ({"level": "#ids"}, "input 'level': '#ids' is not one of none"),
        ({"level": [1, 2]}, r"input 'level' has shape \[2\]; give \[\]"),
        ({"level": 1, "ids": 3}, r"input 'ids' has shape \[\]; give \[2\]"),
        ({"level": 1, "ids": [1, 2.5]}, "input 'ids' takes int64, which this list is not"),
        ({"level": 1, "ids": [[1], [2, 3]]}, "input 'ids' takes int64, which this list is not"),
        ({"level": 1, "mode": 2**70}, "input 'mode' takes int64, which this int is not"),
        ({"level": {}}, "input 'level' takes float32, which this dict is not"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(inputs, message):
    with pytest.raises(UsageError, match=message) as error:
        fed_by(inputs)
    assert "\n" not in str(error.value)


def test_a_program_without_inputs_takes_none():
    with pytest.raises(UsageError, match="input 'guidance' is not one of none"):
        run(program_of("in-token-fixed"), {}, {}, Job(canvas(1024, 1024), inputs={"guidance": 1.0}))


# What the job tells


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_final_parts_are_the_result_each_cell_told_once(system, workers):
    functions, constants, inputs = SYSTEMS[system]
    pieces = np.full((3, 128, 192), np.nan, np.float32)

    def place(top, left, part):
        there = pieces[:, top : top + part.shape[1], left : left + part.shape[2]]
        assert there.shape == part.shape and np.isnan(there).all()
        there[...] = part

    overlap = 0 if system == "steered" else 16
    job = Job(canvas(128, 192), SEED, tile_px=64, overlap_px=overlap, steps=3, inputs=inputs, workers=workers)
    result = run(program_of(system), toys(functions), constants, replace(job, on_final=place))
    assert result.tobytes() == pieces.tobytes()


def test_progress_counts_every_batch_of_every_step_up_to_the_total():
    told = []
    job = Job(canvas(48, 2576), steps=3, on_progress=lambda *news: told.append(news))
    run(program_of("in-token"), toys(IN_TOKEN), IN_TOKEN_CONSTANTS, job)
    phases = 1 + 3 + 1  # once, the steps, last
    assert told == [
        *(("modulate", done, 4) for done in range(1, 5)),
        *(("encode", done, 4) for done in range(1, 5)),
        *(("see", done, 4) for done in range(1, 5)),
        *(("sample", done, 4 * phases) for done in range(1, 4 * phases + 1)),
        *(("decode", done, 4) for done in range(1, 5)),
    ]


def test_seconds_are_counted_for_every_component():
    job = Job(canvas(64, 192), tile_px=64, overlap_px=0, workers=2)
    slow = HITOKSR | {"decode": lambda codes: time.sleep(0.02) or {"image": grown(codes, 16)}}
    run(program_of("hitoksr"), toys(slow), {}, job)
    assert job.seconds.keys() == {"generate", "decode"}
    assert 3 * 0.02 <= job.seconds["decode"] < 2  # three tiles
    assert 0 < job.seconds["generate"] < job.seconds["decode"]


class Watched(dict):
    """Numbers that take their time between being read and written; how many do so at once."""

    now = most = 0

    def get(self, *arguments):
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.005)
        return super().get(*arguments)

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.now -= 1


def test_seconds_of_tiles_that_end_at_once_are_added_one_after_another():
    job = Job(canvas(64, 512), tile_px=64, overlap_px=0, workers=4, seconds=Watched())
    run(program_of("hitoksr"), toys(HITOKSR), {}, job)
    assert job.seconds.most == 1


@pytest.mark.parametrize("sections", [("each",), ("each", "last"), ("once", "each")])
def test_a_result_that_every_step_writes_is_told_once_and_as_it_stays(sections):
    calls = {"once": {"image": "image"}, "each": {"image": "image", "sigma": "@sigma"}, "last": {"image": "result"}}
    made = {name: (Call("paint", calls[name], {"painted": "result"}),) for name in sections}
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    program = Program(1, 8, grids, (Pass("paint", Tiles(64, 0), Steps("flow_shift", 3), **made),))
    pieces = np.full((3, 64, 128), np.nan, np.float32)

    def place(top, left, part):
        there = pieces[:, top : top + part.shape[1], left : left + part.shape[2]]
        assert np.isnan(there).all()
        there[...] = part

    paint = Toy(lambda image, sigma=0.5: {"painted": np.float32(image * sigma)})
    result = run(program, {"paint": paint}, {}, Job(canvas(64, 128), on_final=place))
    assert len(paint.feeds) == 2 * (3 + len(sections) - 1)
    assert result.tobytes() == pieces.tobytes()


class Forgetful(Toy):
    """A toy that keeps nothing it is fed."""

    def run(self, inputs, wanted):
        return self.function(**inputs)


def test_a_tile_that_is_done_gives_its_values_back():
    """21 tiles; what a tile kept to itself is gone when it is joined, so that memory does not grow with the image."""
    alive, most = [], 0
    functions = private(64, 64)

    def tokenise(image, words):
        nonlocal most
        tokens = np.array(functions["tokenise"](image, words)["tokens"])
        alive.append(weakref.ref(tokens))
        most = max(most, sum(r() is not None for r in alive))
        return {"tokens": tokens}

    program = with_pass(program_of("private"), "restore", tiles=Tiles(64, 16))
    engines = toys(functions | {"tokenise": tokenise}, Forgetful)
    run(program, engines, PRIVATE_CONSTANTS, Job(canvas(64, 1024), steps=2))
    assert len(alive) == 21
    assert most <= 3  # one runs, one is prepared, one waits for its turn


def test_what_passes_with_the_same_tiles_hand_on_is_given_back_when_the_last_reader_is_done():
    alive = {"y": [], "z": []}
    counts = {"step": [], "decode": []}

    def watched(name, function, made):
        def watch(**inputs):
            outputs = function(**inputs)
            array = next(iter(outputs.values()))
            alive.setdefault(made, []).append(weakref.ref(array))
            if name in counts:
                counts[name].append({kind: sum(r() is not None for r in refs) for kind, refs in alive.items()})
            return outputs

        return watch

    made = {"encode": "y", "step": "z", "decode": "result"}
    functions = VICR | {name: watched(name, VICR[name], kind) for name, kind in made.items()}
    job = Job(canvas(64, 1024), tile_px=64, overlap_px=16, steps=2, inputs=VICR_INPUTS)
    run(program_of("vicr"), toys(functions, Forgetful), {}, job)
    assert counts["step"][0]["y"] == 21  # all tiles are looked at before any is sampled
    assert counts["step"][-1]["y"] <= 3  # and the last tiles' alone is held for its last step
    assert counts["decode"][0] == {"y": 0, "z": 21, "result": 1}
    assert max(now["result"] for now in counts["decode"]) <= 6  # what waits for its turn to be joined


# Faults


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_fault_of_an_engine_ends_the_job_and_the_rest_is_not_run(workers):
    calls, threads = itertools.count(1), threading.active_count()

    def generate(image):
        if next(calls) == 5:
            raise MemoryError("no room for tile 5")
        return HITOKSR["generate"](image)

    engines = toys(HITOKSR | {"generate": generate})
    job = Job(canvas(64, 2048), tile_px=32, overlap_px=0, workers=workers)
    with pytest.raises(MemoryError, match="no room for tile 5"):
        run(program_of("hitoksr"), engines, {}, job)
    assert 5 <= len(engines["generate"].feeds) <= 5 + 3 * (workers + 1)  # of 128 tiles
    assert threading.active_count() == threads


def test_a_fault_in_one_pass_keeps_the_next_from_starting():
    def step(**inputs):
        raise RuntimeError("device lost")

    engines = toys(IN_TOKEN | {"step": step})
    with pytest.raises(RuntimeError, match="device lost"):
        run(program_of("in-token"), engines, IN_TOKEN_CONSTANTS, Job(canvas(64, 64)))
    assert (len(engines["see"].feeds), len(engines["decode"].feeds)) == (1, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float32", "float16", "float64"])
def test_numbers_that_are_not_finite_end_the_job_with_the_call_that_gave_them(value, kind):
    calls = itertools.count(1)

    def step(**inputs):
        made = {name: array.astype(kind) for name, array in IN_TOKEN["step"](**inputs).items()}
        if next(calls) == 3:
            next(iter(made.values())).flat[[5, 7]] = value
        return made

    engines = toys(IN_TOKEN | {"step": step})
    with pytest.raises(AccuracyError) as caught:
        run(program_of("in-token"), engines, IN_TOKEN_CONSTANTS, Job(canvas(64, 64), steps=4))
    assert caught.value.exit_code == 7
    assert str(caught.value).startswith(f"pass 'sample', step 3: step.z_next holds {value}, 2 of ")
    assert str(caught.value).isprintable()
    assert len(engines["decode"].feeds) == 0


def test_large_numbers_and_choices_are_no_fault():
    paint = {"image": np.full((1, 3, 8, 8), 3e38, np.float32)}
    most = np.iinfo(np.int64).max
    codes = {"codes": np.full((1, 3, 2, 2), most), "half": np.full((1, 9, 9), 65504, np.float16)}
    for made in (paint, codes):
        for name, output in made.items():
            _require_finite(name, output)


# in_order


class Tasks:
    """Tasks that return their number; how many have started."""

    def __init__(self, count, seconds=lambda i: 0.0):
        self.started, self.lock = 0, threading.Lock()
        self.list = [lambda i=i: self.go(i, seconds(i)) for i in range(count)]

    def go(self, i, seconds):
        with self.lock:
            self.started += 1
        time.sleep(seconds)
        return i


@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_results_come_in_the_order_of_their_tasks(workers):
    tasks = Tasks(30, lambda i: 0.004 * (i % 3 == 0))  # every third is slow
    assert list(in_order(tasks.list, workers)) == list(range(30))
    assert tasks.started == 30


def test_no_task_gives_no_result():
    assert list(in_order([], 2)) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_than_two_results_a_worker_wait_for_a_slow_reader(workers):
    tasks, read = Tasks(40), 0
    for _ in in_order(tasks.list, workers):
        read += 1
        time.sleep(0.002)
        assert tasks.started - read <= 2 * workers
    assert read == 40


def test_results_are_ready_before_a_slow_reader_asks():
    tasks = Tasks(10)
    results = in_order(tasks.list, 2)
    next(results)
    deadline = time.monotonic() + 10
    while tasks.started < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert tasks.started == 5
    results.close()


def test_tasks_that_wait_are_dropped_when_the_reader_leaves():
    tasks = Tasks(40, lambda i: 0.2 * (i == 1))
    results = in_order(tasks.list, 1)
    assert next(results) == 0
    results.close()
    assert tasks.started <= 2  # the second ran already


def test_a_fault_comes_in_its_turn_and_drops_the_tasks_that_wait():
    tasks = Tasks(40, lambda i: 0.002)

    def fail():
        raise KeyError("third")

    tasks.list[2] = fail
    results = in_order(tasks.list, 1)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="third"):
        next(results)
    assert tasks.started <= 2 + 2
    with pytest.raises(StopIteration):
        next(results)
