"""Engines that take tiles of some sides only: which one is chosen, and images that are smaller than its tiles."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from support.scenes import difference, expected, noise, scene
from tilewright.cli.main import main
from tilewright.runtime import load
from tilewright.runtime.bundle.manifest import Profile, Range
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.write import write_manifest
from tilewright.runtime.errors import EnvironmentMismatch, UsageError


@pytest.fixture
def with_sides(bundle):
    """Give the bundle one engine for each pair of a least and a most side; the first is preferred."""

    def with_sides(*sides):
        manifest = read_bundle(bundle).manifest
        component = manifest.components["sharpen"]
        engines = tuple(
            replace(component.engines[0], name=f"ort-{least}-{most}", profile=Profile(Range(1, 3), Range(least, most)))
            for least, most in sides
        )
        write_manifest(bundle, replace(manifest, components={"sharpen": replace(component, engines=engines)}))
        return bundle

    return with_sides


@pytest.mark.parametrize(
    ("tile", "chosen"), [(None, "ort-64-64"), (64, "ort-64-64"), (32, "ort-8-48"), (48, "ort-8-48")]
)
def test_the_engine_that_takes_the_tiles_is_chosen(with_sides, kernels, tile, chosen):
    image = scene(60, 70)
    with load(with_sides((8, 48), (64, 64)), tile=tile) as restorer:
        restoration = restorer.restore(image)
    assert restoration.engines == {"sharpen": chosen}
    assert difference(restoration.image, expected(image, kernels)).max() <= 2


def test_an_image_may_name_other_tiles_that_its_engine_takes(with_sides):
    image = scene(60, 70)
    with load(with_sides((8, 48)), tile=48) as restorer:
        tiles = [restorer.restore(image, **options).tiles["restore"] for options in ({}, {"tile": 48}, {"tile": 32})]
        assert tiles[0] == tiles[1] < tiles[2]
        # what other processes leave free changes from moment to moment
        estimates = [restorer.estimate(70, 60, **options) for options in ({}, {"tile": 48}, {"tile": 32})]
        estimates = [replace(estimate, available_bytes=0) for estimate in estimates]
        assert estimates[0] == estimates[1] != estimates[2]
        with pytest.raises(UsageError, match="ort-8-48 of sharpen takes tiles of 8 to 48 px, and these have 64"):
            restorer.restore(image, tile=64)


def test_tiles_that_no_engine_takes_are_refused_with_each_reason(with_sides):
    bundle = with_sides((8, 48), (64, 64))
    with pytest.raises(EnvironmentMismatch) as caught:
        load(bundle, tile=56)
    assert str(caught.value) == (
        "no engine of sharpen can run here: ort-64-64 takes tiles of 64 to 64 px, and these have 56; ort-8-48 takes"
        " tiles of 8 to 48 px, and these have 56"
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 9), (20, 90), (31, 17)])
def test_an_image_smaller_than_the_tiles_of_its_engine_is_padded(with_sides, kernels, height, width):
    image = noise(height, width, 3)
    with load(with_sides((64, 64))) as restorer:
        restoration = restorer.restore(image)
    apart = difference(restoration.image, expected(image, kernels, least=64))
    assert apart.max() <= (0 if width < 32 else 1)  # several tiles are joined within a level


@pytest.mark.parametrize("verb", ["restore", "plan"])
def test_the_command_line_chooses_by_the_tile(with_sides, tmp_path, capsys, verb):
    bundle = with_sides((8, 48), (64, 64))
    Image.fromarray(noise(37, 53, 3)).save(tmp_path / "in.png")
    words = [str(tmp_path / "in.png"), str(tmp_path / "out.png")] if verb == "restore" else ["53", "37"]
    for tile, code in (("48", 0), ("64", 0), ("56", 4)):
        assert main(["runtime", verb, *words, "--bundle", str(bundle), "--tile", tile]) == code
    assert "takes tiles of 8 to 48 px" in capsys.readouterr().err


def test_the_plan_counts_devices_and_the_tiles_of_a_call(bundle, capsys):
    words = ["runtime", "plan", "900", "900", "--bundle", str(bundle), "--json"]

    def needed(*options):
        assert main([*words, *options]) == 0
        return json.loads(capsys.readouterr().out)["needed_bytes"]

    call = 1_000_000 + 24 * 64 * 64  # as the manifest says
    alone, batched, apart = needed(), needed("--batch", "9"), needed("--devices", "cpu:0,cpu:1")
    assert batched - alone >= 8 * 24 * 64 * 64
    assert apart - alone >= call


def test_a_smaller_tile_for_want_of_memory_is_one_that_the_engine_takes(with_sides):
    with load(with_sides((32, 64))) as restorer:
        needs = restorer.estimate(90, 60)
    least, options = needs.least()
    assert options == "--tile 32 and --memory low"
    assert 0 < least < needs.needed_bytes
