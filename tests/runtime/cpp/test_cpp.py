"""The C++ library against the vectors, against the Python runtime's pixels, and used wrongly."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.pages import OPTION, page
from tilewright.runtime.restore import load
from tilewright.runtime.text import token_ids

pytestmark = pytest.mark.slow  # the compiler takes a while

ROOT = Path(__file__).parents[3]


def test_it_computes_and_refuses_what_the_vectors_say(run):
    done = run("tests/vectors", ROOT / "tests" / "vectors", ROOT / "tests" / "programs")
    assert done.returncode == 0, done.stdout
    assert " cases, 0 wrong" in done.stdout


def test_what_once_broke_a_reader_is_refused(run):
    folder = Path(__file__).parent / "crashes"
    done = run("tests/replay", folder)
    assert (done.returncode, done.stdout) == (0, f"{len([*folder.iterdir()])} replayed\n"), done.stderr


def test_a_wrong_use_gives_a_status_and_a_line(run, bundle):
    done = run("tests/misuse", bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(", 0 wrong\n")


def test_a_callback_may_throw(run, bundle):
    done = run("tests/callbacks", bundle)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_exports_the_functions_of_its_header_and_no_other(built):
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", built / "libtilewright.so"], capture_output=True, text=True, check=True
    )
    exported = {line.split()[2] for line in listing.stdout.splitlines()}
    header = (ROOT / "runtime" / "cpp" / "include" / "tilewright.h").read_text()
    declared = {
        line.partition("(")[0].split()[-1].lstrip("*") for line in header.splitlines() if line.startswith("TW_API ")
    }
    assert exported == declared


def picture(width: int, height: int, channels: int) -> np.ndarray:
    random = np.random.default_rng(width)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([120 + 100 * np.sin(x / (3 + c) + y / 5) for c in range(channels)], -1)
    return (waves + random.normal(0, 5, waves.shape)).clip(0, 255).astype(np.uint8).squeeze()


@pytest.fixture
def agrees(run, tmp_path, monkeypatch):
    """Restore a picture with both runtimes, and compare the pixels."""
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")

    def agrees(
        bundle: Path, size: tuple[int, int], *settings: str, channels: int = 3, arguments=None, **options: int
    ) -> None:
        source, target = tmp_path / "in.png", tmp_path / "out.png"
        Image.fromarray(picture(*size, channels)).save(source)
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        words += [word for setting in settings for word in ("--set", setting)]
        done = run("tilewright-restore", "--bundle", bundle, source, target, "--batch", 1, "--json", *words)
        assert done.returncode == 0, done.stderr
        with load(bundle, batch=1, engine="ort") as restorer:
            right = restorer(source, **options, **(arguments or {}))
            assert json.loads(done.stdout)["digest"] == restorer.bundle.digest
        pixels = np.asarray(Image.open(target))
        assert pixels.shape == right.shape
        difference = np.abs(pixels.astype(int) - right)
        assert difference.max() <= 1
        assert (difference == 0).mean() >= 0.999

    return agrees


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_filter_has_pythons_pixels_in_every_format(agrees, bundle, channels):
    agrees(bundle, (41, 30), channels=channels)


def test_ids_numbers_and_scales_have_pythons_pixels(agrees, tinted):
    ids = token_ids(tinted / "tokenizers" / "words.json", "warm red dim", 6)
    setting = f"ids={','.join(map(str, ids[0]))}"
    agrees(
        tinted,
        (50, 37),
        setting,
        "gain=0.5",
        arguments={"prompt": "warm red dim", "gain": 0.5},
        scale=3,
        tile=64,
        overlap=16,
    )


def test_hitoksr_has_pythons_pixels(agrees, hitoksr_tiny):
    agrees(hitoksr_tiny, (45, 61), channels=4)
    agrees(hitoksr_tiny, (61, 45), tile=128, overlap=32)


def test_joined_noisy_steps_have_pythons_pixels(agrees, in_token_tiny):
    agrees(in_token_tiny, (50, 12), tile=128, overlap=32, steps=3, seed=7)


def test_words_and_wrong_values_are_refused(run, tinted, tmp_path):
    source = tmp_path / "in.png"
    Image.fromarray(picture(8, 8, 3)).save(source)

    def refused(code: int, part: str, *words: object) -> None:
        done = run("tilewright-restore", "--bundle", tinted, source, tmp_path / "out.png", *words)
        assert (done.returncode, done.stdout) == (code, "")
        assert part in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out.png").exists()

    ids = ("--set", "ids=3,3,3,1,0,0")
    refused(4, "this library has no tokenizer")
    refused(4, "give the token ids as ids instead", "--set", "prompt=red")
    refused(2, "ids has 2 numbers; give 6", "--set", "ids=3,4")
    refused(2, "'x' is no int64", "--set", "ids=3,x")
    refused(2, "gain=9 is not a number from -8 to 8", *ids, "--set", "gain=9")
    refused(2, "unknown argument 'depth'; this bundle takes gain, look, prompt", *ids, "--set", "depth=9")
    refused(2, "steps=3: sharpen has no steps", *ids, "--steps", 3)
    refused(2, "unknown option --fast", *ids, "--fast")
    refused(3, "is not the expected", *ids, "--expect", "0" * 12)


def test_a_changed_file_is_refused(run, bundle, tmp_path):
    graph = bundle / "sharpen.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    done = run("tilewright-restore", "--bundle", bundle, tmp_path / "in.png", tmp_path / "out.png")
    assert done.returncode == 3
    assert "sharpen.onnx: SHA-256 differs from the sealed" in done.stderr


def test_the_page_names_options_and_functions_that_exist(run):
    text, usage = page("cpp"), run("tilewright-restore", "--help").stdout
    lines = [line for line in text.splitlines() if line.startswith("build/cpp/tilewright-restore ")]
    assert len(lines) >= 4
    assert set(OPTION.findall(" ".join(lines))) <= set(OPTION.findall(usage))
    header = (ROOT / "runtime" / "cpp" / "include" / "tilewright.h").read_text()
    names = set(re.findall(r"\btw_\w+|\bTW_\w+", text))
    assert {"tw_open", "tw_restore", "tw_close"} <= names
    assert all(re.search(rf"\b{name}\b", header) for name in names)
    options = {name for name in re.findall(r"-D([A-Z_]+)=", text) if not name.startswith("CMAKE_")}
    sources = (ROOT / "runtime" / "cpp").rglob("*.*")
    cmake = "".join(file.read_text() for file in sources if file.name == "CMakeLists.txt" or file.suffix == ".cmake")
    assert len(options) >= 2 and all(f"option({name} " in cmake for name in options)
