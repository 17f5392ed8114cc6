"""Images restored from end to end, against Pillow, padding by index and an integer convolution of the whole image."""

import json
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from safetensors.numpy import save_file

from tilewright.runtime import Restoration, Restorer, TilewrightError, load, restore
from tilewright.runtime import estimate as memory
from tilewright.runtime.bundle.manifest import Memory
from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, TensorSpec, Tiles
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.bundle.write import write_manifest
from tilewright.runtime.engines import ort
from tilewright.runtime.errors import BundleError, InputError, ResourceError, UsageError
from tilewright.runtime.estimate import estimate

WHOLE = 4096  # a tile larger than any image here
SHARPENED = Program(
    scale=2,
    multiple_px=8,
    grids={"image": Grid(1, 3, "input"), "result": Grid(1, 3)},
    passes=(Pass("restore", Tiles(64, 16), once=(Call("sharpen", {"image": "image"}, {"sharp": "result"}),)),),
)
FROM_NOISE = Program(
    scale=2,
    multiple_px=8,
    grids={"image": Grid(1, 3, "input"), "z": Grid(1, 3, "noise"), "result": Grid(1, 3)},
    passes=(Pass("restore", Tiles(64, 16), once=(Call("sharpen", {"image": "z"}, {"sharp": "result"}),)),),
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def scene(height: int, width: int) -> np.ndarray:
    """A picture with soft shapes, sharp edges and a little noise."""
    y, x = np.mgrid[:height, :width]
    soft = np.stack([120 + 60 * np.sin(y / 7 + c) * np.cos(x / 9) for c in range(3)], axis=2)
    soft[(x // 13 + y // 11) % 2 == 0] += 30
    return (soft + noise(height, width, 3) / 16).clip(0, 255).astype(np.uint8)


def doubled(plane: np.ndarray) -> np.ndarray:
    height, width = plane.shape[:2]
    return np.asarray(Image.fromarray(plane).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))


def padded(length: int, least: int = 1, multiple: int = 8) -> list[int]:
    """Where each row (or column) of the padded image comes from."""
    whole = max(-(-length // multiple) * multiple, least)
    mirrored = whole - length <= length - 1
    return [i if i < length else 2 * (length - 1) - i if mirrored else length - 1 for i in range(whole)]


def mirrored(length: int, shift: int) -> list[int]:
    return [length - 2 if i == length else abs(i) for i in range(shift, length + shift)]


def expected(rgb: np.ndarray, kernels: np.ndarray, least: int = 1) -> np.ndarray:
    """The restoration of a whole image in integers: sevenths of a level, rounded at the end."""
    large = doubled(rgb)
    canvas = large[np.ix_(padded(large.shape[0], least), padded(large.shape[1], least))].astype(int)
    height, width = canvas.shape[:2]
    total = np.zeros_like(canvas)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            total += canvas[np.ix_(mirrored(height, dy), mirrored(width, dx))] * kernels[:, dy + 1, dx + 1]
    levels = (2 * total + 7) // 14
    return levels.clip(0, 255).astype(np.uint8)[: large.shape[0], : large.shape[1]]


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    return np.abs(one.astype(int) - other.astype(int))


@pytest.fixture
def restorer(bundle):
    with load(bundle, threads=1) as restorer:
        yield restorer


# Pixels


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 200), (200, 1), (3, 4), (37, 53), (64, 64)])
def test_an_image_in_one_tile_is_exactly_the_reference(restorer, kernels, height, width):
    image = noise(height, width, 3)
    made = restorer.restore(image, tile=WHOLE)
    assert made.tiles == {"restore": 1}
    np.testing.assert_array_equal(made.image, expected(image, kernels))


@pytest.mark.parametrize(("height", "width"), [(1, 200), (200, 1), (37, 53), (100, 130)])
def test_an_image_in_many_tiles_is_the_reference_within_a_level(restorer, kernels, height, width):
    image = scene(height, width)
    made = restorer.restore(image)
    assert made.tiles["restore"] > 1
    apart = difference(made.image, expected(image, kernels))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.02  # only where a tile ends, and there its weight is next to nothing


@pytest.mark.parametrize("tile", [16, 24, 128])
def test_any_size_of_tile_gives_the_reference_within_two_levels(restorer, kernels, tile):
    image = scene(60, 70)
    apart = difference(restorer(image, tile=tile, overlap=8), expected(image, kernels))
    assert apart.max() <= 2
    assert (apart == 0).mean() > 0.8


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 30), (32, 32)])
def test_a_tile_larger_than_the_image_changes_no_byte(restorer, height, width):
    image = noise(height, width, 3)
    usual, large = restorer.restore(image), restorer.restore(image, tile=WHOLE)
    assert usual.tiles == large.tiles == {"restore": 1}
    np.testing.assert_array_equal(usual.image, large.image)


