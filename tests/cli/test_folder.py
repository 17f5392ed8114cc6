"""`restore` on a folder, and the devices of a command: words in, files, lines and exit codes out."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.forked import Forked
from support.scenes import noise
from tilewright.cli.main import main
from tilewright.cli.terminal import Progress
from tilewright.runtime import load
from tilewright.runtime.execute.devices import usable_cores


@pytest.fixture
def folder(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the folder `in` of four pictures, of which c.png is damaged, and the bundle `b`."""
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("a.png", "b.bmp", "c.png", "d.png")):
        Image.fromarray(noise(12 + i, 16, 3, seed=i)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "c.png").write_bytes(b"damaged")
    (tmp_path / "b").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def restore(*words: str) -> int:
    return main(["runtime", "restore", "in", "out", "--bundle", "b", *words])


def test_a_folder_is_restored_and_the_failure_is_listed_with_its_code(folder, capsys) -> None:
    (folder / "in" / "notes.txt").write_text("none")
    assert restore() == 8
    said = capsys.readouterr()
    first, engines, second = said.out.splitlines()
    assert first.startswith("in -> out: 3 of 4 images in ")
    assert engines == "engines: ort-float32 on cpu:0"
    assert second.startswith("failed: in/c.png is damaged or not an image")
    *notes, error = said.err.splitlines()
    assert notes[0].startswith("note: 1 other file(s) of in are left out")
    assert error.startswith("tilewright: 1 of 4 images failed, the first is in/c.png is damaged")
    assert error.endswith("what was finished is kept in out: the same command with --resume goes on from there")
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["a.png", "b.png", "d.png", "finished.resume"]
    with load("b") as restorer:
        for source in ("a.png", "b.bmp", "d.png"):
            target = (folder / "out" / source).with_suffix(".png")
            np.testing.assert_array_equal(np.asarray(Image.open(target)), restorer(folder / "in" / source))


def test_json_has_a_row_an_image_with_its_fault(folder, capsys) -> None:
    assert restore("--json", "--format", "webp", "--max-pixels", "220", "-q") == 8
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == 2 and told["error"]["code"] == 8
    assert (set(told["engines"].values()), told["devices"]) == ({"ort-float32"}, ["cpu:0"])
    a, b, c, d = told["images"]
    assert (a["input"], a["output"], a["width"], a["height"]) == ("in/a.png", "out/a.webp", 32, 24)
    assert (b["input_width"], b["input_height"], b["tiles"]) == (16, 13, {"restore": 1})
    assert {"read", "passes", "write", "total"} <= a["seconds"].keys()
    assert c["error"]["kind"] == "InputError"
    assert d["error"]["message"].endswith("read it with --max-pixels 240")
    assert Image.open("out/a.webp").format == "WEBP"
    (folder / "in" / "c.png").unlink()
    assert restore("--json", "-q") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == 0 and "error" not in told and len(told["images"]) == 3


def test_what_is_there_is_replaced_as_with_one_file(folder, capsys) -> None:
    (folder / "in" / "c.png").unlink()
    (folder / "out").mkdir()
    for name in ("a.png", "d.png"):
        (folder / "out" / name).write_bytes(b"old")
    (folder / "out" / "d.png").chmod(0o444)
    assert restore("-q") == 2
    assert capsys.readouterr().err.startswith(
        "tilewright: 1 of 3 images failed, the first is in/d.png: out/d.png is read-only"
    )
    assert (folder / "out" / "d.png").read_bytes() == b"old" != (folder / "out" / "a.png").read_bytes()
    assert restore("-q", "--force") == 0
    before = (folder / "in" / "a.png").read_bytes()
    assert main(["runtime", "restore", "in", "in", "--bundle", "b", "-q"]) == 2
    assert "in/a.png is the input itself" in capsys.readouterr().err
    assert (folder / "in" / "a.png").read_bytes() == before and (folder / "in" / "b.png").exists()


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ("gpu:0", "device 'gpu:0' is unknown; there are cpu:0 to cpu:"),
        ("cpu", "device 'cpu' is unknown; there are cpu:0 to cpu:"),
        ("cpu:00", "device 'cpu:00' is unknown; there are cpu:0 to cpu:"),
        ("", "device '' is unknown; there are cpu:0 to cpu:"),
        ("cpu:0,", "device '' is unknown; there are cpu:0 to cpu:"),
        ("cpu:0,cpu:0", "device 'cpu:0' is named twice; name it once"),
        (f"cpu:{usable_cores()}", f"there are {usable_cores()} cores; use cpu:0 to cpu:"),
    ],
)
def test_devices_that_cannot_be_are_one_line(folder, capsys, devices: str, said: str) -> None:
    for source, target in (("in", "out"), ("in/a.png", "a.png")):
        assert main(["runtime", "restore", source, target, "--bundle", "b", "--devices", devices]) == 2
        error = capsys.readouterr()
        assert error.out == "" and error.err.count("\n") == 1 and said in error.err
        assert not (folder / target).exists()


def test_a_folder_goes_to_a_folder(folder, capsys) -> None:
    for target, said in (("-", "name a folder for the results"), ("b/bundle.json", "is a file, in a folder")):
        assert main(["runtime", "restore", "in", target, "--bundle", "b"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_ends_a_folder_soon_and_what_is_finished_stays(folder) -> None:
    for path in (folder / "in").iterdir():
        path.unlink()
    for i in range(60):
        Image.fromarray(noise(300, 400, 3, seed=i)).save(folder / "in" / f"{i:02}.png")
    words = ["runtime", "restore", "in", "out", "--bundle", "b", "-q"]
    with Forked(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while not list(folder.glob("out/[0-9]*.png")) and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        out, said = running.communicate(timeout=60)
    kept = "what was finished is kept in out: the same command with --resume goes on from there"
    assert (running.returncode, out, said) == (143, "", f"tilewright: terminated; {kept}\n")
    written = [path for path in (folder / "out").iterdir() if path.suffix != ".resume"]
    assert 1 <= len(written) < 60 and not any(path.name.startswith(".") for path in written)
    for path in written:
        assert Image.open(path).convert("RGB").size == (800, 600)


def test_a_bar_over_the_whole_job_tells_what_is_left(monkeypatch, capsys) -> None:
    now = 100.0
    monkeypatch.setattr("tilewright.cli.terminal.time.monotonic", lambda: now)
    with Progress() as progress:
        for seconds, done, share in ((6, 0, 0.1), (6, 1, 0.2), (1, 1, 0.21), (7, 2, 0.5)):
            now += seconds
            progress.images(done, 3, share)
    assert capsys.readouterr().err.splitlines() == [
        "images 0/3 after 6 s, about 54 s left",
        "images 1/3 after 12 s, about 48 s left",
        "images 2/3 after 20 s, about 20 s left",
    ]
