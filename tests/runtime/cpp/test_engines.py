"""The C++ library's choice of engines, its estimate of memory and its profile, against the Python runtime's."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tilewright.runtime.bundle.measured import Measured, Measurement, remember
from tilewright.runtime.engines.machine import processor
from tilewright.runtime.restore import load

pytestmark = pytest.mark.slow  # the compiler takes a while


def several_engines(bundle: Path) -> None:
    """Add engines to the bundle's network: a twin, and some that do not fit."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    engines = manifest["components"]["sharpen"]["engines"]
    twin = engines[0]
    engines += [
        twin | {"name": "ort-twin"},
        twin | {"name": "ort-half", "precision": "float16"},
        twin | {"name": "ort-cuda", "device": "cuda"},
        twin | {"name": "ort-odd", "needs": {"instructions": ["odd_9"]}},
        twin | {"name": "ort-new", "needs": {"packages": {"onnxruntime": "99.1"}}},
        twin | {"name": "ort-large", "profile": {"side_px": {"least": 512, "most": 1024}}},
        twin | {"name": "ort-many", "needs": {"cores": 1000}},
    ]
    path.write_text(json.dumps(manifest))


def measure(bundle: Path, **engines: tuple[float, float | None]) -> None:
    numbers = {name.replace("_", "-"): Measured(0.0, seconds, psnr) for name, (seconds, psnr) in engines.items()}
    remember(bundle, Measurement(processor(), 1, {"ort": "1"}, {"sharpen": numbers}))


def chosen(run, bundle: Path, *words: str) -> dict[str, str]:
    """Engine -> why it was not chosen."""
    done = run("tilewright-restore", "--bundle", bundle, "--engines", *words)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("sharpen: ").partition(" ") for line in done.stdout.splitlines()]
    return {name: reason for name, _, reason in lines}


def test_engines_are_chosen_as_in_python_each_with_a_reason(run, build):
    bundle = build()
    several_engines(bundle)
    reasons = chosen(run, bundle)
    assert reasons["ort-float32"] == "was chosen"
    assert reasons["ort-twin"] == "ort-float32 comes first in the fixed order"
    assert reasons["ort-half"].startswith("ort-float32 is more accurate (not measured)")
    assert reasons["ort-cuda"].startswith("runs on cuda")
    assert reasons["ort-odd"] == "needs odd_9, which this CPU lacks"
    assert reasons["ort-new"].startswith("needs onnxruntime 99.1 or later, ")
    assert reasons["ort-large"] == "takes tiles of 512 to 1024 px, and these have 64"
    assert reasons["ort-many"].startswith("needs 1000 cores, and this process may use ")
    for engines in (
        {"ort_twin": (2.0, None)},
        {"ort_float32": (1.0, None)},
        {"ort_half": (0.5, 39.0)},
        {"ort_half": (0.4, 41.0)},
    ):
        measure(bundle, **engines)
        with load(bundle) as restorer:
            right = restorer.specs["sharpen"].name
        reasons = chosen(run, bundle)
        assert [name for name, reason in reasons.items() if reason == "was chosen"] == [right]
    assert right == "ort-half"
    assert reasons["ort-float32"] == "ort-half is faster: 0.4 s a megapixel, this one 1"
    assert chosen(run, bundle, "--engine", "ort-twin")["ort-twin"] == "was chosen"
    (bundle / "reports" / "measured.json").write_text("{")
    assert chosen(run, bundle)["ort-float32"] == "was chosen"