def test_the_number_of_workers_changes_no_byte(bundle):
    image = scene(100, 130)
    made = []
    for workers in (1, 2, 4):
        with load(bundle, threads=1, workers=workers) as restorer:
            made.append(restorer(image).tobytes())
    assert made[0] == made[1] == made[2]


def test_the_number_of_threads_changes_no_level_by_more_than_one(bundle):
    image = scene(100, 130)
    made = []
    for threads in (1, 2):
        with load(bundle, threads=threads) as restorer:
            assert restorer.engines["sharpen"].session.get_session_options().intra_op_num_threads == threads
            made.append(restorer(image))
    assert difference(*made).max() <= 1


def test_low_and_fast_memory_give_the_same_picture(bundle):
    image = scene(60, 70)
    with load(bundle, memory="low") as low, load(bundle, memory="fast") as fast:
        arenas = [r.engines["sharpen"].session.get_session_options().enable_cpu_mem_arena for r in (low, fast)]
        assert arenas == [False, True]
        assert difference(low(image), fast(image)).max() <= 1


def test_a_bundle_with_packed_weights_gives_the_same_picture(build, kernels):
    image = noise(9, 11, 3)
    with load(build(packed=True)) as restorer:
        np.testing.assert_array_equal(restorer(image), expected(image, kernels))


# Sources and layouts


def test_a_path_a_pillow_image_and_an_array_give_the_same(restorer, tmp_path, kernels):
    image = noise(9, 11, 3)
    Image.fromarray(image).save(tmp_path / "in.png")
    for source in (tmp_path / "in.png", str(tmp_path / "in.png"), Image.fromarray(image), image):
        np.testing.assert_array_equal(restorer(source), expected(image, kernels))


def test_alpha_is_enlarged_beside_the_colours(restorer, kernels):
    image = noise(20, 30, 4)
    made = restorer(image)
    np.testing.assert_array_equal(made[:, :, :3], expected(image[:, :, :3], kernels))
    np.testing.assert_array_equal(made[:, :, 3], doubled(image[:, :, 3]))


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1)])
def test_a_grey_image_comes_back_grey(restorer, kernels, shape):
    image = noise(*shape)
    colours = np.repeat(image.reshape(20, 30, 1), 3, axis=2)
    np.testing.assert_array_equal(restorer(image), np.asarray(Image.fromarray(expected(colours, kernels)).convert("L")))


def test_grey_with_alpha_comes_back_as_two_planes(restorer, kernels):
    image = noise(20, 30, 2)
    colours = np.repeat(image[:, :, :1], 3, axis=2)
    made = restorer(Image.fromarray(image, "LA"))
    np.testing.assert_array_equal(made[:, :, 0], np.asarray(Image.fromarray(expected(colours, kernels)).convert("L")))
    np.testing.assert_array_equal(made[:, :, 1:], doubled(image[:, :, 1])[:, :, None])


def test_the_colour_profile_is_handed_on(restorer, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise(4, 4, 3)).save(tmp_path / "in.png", icc_profile=profile)
    assert restorer.restore(tmp_path / "in.png").icc == profile
    assert restorer.restore(noise(4, 4, 3)).icc is None


# Seeds, progress, cost


def test_without_noise_the_seed_changes_nothing(restorer):
    image = noise(20, 30, 3)
    np.testing.assert_array_equal(restorer(image, seed=1), restorer(image, seed=2))


