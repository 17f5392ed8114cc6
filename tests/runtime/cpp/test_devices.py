"""Several devices of the C++ library: the same pixels as one, also if one fails, hangs or has too little memory."""

import json

import numpy as np
import pytest
from PIL import Image

from tilewright.runtime.engines.machine import compute_capability
from tilewright.runtime.restore import load

pytestmark = pytest.mark.slow  # the compiler takes a while


def test_faults_leave_the_pixels_as_they_are(run, bundle):
    done = run("tests/faults", bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " cases, 0 wrong" in done.stdout


def test_two_devices_have_pythons_pixels(run, in_token_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")
    random = np.random.default_rng(5)
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(random.integers(0, 256, (30, 50, 3), np.uint8)).save(source)
    options = {"tile": 128, "overlap": 32, "steps": 2, "seed": 9}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    with load(in_token_tiny, batch=1, threads=1, engine="ort") as restorer:
        right = restorer(source, **options)
    for devices in ("cpu:0", "cpu:0,cpu:1"):
        done = run(
            "tilewright-restore", "--bundle", in_token_tiny, source, target, "--batch", 1, "--threads", 1,
            "--devices", devices, *words,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert np.array_equal(np.asarray(Image.open(target)), right)


def test_a_device_that_is_not_there_is_refused(run, bundle, tmp_path):
    def refused(devices: str, part: str) -> None:
        done = run(
            "tilewright-restore", "--bundle", bundle, "--devices", devices, tmp_path / "i.png", tmp_path / "o.png"
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert part in done.stderr

    refused("gpu", "device 'gpu' is unknown; use cpu:0 to cpu:")
    refused("cpu:99999", "device 'cpu:99999': there are ")
    refused("cpu:00", "device 'cpu:00' is unknown")
    refused("cpu:0,cpu:0", "device 'cpu:0' is named twice; name it once")
    refused("cpu:0,", "device '' is unknown")
    refused("cuda:1", "a GPU runs alone, and it must be the first; use cuda:0")
    refused("cpu:0,cuda:0", "a GPU runs alone, and it must be the first; use cuda:0")


@pytest.mark.skipif(compute_capability() is not None, reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_refused(run, bundle):
    done = run("tilewright-restore", "--bundle", bundle, "--engines", "--devices", "cuda:0")
    assert (done.returncode, done.stdout) == (4, "")
    assert "device 'cuda:0': no NVIDIA GPU with its driver is here; use cpu:0" in done.stderr


def test_a_gpu_takes_its_own_engines_only(run, build, imitated_gpu):
    """No ONNX Runtime here has CUDA."""
    bundle = build()
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    engines = manifest["components"]["sharpen"]["engines"]
    there = engines[0] | {"device": "cuda"}
    engines += [
        there | {"name": "cuda-float32", "backend": "cuda"},
        there | {"name": "ort-old", "needs": {"compute_capability": [8, 9]}},
        there | {"name": "ort-new", "needs": {"compute_capability": [9, 1]}},
        there | {"name": "ort-other", "needs": {"compute_capability": [8, 9], "exactly": True}},
    ]
    path.write_text(json.dumps(manifest))
    done = run("tilewright-restore", "--bundle", bundle, "--engines", "--devices", "cuda:0")
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("sharpen: ").partition(" ") for line in done.stdout.splitlines()]
    assert {name: reason for name, _, reason in lines} == {
        "ort-float32": "runs on cpu, and the device that was asked for is of the kind cuda",
        "cuda-float32": "needs ONNX Runtime for CUDA, and the one that is linked has no CUDA",
        "ort-old": "was chosen",
        "ort-new": "needs compute capability 9.1, this GPU's is 9.0",
        "ort-other": "needs compute capability 8.9, this GPU's is 9.0",
    }
