"""The C++ library with packages of AOTInductor: the numbers and pixels of the Python runtime, and its refusals."""

import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="the library is then built without packages of AOTInductor")
from safetensors.numpy import save_file

from support.scenes import scene
from support.small_network import compile_small, feed, stored
from support.toy import fill, importable
from tilewright.cli.main import main
from tilewright.runtime import load
from tilewright.runtime.engines.aoti import open_package
from tilewright.runtime.errors import TilewrightError

pytestmark = [
    pytest.mark.slow,  # the compiler takes a while
    pytest.mark.skipif("TILEWRIGHT_SANITIZE" in os.environ, reason="PyTorch's library is built without sanitizers"),
]


@pytest.fixture(scope="module")
def toy(cache, shared) -> Path:
    """The toy's bundle with engines of ONNX Runtime and compiled ones."""
    with importable():
        return shared("toy-compiled", fill) / "bundle"


@pytest.fixture(scope="module")
def package(shared) -> Path:
    """The small network's package."""
    return shared("aoti-small", compile_small) / "float32.pt2"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(scene(70, 53)).save(tmp_path / "in.png")
    return tmp_path / "in.png"


def restored(command: Path, bundle: Path, picture: Path, *words: str) -> np.ndarray:
    target = picture.with_name("out.png")
    done = subprocess.run([command, "--bundle", bundle, picture, target, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(target))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--devices", "cpu:0,cpu:1", "--threads", "1"], {"devices": ["cpu:0", "cpu:1"], "threads": 1}),
        (["--batch", "3", "--memory", "low"], {"batch": 3, "memory": "low"}),
    ],
    ids=["one device", "two devices that share engines", "batches, low memory"],
)
def test_it_has_pythons_pixels(
    built: Path, toy: Path, picture: Path, words: list[str], options: dict[str, object]
) -> None:
    with load(toy, engine="aoti", tile=48, **options) as restorer:
        assert {spec.backend for spec in restorer.specs.values()} == {"aoti"}
        right = restorer(picture)
    ours = restored(built / "tilewright-restore", toy, picture, "--engine", "aoti", "--tile", "48", *words)
    difference = np.abs(ours.astype(int) - right)
    assert right.std() > 20 and difference.max() <= 1 and (difference == 0).mean() >= 0.999


def test_machine_code_from_elsewhere_runs_only_if_it_is_asked_for(
    run, toy: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(cache))  # that of the toy's build, and not this test's own

    def reasons(*words: str) -> dict[str, str]:
        listed = run("tilewright-restore", "--bundle", toy, "--engines", *words).stdout.splitlines()
        return dict(line.split(" ", 2)[1:] for line in listed if line.startswith("see: "))

    assert reasons("--engine", "aoti")["aoti-float32"] == "was chosen"
    assert "not compiled here" not in reasons()["aoti-float32"]
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache of another user"))
    capsys.readouterr()
    assert main(["runtime", "doctor", str(toy), "--json"]) == 0
    engines = json.loads(capsys.readouterr().out)["components"]["see"]["engines"]
    (right,) = {engine["reason"] for engine in engines if engine["backend"] == "aoti"}
    assert "not compiled here" in right and reasons()["aoti-float32"] == right
    assert reasons()["ort-float32"] == "was chosen"
    assert reasons("--engine", "float32")["ort-float32"] == "was chosen"
    for wish in ("aoti", "aoti-float32"):
        assert reasons("--engine", wish)["aoti-float32"] == "was chosen"


def calls(built: Path, package: Path, weights: Path, inputs: list[Path]) -> subprocess.CompletedProcess[str]:
    words = [built / "tests" / "packages", package, weights, "1", "features,indices", *inputs]
    return subprocess.run([*map(str, words)], capture_output=True, text=True)