def profiled(run, bundle: Path, *words: object) -> dict:
    done = run("tilewright-profile", "--bundle", bundle, "--json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_profile_has_times_and_pythons_estimate_of_memory(run, bundle):
    for devices in (["cpu:0"], ["cpu:0", "cpu:1"]):
        names = ",".join(devices)
        document = profiled(run, bundle, "--resolutions", "64,160x96", "--devices", names, "--threads", 1, "--tile", 64)
        assert document["devices"] == names
        assert document["engines"] == {"sharpen": "ort-float32"}
        assert [(row["width"], row["height"]) for row in document["resolutions"]] == [(64, 64), (160, 96)]
        with load(bundle, devices=devices, threads=1, tile=64) as restorer:
            for row in document["resolutions"]:
                assert 0 < row["first_part_s"] <= row["seconds"]["max"]
                assert 0 < row["seconds"]["p50"] <= row["seconds"]["max"]
                needed = restorer.estimate(row["width"] // 2, row["height"] // 2).needed_bytes
                assert row["needed_bytes"] == needed


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("system", ["hitoksr_tiny", "in_token_tiny"])
def test_systems_have_pythons_estimate_of_memory(run, request, system, memory):
    bundle = request.getfixturevalue(system)
    words = ["--memory", memory, "--devices", "cpu:0,cpu:1", "--threads", 1, "--engine", "ort"]
    document = profiled(run, bundle, "--resolutions", "128", *words)
    with load(bundle, devices=["cpu:0", "cpu:1"], threads=1, memory=memory, engine="ort") as restorer:
        scale = restorer.bundle.program.scale
        needed = restorer.estimate(-(-128 // scale), -(-128 // scale)).needed_bytes
    assert document["resolutions"][0]["needed_bytes"] == needed


def test_an_image_that_needs_more_memory_is_refused(run, bundle, tmp_path):
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("RGB", (500, 400), "teal").save(source)
    with load(bundle) as restorer:
        needed = restorer.estimate(500, 400).needed_bytes
    words = ["tilewright-restore", "--bundle", bundle, source, target, "--memory-limit"]
    done = run(*words, needed - 1)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("tilewright-restore: 1000x800 px needs about 0.")
    assert "GiB are allowed; the least is 0." in done.stderr
    assert not target.exists()
    assert run(*words, needed).returncode == 0
    done = run(*words, "much")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--memory-limit much is no amount of memory; write 800MiB, 2GiB or 2GB" in done.stderr


def test_wrong_words_of_the_profile_are_refused(run, bundle):
    for words, part in (
        (["--resolutions", "12,x"], "--resolutions x is no size; write 512 or 2560x1440"),
        (["--runs", "4"], "--runs 4 is too few for a median; use 5 or more"),
        (["in.png"], "unexpected word in.png"),
    ):
        done = run("tilewright-profile", "--bundle", bundle, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert part in done.stderr


def test_our_kernels_are_found_beside_the_library(built, bundle, tmp_path):
    """A file that is no library shows where it was looked for."""
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "in.png")
    library = tmp_path / "lib"
    library.mkdir()
    shutil.copy(built / "libtilewright.so.0", library)
    kernels = library / "libtilewright_cpu.so"
    words = [built / "tilewright-restore", "--bundle", bundle, tmp_path / "in.png", tmp_path / "out.png"]
    environment = {name: text for name, text in os.environ.items() if name != "TILEWRIGHT_NATIVE"}
    environment["LD_LIBRARY_PATH"] = f"{library}:{built / 'onnxruntime'}"

    def restored(*more: object, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [*map(str, (*words, *more))]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True)

    assert restored().returncode == 0
    kernels.write_text("no library")
    for done in (restored(), restored(TILEWRIGHT_NATIVE=str(kernels)), restored("--native", kernels)):
        assert done.returncode != 0 and str(kernels) in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    for done in (restored(TILEWRIGHT_NATIVE=""), restored("--native", "")):
        assert done.returncode == 0, done.stderr


def test_digests_are_remembered_and_shared_with_python(run, build, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(cache))
    bundle = build()
    for note in (cache / "digests").iterdir():
        note.unlink()
    assert run("tilewright-restore", "--bundle", bundle, "--arguments").returncode == 0
    written = {note.name: note.read_text() for note in (cache / "digests").iterdir()}
    for note in (cache / "digests").iterdir():
        note.unlink()
    load(bundle).close()
    assert written == {note.name: note.read_text() for note in (cache / "digests").iterdir()}
    note = next(
        note for note in (cache / "digests").iterdir() if note.read_text() in (bundle / "bundle.json").read_text()
    )
    note.write_text("0" * 64)
    assert run("tilewright-restore", "--bundle", bundle, "--arguments").returncode == 3
    assert run("tilewright-restore", "--bundle", bundle, "--arguments", "--fresh").returncode == 0
    assert run("tilewright-restore", "--bundle", bundle, "--arguments").returncode == 0
