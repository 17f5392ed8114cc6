"""`load_native` and `restore --native`: the C++ library through ctypes, with the pixels of the Python runtime."""

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.pages import ROOT
from support.scenes import scene
from tilewright.cli.main import main
from tilewright.runtime import load, load_native, native
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, UsageError

pytestmark = pytest.mark.slow

INCLUDE = ROOT / "runtime" / "cpp" / "include"
STRUCTS = {
    "tw_params": native.Params,
    "tw_image": native.Image,
    "tw_value": native.Value,
    "tw_part": native.Part,
    "tw_options": native.Options,
    "tw_engine": native.ChosenEngine,
}


@pytest.fixture(autouse=True)
def library(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_LIBRARY", str(built / "libtilewright.so"))
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")


def assert_same(pixels: np.ndarray, right: np.ndarray) -> None:
    assert pixels.shape == right.shape and pixels.dtype == right.dtype
    difference = np.abs(pixels.astype(int) - right)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.999


def test_the_structs_are_laid_out_as_in_the_header(tmp_path: Path) -> None:
    lines = []
    for name, struct in STRUCTS.items():
        lines += [f'printf("{name} %zu\\n", sizeof({name}));']
        lines += [f'printf("{name}.{f[0]} %zu\\n", offsetof({name}, {f[0]}));' for f in struct._fields_]
    body = "#include <stdio.h>\n#include <tilewright.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    (tmp_path / "layout.c").write_text(body)
    subprocess.run(["cc", "-std=c17", f"-I{INCLUDE}", "layout.c", "-o", "layout"], cwd=tmp_path, check=True)
    told = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    ours = {}
    for name, struct in STRUCTS.items():
        ours |= {name: ctypes.sizeof(struct)}
        ours |= {f"{name}.{f[0]}": getattr(struct, f[0]).offset for f in struct._fields_}
    assert {line.split()[0]: int(line.split()[1]) for line in told.splitlines()} == ours


def test_the_command_restores_with_pythons_pixels(bundle, tmp_path, capsys) -> None:
    Image.fromarray(np.dstack((scene(30, 41), scene(30, 41)[:, :, 0]))).save(tmp_path / "in.png")
    words = ["runtime", "restore", str(tmp_path / "in.png")]
    assert main([*words, str(tmp_path / "python.png"), "--bundle", str(bundle), "-q"]) == 0
    capsys.readouterr()
    assert main([*words, str(tmp_path / "native.png"), "--bundle", str(bundle), "--native", "--json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["library"].startswith("0.1.0, ") and "onnxruntime " in told["library"]
    assert told["engines"] == {"sharpen": "ort-float32"} and told["devices"] == ["cpu:0"]
    assert_same(np.asarray(Image.open(tmp_path / "native.png")), np.asarray(Image.open(tmp_path / "python.png")))


@pytest.mark.parametrize("layout", [(30, 41), (30, 41, 3), (30, 41, 4)])
def test_arrays_keep_their_layout(bundle, layout) -> None:
    image = np.resize(scene(30, 41), layout)
    with load(bundle) as python, load_native(bundle) as restorer:
        assert_same(restorer(image), python(image))


def test_words_numbers_and_tiles_are_passed_on(tinted) -> None:
    options = {"prompt": "warm red dim", "gain": 0.5, "scale": 3, "tile": 64, "overlap": 16}
    done, parts = [], []
    with load(tinted) as python, load_native(tinted, devices=("cpu:0", "cpu:1"), threads=1) as restorer:
        restoration = restorer.restore(
            scene(37, 50),
            on_progress=lambda name, count, total: done.append((name, count, total)),
            on_part=lambda top, left, pixels: parts.append((top, left, pixels)),
            **options,
        )
        assert_same(restoration.image, python(scene(37, 50), **options))
        assert restoration.devices == ("cpu:0", "cpu:1")
    assert done and done[-1][1] == done[-1][2]
    whole = np.zeros_like(restoration.image)
    for top, left, pixels in parts:
        whole[top : top + len(pixels), left : left + pixels.shape[1]] = pixels
    assert np.array_equal(whole, restoration.image)


def test_a_callback_that_raises_ends_the_call(bundle) -> None:
    def fails(name: str, done: int, total: int) -> None:
        raise KeyError("mine")

    with load_native(bundle) as restorer:
        with pytest.raises(KeyError, match="mine"):
            restorer(scene(30, 41), on_progress=fails)
        assert restorer(scene(30, 41)).shape


def test_a_signal_ends_the_command(bundle, tmp_path) -> None:
    """The library asks between tiles, and the exception of the signal is raised where the caller waits."""
    code = (
        "import os, signal, sys, numpy as np\n"
        "from tilewright.runtime import load_native\n"
        "restorer = load_native(sys.argv[1])\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it\n"
        "def kill(name, done, total): os.kill(os.getpid(), signal.SIGINT)\n"
        "try: restorer(np.zeros((300, 300, 3), np.uint8), tile=64, overlap=16, on_progress=kill)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_what_is_refused(bundle, tinted, tmp_path, monkeypatch) -> None:
    with load_native(tinted) as restorer:
        with pytest.raises(UsageError, match="gain=9 is not a number from -8 to 8"):
            restorer(scene(8, 8), prompt="red", gain=9)
        with pytest.raises(UsageError, match="tile=13"):
            restorer(scene(8, 8), prompt="red", tile=13)
    with pytest.raises(UsageError, match="is closed"):
        restorer(scene(8, 8), prompt="red")
    with pytest.raises(UsageError, match="engine='fast' is none of this bundle's engines"):
        load_native(bundle, engine="fast")
    with pytest.raises(BundleError, match="is not the expected"):
        load_native(bundle, expect="0" * 12)
    monkeypatch.setenv("TILEWRIGHT_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(EnvironmentMismatch, match="run make cpp, or set TILEWRIGHT_LIBRARY"):
        load_native(bundle)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--bits", "16"), "--bits does not work with --native"),
        (("--resume",), "--resume does not work with --native"),
        (("--checkpoint", "5"), "--checkpoint does not work with --native"),
        (("--cluster", "auto"), "--cluster does not work with --native"),
    ],
)
def test_options_without_a_counterpart_are_refused(bundle, tmp_path, capsys, words, part) -> None:
    Image.fromarray(scene(8, 8)).save(tmp_path / "in.png")
    files = [str(tmp_path / "in.png"), str(tmp_path / "out.png")]
    assert main(["runtime", "restore", *files, "--bundle", str(bundle), "--native", *words]) == 2
    told = capsys.readouterr().err
    assert part in told and told.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_the_functions_are_those_of_the_header() -> None:
    header = (INCLUDE / "tilewright.h").read_text()
    assert all(re.search(rf"\b{name}\(", header) for name in native.FUNCTIONS)
