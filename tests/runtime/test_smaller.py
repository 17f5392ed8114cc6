"""Too little memory for a tile: the image begins anew with smaller tiles, or the error says so."""

import json

import numpy as np
import pytest
from PIL import Image

from support.devices import Cramped
from support.scenes import noise
from tilewright.cli.main import main
from tilewright.runtime import load, setup
from tilewright.runtime.bundle.program import Tiles
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import ResourceError, UsageError
from tilewright.runtime.memory import estimate as memory
from tilewright.runtime.memory.estimate import estimate
from tilewright.runtime.memory.machine import bytes_of
from tilewright.runtime.plan.passes import plan_of, smaller_tile

IMAGE = noise(60, 90, 3)


def cramp(restorer, room_px):
    restorer.executor.devices[:] = [Cramped(device, room_px) for device in restorer.executor.devices]
    return restorer


def test_an_image_that_lacks_memory_begins_anew_with_the_tiles_that_fit(bundle):
    with load(bundle) as restorer:
        expected = restorer.restore(IMAGE, tile=32)
        assert expected.notes == ()
        cramp(restorer, 40 * 40)
        parts = []
        restoration = restorer.restore(
            IMAGE, on_part=lambda top, left, pixels: parts.append((top, left, pixels.copy()))
        )
    np.testing.assert_array_equal(restoration.image, expected.image)
    assert restoration.tiles == expected.tiles
    assert restoration.notes == ("too little memory: the image began anew with --tile 32",)
    told = np.zeros_like(restoration.image)
    for top, left, pixels in parts:
        told[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    np.testing.assert_array_equal(told, expected.image)


def test_a_further_round_keeps_the_smaller_tiles(tinted):
    with load(tinted) as restorer:
        sitting = cramp(restorer, 20 * 20).sitting(IMAGE, overlap=0)
        first = sitting.restore()
        assert first.notes == ("too little memory: the image began anew with --tile 16",)
        second = sitting.restore(gain=2)
        assert second.notes == () and second.tiles == first.tiles
        np.testing.assert_array_equal(second.image, restorer(IMAGE, tile=16, overlap=0, gain=2))


def test_a_ticket_that_is_only_asked_whether_it_is_done_begins_anew_too(bundle):
    with load(bundle) as restorer:
        ticket = cramp(restorer, 40 * 40).submit(IMAGE)
        while not ticket.done():
            pass
        assert ticket.result().notes


def test_a_tile_that_the_overlap_needs_is_the_last_one(bundle):
    with load(bundle) as restorer, pytest.raises(MemoryError):
        cramp(restorer, 10).restore(IMAGE)


def test_the_command_says_that_tiles_were_smaller(bundle, tmp_path, capsys, monkeypatch):
    Image.fromarray(IMAGE).save(tmp_path / "in.png")
    monkeypatch.setattr(setup, "CpuDevice", lambda *given: Cramped(cpu(*given), 40 * 40))
    words = ["runtime", "restore", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--bundle", str(bundle)]
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert "note: too little memory: the image began anew with --tile 32\n" in said.err
    assert json.loads(said.out)["notes"] == ["too little memory: the image began anew with --tile 32"]


cpu = setup.CpuDevice


@pytest.mark.parametrize(
    ("tiles", "side", "overlap", "smaller"),
    [
        (Tiles(512, 64), 512, None, 256),
        (Tiles(512, 64), 256, None, 128),
        (Tiles(512, 64), 144, None, 128),  # twice the overlap
        (Tiles(512, 64), 128, None, None),
        (Tiles(512, 64), 128, 0, 64),
        (Tiles(512, 64), 16, 0, None),
        (Tiles(512, 64, (2048, 2048)), 2048, None, 512),  # taken whole: first the bundle's own tiles
        (Tiles(1024, 256, fixed_px=(1024, 512, 256)), 1024, None, 512),
        (Tiles(1024, 256, fixed_px=(1024, 512, 256)), 512, None, None),
        (Tiles(1024, 256, fixed_px=(1024, 512, 256)), 512, 64, 256),
        (Tiles(1024, 256, fixed_px=(1024,)), 1024, None, None),
    ],
)
def test_the_next_smaller_tile_is_one_that_the_program_allows(bundle, tiles, side, overlap, smaller):
    from dataclasses import replace

    program = replace(read_bundle(bundle).program, multiple_px=16)
    p = replace(program.passes[0], tiles=tiles)
    tile = None if tiles.whole_up_to_px else side
    plan = plan_of(program, p, 2048, 2048, tile, overlap)
    assert plan.tile_width == side
    assert smaller_tile(program, [(p, plan)], overlap) == smaller


# A limit


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31),
        ("2 gib", 2**31),
        ("1.5GB", 1_500_000_000),
        ("800MiB", 800 * 2**20),
        ("64KiB", 65536),
        ("12345", 12345),
        ("1TiB", 2**40),
        ("3kb", 3000),
    ],
)
def test_an_amount_of_memory_is_a_number_with_a_unit(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "GiB", "-1GiB", "2 GiB more", "2Gi", "1e9", "nan", "inf", "9999999TiB", "٣"])
def test_other_amounts_are_refused(bundle, text):
    with pytest.raises(UsageError, match="is no amount of memory; write 800MiB, 2GiB or 2GB"):
        load(bundle, memory_limit=text)


def test_a_limit_counts_as_what_is_free_and_the_error_names_the_least_that_works(bundle):
    whole = read_bundle(bundle)
    need = estimate(whole, 90, 60).needed_bytes
    with load(bundle, memory_limit=need) as restorer:
        restorer(IMAGE)
    least = estimate(whole, 90, 60, tile=32, memory="low").needed_bytes
    with load(bundle, memory_limit=need - 1) as restorer:
        with pytest.raises(
            ResourceError, match=r"GiB are allowed; the least is .* GiB, with --tile 32 and --memory low$"
        ):
            restorer(IMAGE)
        assert restorer.estimate(90, 60).least() == (least, "--tile 32 and --memory low")
    with load(bundle, memory_limit=least, memory="low") as restorer:
        restorer(IMAGE, tile=32)


def test_the_smaller_of_limit_and_free_memory_counts(bundle, monkeypatch):
    whole = read_bundle(bundle)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    assert estimate(whole, 90, 60, memory_limit=10**8).available_bytes == 10**8
    assert estimate(whole, 90, 60, memory_limit=10**10).available_bytes == 10**9
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert estimate(whole, 90, 60, memory_limit=10**8).available_bytes == 10**8


@pytest.mark.parametrize("verb", ["restore", "plan", "profile"])
def test_a_limit_below_one_tile_is_refused_with_exit_5(bundle, tmp_path, capsys, verb):
    Image.fromarray(IMAGE).save(tmp_path / "in.png")
    words = {"restore": [str(tmp_path / "in.png"), str(tmp_path / "o.png")], "plan": ["90", "60"], "profile": []}[verb]
    assert main(["runtime", verb, *words, "--bundle", str(bundle), "--memory-limit", "1MiB"]) == 5
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("tilewright: ") and "the least is" in said.err and not said.out
    assert not (tmp_path / "o.png").exists()