def test_with_noise_the_seed_alone_decides(build):
    with load(build(program=FROM_NOISE)) as restorer:
        image = noise(40, 50, 3)
        first, again, other = (restorer(image, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).mean() > 0.3
        np.testing.assert_array_equal(restorer(image), restorer(image, seed=0))
        np.testing.assert_array_equal(restorer(noise(40, 50, 3, seed=9), seed=1), first)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("options", "columns", "rows"),  # of 264 x 200 px
    [({}, 6, 4), ({"overlap": 0}, 5, 4), ({"overlap": 32}, 8, 6), ({"tile": 128}, 3, 2), ({"tile": 8}, 33, 25)],
)
def test_progress_is_told_once_a_tile_and_in_order(bundle, workers, options, columns, rows):
    told = []
    with load(bundle, workers=workers) as restorer:
        made = restorer.restore(scene(100, 130), on_progress=lambda *news: told.append(news), **options)
    total = made.tiles["restore"]
    assert total == columns * rows
    assert told == [("restore", done, total) for done in range(1, total + 1)]


def test_workers_work_at_once(bundle):
    meeting = threading.Barrier(2)

    class Engine:
        def run(self, inputs, wanted):
            meeting.wait(timeout=20)
            return {"sharp": inputs["image"]}

    restorer = Restorer(read_bundle(bundle), {"sharpen": Engine()}, workers=2)
    assert restorer(noise(32, 88, 3)).shape == (64, 176, 3)  # four tiles: two meetings


def test_a_restoration_says_what_it_cost(restorer):
    made = restorer.restore(noise(20, 30, 3))
    assert isinstance(made, Restoration)
    assert made.seconds.keys() >= {"read", "passes", "assemble", "total", "sharpen"}
    assert all(value >= 0 for value in made.seconds.values())
    phases = made.seconds.keys() - {"total", "sharpen"}
    assert made.seconds["total"] == pytest.approx(sum(made.seconds[name] for name in phases))
    assert 0 < made.seconds["sharpen"] <= made.seconds["passes"]
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    assert made.peak_bytes == pytest.approx(int(peak) * 1024, rel=0.1)


# What it would take


def test_an_estimate_gives_the_result_size_and_the_tiles(bundle):
    plans = estimate(read_bundle(bundle), 53, 37)
    assert (plans.width, plans.height) == (106, 74)
    ((walked, plan),) = plans.passes
    assert walked.name == "restore"
    assert (plan.width, plan.height) == (112, 80)
    assert (plan.tile_width, plan.tile_height, plan.overlap) == (64, 64, 16)
    ((_, plan),) = estimate(read_bundle(bundle), 53, 37, tile=32, overlap=8).passes
    assert (plan.tile_width, plan.tile_height, plan.overlap) == (32, 32, 8)


def test_the_need_counts_weights_grids_and_the_largest_call(bundle):
    whole = read_bundle(bundle)
    need = estimate(whole, 53, 37).needed_bytes
    low = estimate(whole, 53, 37, memory="low").needed_bytes
    assert need - low == 2 * 3 * 3 * 3 * 4  # as it is stored and as float32; what is mapped can be given back
    component = whole.manifest.components["sharpen"]
    for more, added in {
        Memory(1_000_000 + 512, 24, 0): 512,
        Memory(1_000_000, 25, 0): 64 * 64,
        Memory(1_000_000, 24, 1): (64 * 64) ** 2,
    }.items():
        manifest = replace(whole.manifest, components={"sharpen": replace(component, memory=more)})
        assert estimate(replace(whole, manifest=manifest), 53, 37).needed_bytes - need == added
    result = 3 * 4 * (2 * 1000) ** 2  # a large image in the same tiles holds its result, the join and little else
    assert result < estimate(whole, 1000, 1000).needed_bytes - need < 4 * result


def with_weights(whole: Bundle, **elements: int) -> Bundle:
    """A bundle whose components have float16 weights of so many elements."""
    tensors = {name: {"w": Reference("w", "float16", (n,), 0, 2 * n)} for name, n in elements.items()}
    return replace(whole, weights=replace(whole.weights, tensors=tensors))


def test_the_need_counts_all_weights_or_those_of_the_largest_pass(tinted, monkeypatch):
    whole = with_weights(read_bundle(tinted), words=2000, paint=1000)
    none = with_weights(whole)
    both, one = (2 + 4) * 3000, (2 + 4) * 2000  # as they are stored and as float32
    bare = estimate(none, 30, 20).needed_bytes
    assert estimate(whole, 30, 20, memory="low").needed_bytes == bare
    assert estimate(whole, 30, 20).needed_bytes == bare + both
    for free, needed in ((both / 0.7 + 2, both), (both / 0.7 - 2, one), (0, one), (None, both)):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: free)
        assert estimate(whole, 30, 20).needed_bytes == bare + needed


