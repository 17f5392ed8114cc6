"""Images restored from end to end, against Pillow, padding by index and an integer convolution of the whole image."""

import contextlib
import json
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from safetensors.numpy import save_file

from support.scenes import (
    CPUS,
    FROM_NOISE,
    SHARPENED,
    WHOLE,
    assert_tinted,
    difference,
    doubled,
    expected,
    noise,
    scene,
    tinted_by,
)
from tilewright.runtime import Restoration, Restorer, load
from tilewright.runtime.bundle.program import Tiles
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.write import write_manifest
from tilewright.runtime.errors import BundleError, InputError, UsageError
from tilewright.runtime.execute.devices import CpuDevice, OpenEngines
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.memory.estimate import estimate

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


def test_the_number_of_devices_changes_no_byte(bundle):
    image = scene(100, 130)
    made = []
    for devices in (CPUS[:1], CPUS[:2], CPUS):
        with load(bundle, threads=1, devices=devices) as restorer:
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
        low_options, fast_options = (r.engines["sharpen"].session.get_session_options() for r in (low, fast))
        assert low_options.get_session_config_entry("session.disable_prepacking") == "1"
        with pytest.raises(RuntimeError, match="disable_prepacking"):  # the key is not set
            fast_options.get_session_config_entry("session.disable_prepacking")
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


@pytest.mark.parametrize("devices", [CPUS[:1], CPUS])
@pytest.mark.parametrize(
    ("options", "columns", "rows"),  # of 264 x 200 px
    [({}, 6, 4), ({"overlap": 0}, 5, 4), ({"overlap": 32}, 8, 6), ({"tile": 128}, 3, 2), ({"tile": 8}, 33, 25)],
)
def test_progress_is_told_once_a_tile_and_in_order(bundle, devices, options, columns, rows):
    told = []
    with load(bundle, devices=devices) as restorer:
        made = restorer.restore(scene(100, 130), on_progress=lambda *news: told.append(news), **options)
    total = made.tiles["restore"]
    assert total == columns * rows
    assert told == [("restore", done, total) for done in range(1, total + 1)]


def test_a_ticket_forecasts_the_rest_of_its_job_and_of_one_that_goes_on(bundle, tmp_path):
    tickets, there, shares, file = [], threading.Event(), [], tmp_path / "parts"

    def listen(name, done, total):
        if threading.current_thread() is threading.main_thread():  # what was done before, told before there is a ticket
            return
        assert there.wait(20)
        told = tickets[-1].forecast()
        assert told.share == pytest.approx(done / total) and told.left_s >= 0
        shares.append(told.share)
        if len(shares) == 12:
            tickets[-1].keep(file)
            raise KeyError("enough")

    with load(bundle, threads=1) as restorer:
        for resume in (None, file):
            there.clear()
            tickets.append(restorer.submit(scene(100, 130), on_progress=listen, resume=resume))
            there.set()
            with contextlib.suppress(KeyError):
                tickets[-1].result()
    assert tickets[1].resumed[1] == pytest.approx(shares[12] - 1 / 24) == 12 / 24 and shares[-1] == pytest.approx(1)
    assert tickets[1].forecast().left_s == 0.0


def test_devices_work_at_once(bundle):
    meeting = threading.Barrier(2)

    class Engine:
        def run(self, inputs, wanted):
            meeting.wait(timeout=20)
            return {"sharp": inputs["image"]}

    executor = Executor([CpuDevice(f"cpu:{i}", {"sharpen": Engine()}) for i in range(2)])
    restorer = Restorer(read_bundle(bundle), OpenEngines([], None), executor, {})
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


# Words, and what stands for them


def test_a_prompt_decides_through_its_tokenizer(tinted):
    image = noise(20, 30, 3)
    with load(tinted) as restorer:
        assert_tinted(restorer(image, prompt="dim warm red"), tinted_by(image, [3, 4, 5]))
        assert_tinted(restorer(image, prompt="red"), tinted_by(image, [5, 1, 0]))
        assert_tinted(restorer(image), tinted_by(image, [6, 6, 6]))  # the program's own words
        assert_tinted(restorer(image, prompt="dim dim dim", gain=0.5), tinted_by(image, [3, 3, 3], gain=0.5))
        with pytest.raises(UsageError, match="has 7 tokens, the network takes 6; use a shorter one"):
            restorer(image, prompt="red " * 6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_file_of_what_words_become_takes_their_place(tinted, tmp_path, dtype):
    image = noise(20, 30, 3)
    save_file({"look.tint": np.array([[0.5, 0.25, 1]], dtype)}, tmp_path / "look.safetensors")
    with load(tinted) as restorer:
        made = restorer.restore(image, look=tmp_path / "look.safetensors")
    assert_tinted(made.image, tinted_by(image, [4, 2, 8]))
    assert "words" not in made.seconds and "paint" in made.seconds


def test_a_file_of_another_shape_is_refused_before_any_work(tinted, tmp_path):
    save_file({"look.tint": np.ones((1, 4), np.float32)}, tmp_path / "look.safetensors")
    with load(tinted, memory="low") as restorer:
        with pytest.raises(
            InputError, match=r"'look.tint' has shape \[1, 4\], this bundle takes \[1, 3\]; use its own$"
        ):
            restorer(noise(4, 4, 3), look=tmp_path / "look.safetensors")
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


# Opening and closing


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
