"""A pipe, a socket or a device in the place of a file is refused in one line. To open or read it would never end."""

import os
import shutil
import socket
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from support import forked
from support.pages import ROOT

LOOK = {"look.tint": np.zeros((1, 3), np.float32)}


def pipe(path: str) -> None:
    os.mkfifo(path)


def endless(path: str) -> None:
    Path(path).symlink_to("/dev/zero")


def bound(path: str) -> None:
    socket.socket(socket.AF_UNIX).bind(path)


KINDS = {"pipe": pipe, "device": endless, "socket": bound}

RESTORE = ("runtime", "restore")
PAINT = ("--bundle", "tint", "--scale", "2")
SHARPEN = ("--bundle", "b")
DEMO = ("export", "build", "hitoksr", "--weights", "w", "-o", "out/b")
CASES = {  # the file -> the command that meets it
    "in.png": (*RESTORE, "in.png", "out.png", *SHARPEN),
    "photos/1.png": (*RESTORE, "photos", "photos2", *SHARPEN),
    "out.png": (*RESTORE, "good.png", "out.png", *SHARPEN),
    "results/1.png": (*RESTORE, "good", "results", *SHARPEN),
    "look.safetensors": (*RESTORE, "good.png", "out.png", *PAINT, "--look", "look.safetensors"),
    "scores.csv": ("runtime", "select", "good.png", "--scores", "scores.csv"),
    "timeline.svg": ("runtime", "simulate", *SHARPEN, "64x64", "--step-ms", "1", "--svg", "timeline.svg"),
    "b/bundle.json": (*RESTORE, "good.png", "out.png", *SHARPEN),
    "b/program.json": (*RESTORE, "good.png", "out.png", *SHARPEN),
    "b/weights.json": (*RESTORE, "good.png", "out.png", *SHARPEN),
    "b/sharpen.onnx": (*RESTORE, "good.png", "out.png", *SHARPEN),
    "b/constants.safetensors": (*RESTORE, "good.png", "out.png", *SHARPEN),
    "tint/tokenizers/words.json": (*RESTORE, "good.png", "out.png", *PAINT),
    "models/sharpen/sharpen.safetensors": (*RESTORE, "good.png", "out.png", *SHARPEN),
    "moved": (*RESTORE, "good.png", "out.png", *SHARPEN, "--weights-dir", "moved"),
    "out/onnx": ("export", "onnx", "b", "-o", "out/onnx"),
    "out/b": DEMO,
    "w/hitoksr.safetensors": DEMO,
    "w/config.json": DEMO,
    "w": DEMO,
    "w/more.safetensors": DEMO,
    "w/hitoksr.safetensors.index.json": DEMO,
    "more.bin": (*DEMO[:4], "more.bin", *DEMO[5:]),
    "only/more.bin": (*DEMO[:4], "only", *DEMO[5:]),
}
OPENED = ("in.png", "look.safetensors", "scores.csv", "timeline.svg", "w/hitoksr.safetensors", "more.bin")
BEGUN = {  # beside a result: nothing can be kept there, or nothing goes on from there
    "out.png.resume": (*RESTORE, "good.png", "out.png", *SHARPEN, "--resume"),
    "results/finished.resume": (*RESTORE, "good", "results", *SHARPEN, "--resume"),
}


@pytest.fixture
def folder(bundle: Path, tinted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures, two bundles, weights and folders for results."""
    monkeypatch.chdir(tmp_path)
    Path("b").symlink_to(bundle)
    Path("tint").symlink_to(tinted)
    for name in ("photos", "good", "results", "out", "only"):
        Path(name).mkdir()
    for name in ("in.png", "good.png", "photos/1.png", "photos/2.png", "good/1.png", "good/2.png"):
        Image.new("RGB", (16, 16)).save(name)
    save_file(LOOK, "look.safetensors")
    Path("scores.csv").write_text("image,psnr\ngood.png,1\n")
    shutil.copytree(ROOT / "demo" / "hitoksr", "w")
    return tmp_path


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return forked.run([*words, "-q"], text=True, timeout=60, env=os.environ | {"TILEWRIGHT_CACHE_DIR": "cache"})


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        *((f, "pipe") for f in OPENED),
        *(pytest.param(f, "pipe", marks=pytest.mark.slow) for f in CASES if f not in OPENED),
        *(pytest.param(f, kind, marks=pytest.mark.slow) for f, kind in product(OPENED, ("device", "socket"))),
    ],
)
def test_what_is_no_file_is_refused_in_one_line(folder: Path, file: str, kind: str) -> None:
    if Path(file).is_dir():
        shutil.rmtree(file)
    Path(file).unlink(missing_ok=True)
    KINDS[kind](file)
    done = run(*CASES[file])
    assert done.returncode in (2, 3, 4, 5, 8), done.stderr
    assert done.stderr.count("\n") == 1 and "internal" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", BEGUN)
def test_where_parts_of_an_earlier_result_would_be(folder: Path, file: str, kind: str) -> None:
    KINDS[kind](file)
    done = run(*BEGUN[file])
    assert done.returncode in (0, 8) and done.stderr.count("\n") == (done.returncode != 0), done.stderr
    assert not Path(file).is_file()
    assert run(*BEGUN[file][:-1]).returncode == 0