def test_the_need_counts_what_every_tile_keeps(tinted):
    whole = read_bundle(tinted)
    see = whole.manifest.components["see"]
    larger = replace(see, outputs={"mean": TensorSpec("float32", ("batch", 300, 1, 1))})
    manifest = replace(whole.manifest, components=whole.manifest.components | {"see": larger})
    for width, tiles in ((32, 1), (56, 2), (80, 3)):
        plans = [estimate(w, width, 32) for w in (whole, replace(whole, manifest=manifest))]
        assert len(plans[0].passes[1][1].tiles) == tiles
        assert plans[1].needed_bytes - plans[0].needed_bytes == 297 * 4 * tiles


def test_the_need_grows_with_the_image_and_with_the_tile(bundle):
    whole = read_bundle(bundle)
    needs = [estimate(whole, side, side).needed_bytes for side in (1, 10, 100, 1000, 10_000)]
    assert needs == sorted(set(needs))
    assert estimate(whole, 100, 1000).needed_bytes == estimate(whole, 1000, 100).needed_bytes
    tiled = [estimate(whole, 1000, 1000, tile=tile).needed_bytes for tile in (64, 512, 2048)]
    assert tiled == sorted(set(tiled))


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-1, 5)])
def test_a_size_that_is_none_is_refused(bundle, width, height):
    with pytest.raises(UsageError, match=f"{width}x{height} is no image size"):
        estimate(read_bundle(bundle), width, height)


def test_work_that_does_not_fit_is_refused_before_it_starts(restorer, monkeypatch):
    image = noise(20, 30, 3)
    need = estimate(restorer.bundle, 30, 20).needed_bytes
    monkeypatch.setattr(memory, "available_bytes", lambda: need)
    restorer(image)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    restorer(image)
    monkeypatch.setattr(memory, "available_bytes", lambda: need - 1)
    restorer.engines = {}
    with pytest.raises(
        ResourceError, match=r"^60x40 px needs about 0\.1 GiB .* smaller --tile or --memory low$"
    ) as caught:
        restorer(image)
    assert caught.value.exit_code == 5


def test_memory_is_what_the_system_and_the_control_group_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    system = memory.available_bytes()
    assert 0 < system < 2**50
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\nactive_file 300000\ninactive_file 500000\nshmem 0\n")
    assert memory.available_bytes() > 900_000
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.available_bytes() == 900_000  # files the group has read are dropped when memory is asked for


# Refusals


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 7), np.uint8), 3, None, "nowhere.png"],
    ids=["floats", "empty", "seven planes", "number", "nothing", "missing file"],
)
def test_what_is_no_image_is_refused(restorer, image):
    with pytest.raises(InputError) as caught:
        restorer(image)
    assert caught.value.exit_code == 8
    assert len(str(caught.value).splitlines()) == 1


def test_an_image_of_more_pixels_than_allowed_is_refused(restorer):
    restorer(noise(4, 5, 3), max_pixels=20)
    with pytest.raises(InputError, match="over the limit of 19"):
        restorer(noise(4, 5, 3), max_pixels=19)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "medium"}, "memory='medium' is not one of fast, low"),
        ({"workers": 0}, "threads=0 and workers=0 must be at least 0 and 1"),
        ({"threads": -1}, "threads=-1 and workers=1 must be at least 0 and 1"),
    ],
)
def test_options_of_loading_that_cannot_be_meant_are_refused(bundle, options, words):
    with pytest.raises(UsageError, match=f"^{words}$") as caught:
        load(bundle, **options)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": 60}, "tile=60 is not a positive multiple of 8; use 64"),
        ({"tile": 0}, "tile=0 is not a positive multiple of 8; use 8"),
        ({"overlap": 40}, "overlap=40 does not fit tile=64"),
        ({"inputs": {"strength": 1}}, "input 'strength' is not one of none"),
    ],
)
def test_options_of_restoring_that_cannot_be_meant_are_refused(restorer, options, words):
    with pytest.raises(UsageError, match=words):
        restorer(noise(4, 4, 3), **options)


