"""What the command tells or refuses by size before any work: plans, simulations, large tiles, memory and disk."""

import json
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from support.scenes import noise
from tilewright.cli.main import main
from tilewright.runtime import load
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.memory import estimate as memory
from tilewright.runtime.memory.estimate import estimate
from tilewright.runtime.simulate import Cost, graph_of, simulate


@pytest.fixture
def here(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the picture in.png and the bundle `b`, whose tiles are 64 px."""
    Image.fromarray(noise(40, 60, 3)).save(tmp_path / "in.png")
    (tmp_path / "b").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_of_a_huge_image_lists_no_tile(here, capsys) -> None:
    assert main(["runtime", "plan", "100000", "100000", "--bundle", "b", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    columns = -(-(200_000 - 16) // 48)
    assert told["passes"][0]["tiles"] == columns * columns == told["passes"][0]["columns"] ** 2
    assert told["needed_bytes"] > 3 * 200_000**2
    for _, plan in estimate(read_bundle(here / "b"), 100_000, 100_000).passes:
        assert "tiles" not in vars(plan)


@pytest.mark.parametrize("verb", ["plan", "simulate"])
def test_a_side_of_too_many_tiles_is_refused(here, capsys, verb: str) -> None:
    size = {"plan": ["99999999", "99999999"], "simulate": ["199999998x64", "--step-ms", "1"]}[verb]
    assert main(["runtime", verb, *size, "--bundle", "b"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "tilewright: a side of 200000000 px is more than 100000 tiles of 64 px; use a larger tile or a smaller image\n"
    )


def test_a_huge_picture_is_refused_before_it_is_decoded(here, capsys, monkeypatch) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 9900, 9900, 8, 2, 0, 0, 0)
    Path("huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))  # has no pixels
    words = ["runtime", "restore", "huge.png", "out.png", "--bundle", "b"]
    bundle = read_bundle(here / "b")
    need, on_disk = (estimate(bundle, 9900, 9900, on_disk=disk).needed_bytes for disk in (False, True))
    monkeypatch.setattr(memory, "available_bytes", lambda: on_disk // 2)
    assert main(words) == 5
    assert capsys.readouterr().err.startswith("tilewright: 19800x19800 px needs about ")
    for free in (need // 2, 2 * need):  # pixels on the disk, and in memory
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: free)
        assert main(words) == 8
        err = capsys.readouterr().err
        assert "huge.png cannot be decoded" in err and "WARNING" not in err


@pytest.mark.parametrize("words", [["restore", "in.png", "out.png"], ["plan", "60", "40"]])
def test_a_tile_that_is_larger_than_the_bundles_gets_a_note(here, capsys, words: list[str]) -> None:
    for tile, said in (("128", "note: --tile 128 is larger than the 64 px this bundle is made for;"), ("64", "")):
        assert main(["runtime", *words, "--bundle", "b", "--tile", tile]) == 0
        assert capsys.readouterr().err.startswith(said) and (said or capsys.readouterr().err == "")
    assert main(["runtime", *words, "--bundle", "b", "--tile", "128", "-q"]) == 0
    assert capsys.readouterr().err == ""


# Simulations


def simulated(*words: str) -> int:
    return main(["runtime", "simulate", "--bundle", "b", *words])


def test_a_simulation_tells_what_the_library_does(here, capsys) -> None:
    words = ("1000x500", "--devices", "3", "--step-ms", "20", "--join-ms", "1", "--images", "2", "--tile", "128")
    assert simulated(*words, "--svg", "t.svg", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    graph = graph_of(read_bundle(here / "b").program, 1000, 500, tile=128)
    expected = simulate([graph, graph], 3, Cost(0.02, 0.001))
    tiles = -(-(1000 - 16) // 112) * -(-(504 - 16) // 112)
    assert told["nodes"] == 2 * tiles and told["makespan_s"] == pytest.approx(-(-2 * tiles // 3) * 0.02)
    for name in ("makespan_s", "utilisation", "critical_path_s", "bound_s", "peak_bytes"):
        assert told[name] == getattr(expected, name)
    bars = [
        bar
        for bar in ElementTree.parse("t.svg").iter("{http://www.w3.org/2000/svg}rect")
        if bar.find("{*}title") is not None
    ]
    assert len(bars) == len(expected.runs)
    assert simulated(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{2 * tiles} nodes on 3 device(s): ") and [line[:4] for line in lines[-3:]] == [
        "   0",
        "   1",
        "   2",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["1000", "--step-ms", "1"], "'1000' is no size; write WIDTHxHEIGHT"),
        (["0x9", "--step-ms", "1"], "'0x9' is no size"),
        (["64x64"], "--step-ms"),
        (["64x64", "--step-ms", "0"], "--step-ms 0, --join-ms 0: times must be positive"),
        (["64x64", "--step-ms", "nan"], "--step-ms nan"),
        (["64x64", "--step-ms", "1", "--devices", "0"], "--devices 0 is not a whole number from 1 to 100000"),
        (["64x64", "--step-ms", "1", "--images", "0"], "--images 0 is not a whole number from 1 to 100000"),
        (["64x64", "--step-ms", "1", "--steps", "2"], "--steps 2: this bundle has no steps; leave it out"),
        (["4000000x4000", "--step-ms", "1"], "4000000x4000 px, 1 image(s): 6916639 nodes are too many to simulate"),
        (["64x64", "--step-ms", "1", "--images", "9999999"], "--images 9999999 is not a whole number from 1 to"),
        (["64x64", "--step-ms", "1", "--tile", "7"], "--tile 7 is not a positive multiple of 8"),
    ],
)
def test_a_simulation_that_makes_no_sense_is_refused(here, capsys, words: list[str], said: str) -> None:
    assert simulated(*words) == 2
    error = capsys.readouterr()
    assert error.out == "" and said in error.err and error.err.count("\n") == 1


# Disks


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with room for 16 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this process may mount no disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_without_room_is_refused_before_the_work(here, full, capsys) -> None:
    for words in (["in.png", "disk/out.png"], [".", "disk"]):
        assert main(["runtime", "restore", *words, "--bundle", "b", "-q"]) == 5
        said = capsys.readouterr().err
        assert "disk/" in said and "takes up to 28.8 kB, and 16.4 kB are free there; free space" in said
        assert list(full.iterdir()) == []


def test_a_picture_that_a_full_disk_refuses_is_kept_elsewhere(here, full, capsys, monkeypatch) -> None:
    (here / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(here / "temporary"))
    monkeypatch.setattr("tilewright.cli.restore.check_room", lambda path, shape: None)  # it was filled during the work
    assert main(["runtime", "restore", "in.png", "disk/out.png", "--bundle", "b", "-q"]) == 5
    (kept,) = (here / "temporary").iterdir()
    assert capsys.readouterr().err == (
        "tilewright: disk/out.png cannot be written (No space left on device): free space there or choose another"
        f" path; the picture is kept as {kept}\n"
    )
    with load("b") as restorer:
        np.testing.assert_array_equal(np.asarray(Image.open(kept)), restorer("in.png"))
    assert list(full.iterdir()) == []


def test_a_format_that_cannot_hold_the_picture_is_refused_before_the_work(here, capsys, monkeypatch) -> None:
    Image.fromarray(noise(1, 8200, 3)).save("wide.png")
    for words in (["wide.png", "out.webp"], ["wide.png", "-", "--format", "webp"]):
        monkeypatch.setattr("sys.stdout.isatty", lambda: False)
        assert main(["runtime", "restore", *words, "--bundle", "b"]) == 2
        said = capsys.readouterr()
        assert said.out == "" and "would be 16400x2, over WEBP's limit of 16383 pixels a side" in said.err
