"""What the Python runtime refuses, the C++ library refuses too: by both commands, and by both libraries."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.bundles import TINTING
from support.commands import told
from tilewright.runtime import load, load_native
from tilewright.runtime.bundle.program import Input, TensorFile
from tilewright.runtime.errors import TilewrightError, UsageError

pytestmark = pytest.mark.slow  # the compiler takes a while

OPTIONS = {
    "--seed": ["-1", "4294967296", "1.5", ""],
    "--steps": ["0", "3", "-1"],
    "--tile": ["0", "13", "1", "-8"],
    "--overlap": ["-1", "24", "13"],
    "--scale": ["0", "17", "-1"],
    "--batch": ["0", "9999"],
    "--threads": ["-1", "100000"],
    "--devices": ["x", "", ","],
    "--memory-limit": ["0", "x", "1e30GB", "nan"],
    "--expect": ["0", "zz", "000000000000", ""],
    "--engine": ["fast", ""],
    "--memory": ["slow"],
    "--bits": ["12"],
    "--weights-dir": ["/nowhere"],
    "--gain": ["9", "-9", "8.001", "inf", "nan", "1e400", "", "+-5", "0x1p1", "x"],
    "--depth": ["1"],
    "--look": ["/nowhere", "bad.png"],
}
FILES = [
    ("nothing.png", "out.png"),
    ("bad.png", "out.png"),
    ("in.png", "in.png"),
    ("in.png", "out.xyz"),
    ("in.png", "no/out.png"),
    ("in.png", "folder.png"),
    ("in.png",),
    ("in.png", "out.png", "another.png"),
]
IDS = (3, 3, 3, 1, 0, 0)  # of the bundle's default prompt


def test_both_commands_refuse_the_same_words(run, tinted, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "teal").save("in.png")
    Path("bad.png").write_bytes(b"no picture")
    Path("folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[tuple[str, ...], list[tuple[str, str]]]] = [(files, []) for files in FILES]
    cases += [(("in.png", "out.png"), [(name, word)]) for name, words in OPTIONS.items() for word in words]
    cases += [(("in.png", "out.png"), [("--gain", "1"), ("--gain", "2")])]
    for files, options in cases:
        theirs = told("runtime", "restore", *files, "--bundle", tinted, *(f"{name}={word}" for name, word in options))
        words = [] if options[:1] and options[0][0] == "--look" else ["--set", f"ids={','.join(map(str, IDS))}"]
        for name, word in options:
            ours = name in ("--gain", "--depth", "--look")
            words += ["--set", f"{name[2:]}={word}"] if ours else [name, word]
        done = run("tilewright-restore", "--bundle", tinted, *files, *words)
        assert theirs.returncode != 0, (files, options)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (theirs.returncode, "", 1), (options, done)
    assert sorted(tmp_path.iterdir()) == before


CHOICES = {"gain": Input("float32", default=1, choices={"one": 1, "two": 2})}
FILE = {"look": TensorFile({"look.tint": "tint", "look.gain": "gain"})}
TENSORS = {"look.tint": np.ones((1, 3), np.float32)}


@pytest.fixture
def library(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "TILEWRIGHT_SANITIZE" in os.environ:
        pytest.skip("Python, which loads the library, is built without sanitizers")
    monkeypatch.setenv("TILEWRIGHT_LIBRARY", str(built / "libtilewright.so"))
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")


def refusals(
    bundle: Path, arguments: dict[str, Any], arrays: dict[str, Any]
) -> tuple[TilewrightError, TilewrightError]:
    """The errors of Python and of the library, which gets arrays that Python has not checked."""
    image = np.zeros((8, 8, 3), np.uint8)
    with load(bundle) as restorer, pytest.raises(TilewrightError) as theirs:
        restorer(image, **arguments)
    with load_native(bundle) as restorer, pytest.raises(TilewrightError) as ours:
        restorer._arrays = lambda given: {"ids": np.array([IDS]), **given}  # type: ignore[method-assign]
        restorer(image, **arrays)
    assert type(theirs.value) is type(ours.value)
    return theirs.value, ours.value


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("number", [9, -8.001, np.inf, -np.inf, np.nan])
def test_an_array_of_one_number_has_the_same_range(tinted, number) -> None:
    theirs, ours = refusals(tinted, {"gain": number}, {"gain": np.array([number], np.float32)})
    assert str(ours).startswith("gain") and isinstance(theirs, UsageError)
    with load_native(tinted) as restorer:
        restorer._arrays = lambda given: {"ids": np.array([IDS]), **given}  # type: ignore[method-assign]
        restorer(np.zeros((8, 8, 3), np.uint8), gain=np.array([8], np.float32))


@pytest.mark.usefixtures("library")
def test_an_array_of_one_number_is_one_of_the_choices(tint) -> None:
    bundle = tint(program=replace(TINTING, inputs=TINTING.inputs | CHOICES))
    _, ours = refusals(bundle, {"gain": 1.5}, {"gain": np.array([1.5], np.float32)})
    assert str(ours) == "gain=1.5 is not one of one, two"


@pytest.mark.usefixtures("library")
def test_a_file_may_hold_no_number_outside_of_the_range(run, tint, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="writes the file")
    bundle = tint(program=replace(TINTING, files=FILE))
    file = tmp_path / "look.safetensors"
    for gain, fits in ((9, False), (8, True)):
        safetensors.save_file(TENSORS | {"look.gain": np.array(gain, np.float32)}, file)
        Image.new("RGB", (8, 8), "teal").save(tmp_path / "in.png")
        done = run(
            "tilewright-restore", "--bundle", bundle, tmp_path / "in.png", tmp_path / "out.png", "--set", f"look={file}"
        )
        with load(bundle) as restorer:
            if fits:
                restorer(tmp_path / "in.png", look=file)
            else:
                with pytest.raises(UsageError, match="is not a number from -8 to 8"):
                    restorer(tmp_path / "in.png", look=file)
        assert done.returncode == (0 if fits else 2), done.stderr
        assert fits or "gain=9.0 is not a number from -8 to 8" in done.stderr