@pytest.mark.parametrize("scale", [1, 3, 4, 0])
def test_another_scale_than_the_bundles_is_refused(restorer, scale):
    restorer(noise(4, 4, 3), scale=2)
    with pytest.raises(UsageError, match=f"^scale={scale} is none that this bundle can enlarge by; use 2$"):
        restorer(noise(4, 4, 3), scale=scale)


@pytest.mark.parametrize("scale", [0, -1, 17])
def test_a_scale_beyond_reason_is_refused(tinted, scale):
    with pytest.raises(UsageError, match=f"^scale={scale} is none that this bundle can enlarge by; use 1 to 16$"):
        estimate(read_bundle(tinted), 10, 10, scale=scale)


def test_loading_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(TilewrightError, match=r"no bundle\.json there"):
        load(tmp_path)


# Words, and what stands for them


def tinted_by(rgb: np.ndarray, eighths, gain: float = 1.0) -> np.ndarray:
    """What the bundle that words lead must make of an image of one tile, in levels."""
    canvas = rgb[np.ix_(padded(rgb.shape[0]), padded(rgb.shape[1]))]
    return np.clip(rgb * (np.array(eighths) / 8 * gain) + canvas.mean((0, 1)) / 4, 0, 255)


def assert_tinted(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 0.501  # rounded to the nearest level


def test_a_prompt_decides_through_its_tokenizer(tinted):
    image = noise(20, 30, 3)
    with load(tinted) as restorer:
        assert_tinted(restorer(image, inputs={"prompt": "dim warm red"}), tinted_by(image, [3, 4, 5]))
        assert_tinted(restorer(image, inputs={"prompt": "red"}), tinted_by(image, [5, 1, 0]))
        assert_tinted(restorer(image), tinted_by(image, [6, 6, 6]))  # the program's own words
        assert_tinted(
            restorer(image, inputs={"prompt": "dim dim dim", "gain": 0.5}), tinted_by(image, [3, 3, 3], gain=0.5)
        )
        with pytest.raises(UsageError, match="has 7 tokens, the network takes 6; use a shorter one"):
            restorer(image, inputs={"prompt": "red " * 6})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_file_of_what_words_become_takes_their_place(tinted, tmp_path, dtype):
    image = noise(20, 30, 3)
    save_file({"look.tint": np.array([[0.5, 0.25, 1]], dtype)}, tmp_path / "look.safetensors")
    with load(tinted) as restorer:
        made = restorer.restore(image, inputs={"look": tmp_path / "look.safetensors"})
    assert_tinted(made.image, tinted_by(image, [4, 2, 8]))
    assert "words" not in made.seconds and "paint" in made.seconds


def test_a_file_of_another_shape_is_refused_before_any_work(tinted, tmp_path):
    save_file({"look.tint": np.ones((1, 4), np.float32)}, tmp_path / "look.safetensors")
    with load(tinted, memory="low") as restorer:
        with pytest.raises(
            InputError, match=r"'look.tint' has shape \[1, 4\], this bundle takes \[1, 3\]; use its own$"
        ):
            restorer(noise(4, 4, 3), inputs={"look": tmp_path / "look.safetensors"})
        assert restorer.engines.opened == {}


# Any scale


@pytest.mark.parametrize("scale", [None, 1, 2, 3])
def test_a_bundle_that_leaves_the_scale_open_enlarges_by_what_is_asked(tinted, scale):
    image = noise(20, 30, 3)
    times = scale or 1
    large = np.asarray(Image.fromarray(image).resize((30 * times, 20 * times), Image.Resampling.BICUBIC))
    large = image if times == 1 else large
    with load(tinted) as restorer:
        made = restorer.restore(image, scale=scale, tile=96, overlap=0)
        assert (made.scale, made.image.shape, made.tiles["paint"]) == (times, (20 * times, 30 * times, 3), 1)
        assert_tinted(made.image, tinted_by(large, [6, 6, 6]))
    plans = estimate(read_bundle(tinted), 30, 20, scale=scale)
    assert (plans.scale, plans.width, plans.height) == (times, 30 * times, 20 * times)


def test_a_larger_scale_needs_more_memory(tinted):
    needs = [estimate(read_bundle(tinted), 300, 200, scale=scale).needed_bytes for scale in (1, 2, 4)]
    assert needs == sorted(set(needs))


# Tiles of fixed sides


def test_an_image_smaller_than_a_tile_of_fixed_sides_is_padded_and_cut_back(build, kernels):
    """The filter sees the image padded to a tile, and what is given back is the image's part of it."""
    fixed = replace(SHARPENED, passes=(replace(SHARPENED.passes[0], tiles=Tiles(64, 16, fixed_px=(64, 32))),))
    root = build(program=fixed)
    for tile, least in ((None, 64), (32, 32)):
        for height, width in ((5, 9), (14, 12), (16, 10)):
            image = noise(height, width, 3)
            (_, plan), *_ = estimate(read_bundle(root), width, height, tile=tile).passes
            assert (plan.height, plan.width, len(plan.tiles)) == (least, least, 1)
            with load(root) as restorer:
                np.testing.assert_array_equal(restorer(image, tile=tile), expected(image, kernels, least))
    with pytest.raises(UsageError, match=r"^tile=48 is not one of the sizes this bundle is made for: \[64, 32\]$"):
        estimate(read_bundle(root), 30, 30, tile=48)


# Rounds


@pytest.fixture
def calls(monkeypatch):
    """How often each component's engine is run."""
    counted = Counter()
    run = ort.OrtEngine.run

    def count(engine, inputs, wanted):
        counted[engine.graph.parent.name] += 1
        return run(engine, inputs, wanted)

    monkeypatch.setattr(ort.OrtEngine, "run", count)
    return counted


ROUNDS = [  # what is asked for, and what is done again; the image is in two tiles
    ({}, {"words": 1, "see": 2, "paint": 2}),
    ({}, {}),
    ({"prompt": "bright bright bright"}, {}),  # the program's own words, given
    ({"prompt": "dim"}, {"words": 1, "paint": 2}),
    ({"prompt": "dim", "gain": 2}, {"paint": 2}),
    ({"prompt": "dim red", "gain": 2}, {"words": 1, "paint": 2}),
    ({"gain": 2, "look": "look.safetensors"}, {"paint": 2}),
    ({"gain": 2, "look": "look.safetensors"}, {}),
    ({"gain": 2, "prompt": "dim"}, {"words": 1, "paint": 2}),
    ({}, {"words": 1, "paint": 2}),
]


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_sitting_repeats_only_what_other_inputs_reach(tinted, tmp_path, monkeypatch, calls, memory):
    monkeypatch.chdir(tmp_path)
    save_file({"look.tint": np.float32([[0.5, 0.25, 1]])}, "look.safetensors")
    image, told = scene(20, 50), []
    with load(tinted, memory=memory, threads=1) as restorer:
        sitting = restorer.sitting(image, on_progress=lambda name, done, total: told.append(name))
        for inputs, repeated in ROUNDS:
            calls.clear()
            told.clear()
            made = sitting.restore(inputs)
            assert calls == repeated
            assert made.seconds.keys() & {"words", "see", "paint"} == repeated.keys()
            again = {"words": "text"}  # the pass is called otherwise than its component
            assert set(told) == {again.get(name, name) for name in repeated}
            assert made.tiles == {"text": 1, "see": 2, "paint": 2}
            np.testing.assert_array_equal(made.image, restorer(image, inputs=inputs))


def test_a_sitting_is_called_with_its_inputs_by_name(tinted):
    image = noise(20, 30, 3)
    with load(tinted) as restorer:
        sitting = restorer.sitting(image)
        np.testing.assert_array_equal(
            sitting(prompt="dim red", gain=2), sitting.restore({"prompt": "dim red", "gain": 2}).image
        )
        assert_tinted(sitting(prompt="dim red"), tinted_by(image, [3, 5, 1]))


def test_pictures_of_earlier_rounds_stay_as_they_were(tinted):
    with load(tinted) as restorer:
        sitting = restorer.sitting(noise(20, 30, 3))
        first = sitting(prompt="red")
        before = first.copy()
        sitting(prompt="dim")
        assert sitting(prompt="red") is not first
        np.testing.assert_array_equal(first, before)


def test_a_round_that_is_refused_leaves_the_sitting_usable(tinted, calls):
    image = noise(20, 30, 3)
    with load(tinted) as restorer:
        sitting = restorer.sitting(image)
        first = sitting(prompt="red")
        calls.clear()
        for wrong in ({"prompt": "red " * 9}, {"gian": 1}, {"gain": "high"}, {"look": "nowhere"}, {"mean": 1}):
            with pytest.raises(TilewrightError):
                sitting.restore(wrong)
        np.testing.assert_array_equal(sitting(prompt="red"), first)
        assert calls == {}


def test_a_round_after_an_engine_failed_gives_what_a_fresh_one_gives(tinted, monkeypatch):
    image = scene(20, 50)
    with load(tinted) as restorer:
        sitting = restorer.sitting(image)
        sitting()
        run, failing = ort.OrtEngine.run, [True]

        def fail(engine, inputs, wanted):
            if engine.graph.parent.name == "paint" and failing:
                raise ResourceError("no room")
            return run(engine, inputs, wanted)

        monkeypatch.setattr(ort.OrtEngine, "run", fail)
        with pytest.raises(ResourceError, match="no room"):
            sitting(prompt="dim")
        failing.clear()
        np.testing.assert_array_equal(sitting(prompt="dim"), restorer(image, inputs={"prompt": "dim"}))
        np.testing.assert_array_equal(sitting(), restorer(image))


def test_the_time_between_rounds_is_nobodys(tinted):
    with load(tinted) as restorer:
        sitting = restorer.sitting(noise(20, 30, 3))
        sitting.restore({})
        time.sleep(0.5)
        seconds = sitting.restore({"gain": 2}).seconds
    assert seconds["passes"] < 0.4 and seconds["total"] < 0.4
    phases = seconds.keys() - {"total", "words", "see", "paint"}
    assert seconds["total"] == pytest.approx(sum(seconds[name] for name in phases))


# Opening and closing


class Life:
    """Which engines are opened and closed, in order."""

    def __init__(self, monkeypatch):
        self.told = []
        open_engine, close = ort.open_engine, ort.OrtEngine.close

        def opened(bundle, component, **options):
            self.told.append(f"+{component}")
            return open_engine(bundle, component, **options)

        def closed(engine):
            self.told.append(f"-{engine.graph.parent.name}")
            close(engine)

        monkeypatch.setattr(ort, "open_engine", opened)
        monkeypatch.setattr(ort.OrtEngine, "close", closed)

    def take(self):
        told, self.told = self.told, []
        return told


@pytest.fixture
def life(monkeypatch):
    return Life(monkeypatch)


ONE_BY_ONE = ["+words", "-words", "+see", "-see", "+paint", "-paint"]


def test_in_fast_memory_all_engines_are_opened_at_once_and_closed_at_the_end(tinted, life):
    with load(tinted) as restorer:
        assert sorted(life.take()) == ["+paint", "+see", "+words"]
        for _ in range(2):
            restorer(noise(9, 9, 3))
        restorer.sitting(noise(9, 9, 3))(gain=2)
        assert life.take() == []
    assert sorted(life.take()) == ["-paint", "-see", "-words"]


@pytest.mark.parametrize("workers", [1, 3])
def test_in_low_memory_an_engine_is_open_from_its_first_call_to_the_end_of_its_last_pass(tinted, life, workers):
    with load(tinted, memory="low", workers=workers) as restorer:
        assert life.take() == []
        for _ in range(2):  # used again, they are opened again
            restorer(scene(20, 50))
            assert life.take() == ONE_BY_ONE
    assert life.take() == []


def test_engines_that_do_not_fit_together_are_opened_one_pass_at_a_time(tinted, life, monkeypatch):
    image = scene(20, 50)
    with load(tinted) as restorer:
        usual = restorer(image)
    life.take()
    monkeypatch.setattr(memory, "weights_bytes", lambda bundle, components, memory: 2**60 if memory == "fast" else 0)
    with load(tinted) as restorer:
        assert life.take() == []
        np.testing.assert_array_equal(restorer(image), usual)
        assert life.take() == ONE_BY_ONE


@pytest.mark.parametrize(("free", "opened"), [(None, True), (309, True), (308, False), (0, False)])
def test_engines_fit_together_where_their_weights_leave_three_tenths_of_what_is_free(
    bundle, life, monkeypatch, free, opened
):
    monkeypatch.setattr(restore, "available_bytes", lambda: free)  # the weights hold 27 numbers twice: 216 bytes
    with load(bundle):
        assert life.take() == (["+sharpen"] if opened else [])


def test_rounds_in_low_memory_open_only_the_engines_they_call(tinted, life):
    with load(tinted, memory="low") as restorer:
        sitting = restorer.sitting(scene(20, 50))
        sitting()
        assert life.take() == ONE_BY_ONE
        sitting(gain=2)
        assert life.take() == ["+paint", "-paint"]
        sitting(gain=2)
        assert life.take() == []
        sitting(prompt="red")
        assert life.take() == ["+words", "-words", "+paint", "-paint"]


def test_what_is_given_for_words_keeps_their_engine_closed(tinted, life, tmp_path):
    save_file({"look.tint": np.float32([[0.5, 0.25, 1]])}, tmp_path / "look.safetensors")
    with load(tinted, memory="low") as restorer:
        restorer(scene(20, 50), inputs={"look": tmp_path / "look.safetensors"})
    assert life.take() == ["+see", "-see", "+paint", "-paint"]


def test_an_engine_left_open_by_a_fault_is_closed_with_the_restorer(tinted, life, monkeypatch):
    def fail(engine, inputs, wanted):
        raise ResourceError("no room")

    monkeypatch.setattr(ort.OrtEngine, "run", fail)
    with load(tinted, memory="low") as restorer, pytest.raises(ResourceError):
        restorer(noise(9, 9, 3))
    assert life.take() == ["+words", "-words"]


def test_leaving_the_context_closes_the_engines_also_after_an_error(bundle):
    for fault in (None, RuntimeError("halfway")):
        try:
            with load(bundle) as restorer:
                assert isinstance(restorer, Restorer)
                (engine,) = restorer.engines.values()
                assert engine.session is not None
                if fault:
                    raise fault
        except RuntimeError:
            assert fault
        assert engine.session is None


def test_weights_that_moved_are_read_from_the_given_folder(bundle, weights_dir, tmp_path, kernels):
    weights_dir.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match="pass --weights-dir, or rebuild with --pack"):
        load(bundle)
    image = noise(5, 7, 3)
    for given in (str(tmp_path / "moved"), tmp_path / "moved"):
        with load(bundle, weights_dir=given) as restorer:
            np.testing.assert_array_equal(restorer(image), expected(image, kernels))