def test_a_package_gives_pythons_numbers_from_any_weights(built: Path, package: Path, tmp_path: Path) -> None:
    """Also with one row for all tiles, and with weights in three types."""
    places, _ = stored(tmp_path, 1)
    sizes = [(1, 2, 2, 1), (2, 6, 10, 2), (3, 8, 4, 1), (31, 2, 4, 31)]
    files = [tmp_path / f"in{i}" for i in range(len(sizes))]
    for file, each in zip(files, sizes, strict=True):
        save_file(feed(*each), file)
    done = calls(built, package, tmp_path / "1.safetensors", files)
    assert done.returncode == 0, done.stderr
    engine = open_package(package, package.with_suffix(".safetensors"), places, threads=1)
    lines = []
    for file, each in zip(files, sizes, strict=True):
        for name, right in sorted(engine.run(feed(*each), ["features", "indices"]).items()):
            lines.append(f"{name} {right.dtype} {[*right.shape]}")
            ours = np.fromfile(f"{file}.{name}", right.dtype).reshape(right.shape)
            np.testing.assert_allclose(ours, right, rtol=0, atol=1e-6)
    assert done.stdout.splitlines() == lines
    engine.close()


def test_inputs_that_a_package_does_not_take_are_refused_as_in_python(
    built: Path, package: Path, tmp_path: Path
) -> None:
    places, _ = stored(tmp_path, 1)
    changes: list[dict[str, np.ndarray | None]] = [
        {"image": np.zeros((1, 3, 5, 4), np.float32)},
        {"image": np.zeros((1, 4, 4, 4), np.float32)},
        {"image": np.zeros((3, 4, 4), np.float32)},
        {"image": np.zeros((32, 3, 4, 4), np.float32)},
        {"time": np.zeros(3, np.float32)},
        {"time": np.zeros(1, np.float64)},
        {"other": np.zeros(1, np.float32)},
        {"time": None},
    ]
    files, right = [], []
    engine = open_package(package, package.with_suffix(".safetensors"), places, threads=1)
    for number, change in enumerate(changes):
        inputs = {name: array for name, array in (feed(2, 4, 4, 1) | change).items() if array is not None}
        files.append(tmp_path / f"in{number}")
        save_file(inputs, files[-1])
        with pytest.raises(TilewrightError) as caught:
            engine.run(inputs, ["features"])
        right.append(
            f"{caught.value.exit_code} {caught.value}".replace("the bundle's own --tile", "the bundle's own tile")
        )
    engine.close()
    done = calls(built, package, tmp_path / "1.safetensors", files)
    assert done.returncode == 0 and done.stdout.splitlines() == right


def test_packages_that_cannot_be_opened_are_refused_in_one_line(built: Path, package: Path, tmp_path: Path) -> None:
    places, _ = stored(tmp_path, 1)
    broken, inputs = tmp_path / "float32.pt2", tmp_path / "in"
    shutil.copyfile(package.with_suffix(".safetensors"), tmp_path / "float32.safetensors")
    save_file(feed(1, 2, 2, 1), inputs)
    save_file({"look.bias": np.zeros(8, np.float32)}, tmp_path / "few")

    def refused(weights: str) -> str:
        done = calls(built, broken, tmp_path / weights, [inputs])
        assert done.returncode == 3 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"{broken}: ")
        return done.stderr

    for data in (package.read_bytes()[:5000], b""):
        broken.write_bytes(data)
        assert "the graph is damaged: copy the bundle again" in refused("1.safetensors")
    broken.write_bytes(package.read_bytes())
    with pytest.raises(TilewrightError) as caught:
        open_package(broken, tmp_path / "float32.safetensors", {"look.bias": places["look.bias"]})
    assert refused("few") == f"{caught.value}\n"
    repack(broken, lambda text: text.replace("sizes", "size"))
    assert "the package does not tell its sizes; compile it again" in refused("1.safetensors")


def repack(package: Path, change: Callable[[str], str]) -> None:
    """Change what a package says of itself."""
    with zipfile.ZipFile(package) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(package, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data.decode()) if name.endswith("metadata.json") else data)


def test_the_installed_library_finds_what_runs_packages(prefix: Path, built: Path, toy: Path, picture: Path) -> None:
    words = ("--engine", "aoti", "--tile", "48")
    ours = restored(prefix / "bin" / "tilewright-restore", toy, picture, *words)
    np.testing.assert_array_equal(ours, restored(built / "tilewright-restore", toy, picture, *words))
    (prefix / "lib" / "libtilewright_aoti.so").rename(prefix / "away")
    try:
        command = [
            prefix / "bin" / "tilewright-restore",
            "--bundle",
            toy,
            picture,
            picture.with_name("none.png"),
            *words,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        (prefix / "away").rename(prefix / "lib" / "libtilewright_aoti.so")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "keep libtilewright_aoti.so beside libtilewright.so" in done.stderr
    assert not picture.with_name("none.png").exists()
