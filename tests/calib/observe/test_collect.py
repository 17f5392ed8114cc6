"""Collecting: each tensor at each step as the program has it, stops and what goes on, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.stepped import GAIN, STEPS, stepped
from tilewright.calib import collect, read_observations
from tilewright.calib.observe.watch import WatchedEngine
from tilewright.calib.scales.histograms import histogram_of
from tilewright.cli.main import main
from tilewright.runtime.errors import AccuracyError, DeviceError, InputError, UsageError
from tilewright.runtime.resume.checkpoint import beside

TENSORS = ["step/grown", "step/sum"]


def pixels(path: Path) -> np.ndarray:
    """The picture as the networks get it."""
    return np.asarray(Image.open(path), np.float32).transpose(2, 0, 1) / np.float32(255)


def test_each_tensor_is_seen_at_each_step_with_the_numbers_that_it_has_there(stepping: Path, pictures: Path) -> None:
    output = pictures.parent / "s.safetensors"
    collected = collect(stepping, pictures, output)
    read, facts = read_observations(output)
    assert read.tensors == collected.observations.tensors == TENSORS
    images = [pixels(path) for path in sorted(pictures.glob("*.png"))]
    z = [np.zeros_like(image) for image in images]
    for step in range(STEPS):
        entering = [image + before for image, before in zip(images, z, strict=True)]
        z = [np.float32(GAIN) * numbers for numbers in entering]
        for tensor, arrays in (("step/sum", entering), ("step/grown", z)):
            seen, numbers = read.seen[tensor, step], np.concatenate([array.reshape(3, -1) for array in arrays], 1)
            expected = histogram_of(numbers)
            assert (seen.histogram.lowest, seen.histogram.highest) == (expected.lowest, expected.highest)
            assert np.array_equal(seen.histogram.counts, expected.counts)
            assert seen.channels is not None and np.array_equal(seen.channels, np.abs(numbers).max(1))
    assert read.steps("step/sum") == list(range(STEPS))
    assert facts["bundle"] == hashlib.sha256((stepping / "bundle.json").read_bytes()).hexdigest()
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(pictures.glob("*.png"))}
    assert {image["name"]: image["sha256"] for image in facts["images"]} == sums


def test_the_number_of_steps_and_of_images_can_be_chosen(stepping: Path, pictures: Path) -> None:
    output = pictures.parent / "s.safetensors"
    collected = collect(stepping, pictures, output, steps=5, images=2)
    assert collected.observations.steps("step/sum") == list(range(5))
    assert [image["name"] for image in collected.facts["images"]] == ["0.png", "2.png"]  # evenly from all


class Stopped(BaseException):
    """As an interrupt."""


def test_a_collection_that_was_stopped_goes_on_and_ends_with_the_same_bytes(stepping: Path, pictures: Path) -> None:
    whole, other = pictures.parent / "whole.safetensors", pictures.parent / "other.safetensors"
    collect(stepping, pictures, whole)

    def stop(done: int, images: int, share: float) -> None:
        if share > 2.2 / images:
            raise Stopped

    for before in (2, 3):  # in the middle of the third picture, and again of the fourth
        with pytest.raises(Stopped):
            collect(stepping, pictures, other, on_progress=lambda d, n, s, b=before: stop(d, n, s - (b - 2) / n))
        assert not other.exists() and beside(other).exists()
    collected = collect(stepping, pictures, other)
    assert collected.finished_before == 3
    assert other.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in pictures.parent.glob("other*")) == ["other.safetensors"]


def test_several_devices_see_the_same(stepping: Path, pictures: Path) -> None:
    one, two = pictures.parent / "one.safetensors", pictures.parent / "two.safetensors"
    collect(stepping, pictures, one)
    collect(stepping, pictures, two, devices=["cpu:0", "cpu:1"])
    assert one.read_bytes() == two.read_bytes()


def test_what_was_begun_with_other_options_is_refused(stepping: Path, pictures: Path) -> None:
    output = pictures.parent / "s.safetensors"

    def stop(done: int, images: int, share: float) -> None:
        if done:
            raise Stopped

    with pytest.raises(Stopped):
        collect(stepping, pictures, output, on_progress=stop)
    message = (
        "s.safetensors.resume is of a collection with other seed and options; ask for the same as before, or remove"
    )
    with pytest.raises(UsageError, match=message):
        collect(stepping, pictures, output, seed=1, steps=2)
    beside(output).write_bytes(b"?")
    with pytest.raises(InputError, match=r"s\.safetensors\.resume is damaged or holds no statistics"):
        collect(stepping, pictures, output)


def test_numbers_that_are_not_finite_are_told_by_image_tensor_and_step(tmp_path: Path, pictures: Path) -> None:
    bundle, output = stepped(tmp_path / "large.bundle", gain=1e20), tmp_path / "s.safetensors"
    message = r"0\.png: step: tensor 'grown' at step 2 holds inf, \d+ of 768 numbers are not finite; check the weights"
    with pytest.raises(AccuracyError, match=message):
        collect(bundle, pictures, output)
    assert not output.exists() and not beside(output).exists()


def test_tiles_that_ran_twice_after_a_fault_are_not_counted(
    stepping: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = pictures.parent / "s.safetensors", pictures.parent / "whole.safetensors"
    two = ["cpu:0", "cpu:1"]
    calls, run_it = [], WatchedEngine.run

    def fail_once(engine: WatchedEngine, inputs: Any, outputs: Any) -> dict[str, Any]:
        results = run_it(engine, inputs, outputs)
        calls.append(engine)
        if len(calls) == 12:  # of the second picture, after its tensors have been seen
            raise RuntimeError("a cable is loose")
        return results

    with (
        monkeypatch.context() as patched,
        pytest.raises(DeviceError, match=r"1\.png: cpu:\d failed \(a cable is loose"),
    ):
        patched.setattr(WatchedEngine, "run", fail_once)
        collect(stepping, pictures, output, devices=two)
    assert collect(stepping, pictures, output, devices=two).finished_before == 1
    collect(stepping, pictures, whole)
    assert output.read_bytes() == whole.read_bytes()


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["calib", "collect", *map(str, words)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_command_tells_what_it_saw(
    stepping: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "s.safetensors"
    code, out, _ = run(capsys, stepping, pictures, "-o", output, "--images", 3, "--steps", 2)
    assert code == 0 and f"{output}: 2 tensors at up to 2 step(s), 3 images in " in out
    code, out, _ = run(capsys, stepping, pictures, "-o", output, "--images", 3, "--json", "-q", "--devices", "cpu:0")
    told = json.loads(out)
    assert code == 0 and told["tensors"] == dict.fromkeys(TENSORS, STEPS) and told["finished_before"] == 0
    assert told["images"] == ["0.png", "1.png", "3.png"] and told["output"] == str(output)


def test_the_arguments_of_the_bundle_can_be_given(
    stepping: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "s.safetensors"
    code, _, _ = run(capsys, stepping, pictures, "-o", output, "--lift", "0.5")
    brightest = max(float(pixels(path).max()) for path in pictures.glob("*.png"))
    read, facts = read_observations(output)
    assert code == 0 and read.seen["step/sum", 0].histogram.highest == np.float32(brightest) + np.float32(0.5)
    assert facts["options"]["lift"] == 0.5
    with pytest.raises(SystemExit):
        main(["calib", "collect", str(stepping), "--help"])
    assert "--lift" in capsys.readouterr().out


REFUSED = [  # the name of a folder, more words, the code, and a part of the line
    ("nowhere", [], 8, "nowhere cannot be read (No such file or directory); check the path"),
    ("empty", [], 8, "empty holds no image; calibration needs 2 images or more, 16 are usual"),
    ("lone", [], 8, "lone holds only 0.png; calibration needs 2 images or more"),
    ("small", [], 8, "1.png has 40x12 px and does not fill a tile of 16 px; leave it out, or take a picture of 16x16"),
    ("damaged", [], 8, "1.png"),
    ("pictures", ["--images", "1"], 2, "--images 1 is not a whole number of at least 2"),
    ("pictures", ["--tile", "64"], 8, "does not fill a tile of 64 px"),
    ("pictures", ["--steps", "0"], 2, "count=0 is no number of steps"),
    ("pictures", ["--seed", "-1"], 2, "--seed -1 is not a whole number from 0"),
    ("pictures", ["--devices", "cuda:0"], 2, "device 'cuda:0' is unknown"),
    ("pictures", ["--lift", "2"], 2, "--lift '2' is not a number from 0 to 1"),
    ("pictures", ["-o", "nowhere/s.safetensors"], 2, "which is not a directory: create it first"),
    ("pictures", ["-o", "pictures"], 2, "pictures is a directory: name a file"),
    ("pictures", ["--expect", "0123456789ab"], 3, "0123456789ab"),
]


@pytest.mark.parametrize(
    ("folder", "words", "code", "said"), REFUSED, ids=[f"{f} {' '.join(w)}" for f, w, *_ in REFUSED]
)
def test_what_cannot_be_used_is_refused_in_one_line(
    folder: str,
    words: list[str],
    code: int,
    said: str,
    stepping: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(pictures.parent)
    for name in ("empty", "lone", "small", "damaged"):
        Path(name).mkdir()
    for name in ("lone", "small", "damaged"):
        (Path(name) / "0.png").write_bytes((pictures / "0.png").read_bytes())
    Image.new("RGB", (40, 12)).save("small/1.png")
    Path("damaged/1.png").write_bytes(b"no picture")
    got, out, err = run(capsys, stepping, folder, "-o", "s.safetensors", *words)
    lines = [line for line in err.splitlines() if not line.startswith("images ")]
    assert (got, out, len(lines)) == (code, "", 1) and said in lines[0], lines
    assert not Path("s.safetensors").exists() and not Path("s.safetensors.resume").exists()