def test_constants_are_those_of_the_file(bundle):
    manifest = read_bundle(bundle).manifest
    tensors = {
        "table": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.array([0.5, -2], np.float16),
        "count": np.array(7, np.int64),
        "flags": np.array([True, False, True]),
    }
    save_file(tensors, bundle / "constants.safetensors")
    write_manifest(bundle, manifest)
    with load(bundle) as restorer:
        assert restorer.constants.keys() == tensors.keys()
        for name, array in tensors.items():
            assert restorer.constants[name].dtype == array.dtype
            np.testing.assert_array_equal(restorer.constants[name], array)


def with_constant(bundle: Path, dtype: str, data: bytes) -> None:
    """Give a bundle the constant `mean` of two elements, as the bytes of a file that no library wrote."""
    manifest = read_bundle(bundle).manifest
    header = json.dumps({"mean": {"dtype": dtype, "shape": [2], "data_offsets": [0, len(data)]}}).encode()
    (bundle / "constants.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    write_manifest(bundle, manifest)


def test_a_constant_in_bfloat16_is_widened(bundle):
    with_constant(bundle, "BF16", struct.pack("<2H", 0x3FC0, 0xC010))  # the high halves of 1.5 and -2.25
    with load(bundle) as restorer:
        mean = restorer.constants["mean"]
    assert (mean.dtype, mean.tolist()) == (np.float32, [1.5, -2.25])


@pytest.mark.parametrize(("dtype", "name"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")])
def test_a_constant_that_numpy_cannot_hold_is_refused(bundle, dtype, name):
    with_constant(bundle, dtype, b"\0\0")
    with pytest.raises(BundleError, match=rf"constants\.safetensors: 'mean' is {name}, which NumPy has not; store it"):
        load(bundle)


def test_importing_the_runtime_loads_no_framework_and_no_engine():
    heavy = ["torch", "diffusers", "transformers", "onnx", "onnxruntime", "safetensors", "tensorrt", "triton"]
    code = f"import sys, tilewright.runtime; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
