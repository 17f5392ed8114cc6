"""Colours, moved tiles and folders: what both commands write."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.commands import told
from support.scenes import scene
from tilewright.runtime import load_native
from tilewright.runtime.errors import UsageError

pytestmark = pytest.mark.slow  # the compiler takes a while


@pytest.fixture
def both(run, tmp_path, monkeypatch):
    """Restore with both commands, and return both pictures."""
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")

    def both(bundle: Path, image: np.ndarray, *words: str) -> tuple[np.ndarray, np.ndarray]:
        source, ours, theirs = (tmp_path / name for name in ("in.png", "ours.png", "theirs.png"))
        Image.fromarray(image).save(source)
        done = run("tilewright-restore", "--bundle", bundle, source, ours, "--batch", 1, *words)
        assert done.returncode == 0, done.stderr
        done = told("runtime", "restore", source, theirs, "--bundle", bundle, "--batch", 1, "-q", *words)
        assert done.returncode == 0, done.stderr
        return np.asarray(Image.open(ours)).astype(int), np.asarray(Image.open(theirs)).astype(int)

    return both


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1 and (ours == theirs).mean() >= 0.999


@pytest.mark.parametrize("color", ["wavelet", "adain"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_colours_are_pythons(both, bundle, color, channels) -> None:
    image = np.dstack((scene(30, 41), scene(30, 41)[:, :, 0]))[:, :, :channels].squeeze()
    ours, theirs = both(bundle, image, "--color", color)
    assert_same(ours, theirs)
    plain, _ = both(bundle, image)
    assert not np.array_equal(plain, ours)


def test_tiles_move_as_in_python(both, in_token_tiny) -> None:
    words = ("--tile", "128", "--overlap", "64", "--steps", "3", "--seed", "7")
    ours, theirs = both(in_token_tiny, scene(44, 60), *words, "--jitter")
    assert_same(ours, theirs)
    plain, _ = both(in_token_tiny, scene(44, 60), *words)
    assert not np.array_equal(plain, ours)


def test_a_folder_is_restored_image_by_image(run, bundle, tmp_path) -> None:
    folder, into = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("b.png", "a.PNG"):
        Image.fromarray(scene(12, 20)).save(folder / name, format="png")
    (folder / "notes.txt").write_text("no image")
    (folder / "bad.png").write_bytes(b"no picture")
    done = run("tilewright-restore", "--bundle", bundle, folder, into, "--json")
    assert done.returncode == 8, done.stderr
    assert "1 of 3 images failed, the first is " in done.stderr and "bad.png cannot be read" in done.stderr
    assert "1 other file(s) of " in done.stderr
    answer = json.loads(done.stdout)
    assert [Path(row["output"]).name for row in answer["images"]] == ["a.png", "b.png", "bad.png"]
    assert answer["failed"] == 1 and answer["images"][2]["error"]["code"] == 8
    assert sorted(path.name for path in into.iterdir()) == ["a.png", "b.png"]
    alone = tmp_path / "alone.png"
    assert run("tilewright-restore", "--bundle", bundle, folder / "b.png", alone).returncode == 0
    assert alone.read_bytes() == (into / "b.png").read_bytes() == (into / "a.png").read_bytes()


def test_folders_that_cannot_be_are_refused(run, bundle, tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "file").write_text("")

    def refused(code: int, part: str, *words: object) -> None:
        done = run("tilewright-restore", "--bundle", bundle, *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stderr
        assert part in done.stderr

    refused(8, "holds no images; their suffix is .png", folder, tmp_path / "out")
    refused(2, "is a file, ", folder, tmp_path / "file")
    refused(2, "is the input itself", folder, folder)
    for name in ("a.png", "a.PNG"):
        Image.new("RGB", (8, 8)).save(folder / name, format="png")
    refused(2, "would both become", folder, tmp_path / "out")
    (folder / "a.PNG").unlink()
    refused(2, "which is not a directory: create it first", folder, tmp_path / "no" / "out")
    assert not (tmp_path / "out").exists()
    refused(
        2, "color='sepia' is not one of off, wavelet, adain", folder / "a.png", tmp_path / "o.png", "--color", "sepia"
    )
    refused(2, "has no pass that joins its tiles after every step", folder / "a.png", tmp_path / "o.png", "--jitter")


def test_native_restorers_take_colours_and_moving_tiles(built, bundle, monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_LIBRARY", str(built / "libtilewright.so"))
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")
    with load_native(bundle) as restorer:
        plain, wavelet = restorer(scene(30, 41)), restorer(scene(30, 41), color="wavelet")
        assert not np.array_equal(plain, wavelet)
        with pytest.raises(UsageError, match="has no pass that joins its tiles"):
            restorer(scene(30, 41), jitter=True)
